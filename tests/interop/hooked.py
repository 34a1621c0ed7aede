"""Path gradients and deletions by hooks on a model's submodules, without any code of pathnet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from originals import Original
from torch import Tensor, nn


def logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x, use_cache=False) if hasattr(model, "config") else model(x)
    return torch.as_tensor(getattr(output, "logits", output))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def truth(
    original: Original,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    path: Sequence[int] | None,
    bn: str = "running",
    at: str = "y0",
) -> Tensor:
    """Return dloss/d(place) in float64 along a path; the ordinary gradient without a path.

    If the path takes a skip connection, the output of the residual module is detached. If it takes a residual module,
    the gradient at the common source is replaced by the part through the residual module.
    """
    model, (x, target) = copy.deepcopy(model).double(), batch
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(bn == "batch")
    x = x.double().requires_grad_() if x.is_floating_point() else x
    leaves: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[0] * 1.0, *args[1:])

    with ExitStack() as hooks:
        if at == "y0":
            hooks.enter_context(model.get_submodule(original.entry).register_forward_pre_hook(enter))
        for residual, takes_residual in zip(original.residuals, path or (), strict=path is not None):
            if takes_residual:
                first = model.get_submodule(residual.first)
                hooks.enter_context(first.register_forward_pre_hook(without_skip_gradient))
            else:
                last = model.get_submodule(residual.last)
                hooks.enter_context(last.register_forward_hook(changed(Tensor.detach)))
        output = logits(model, x)
    parameters = dict(model.named_parameters())
    places = {"y0": leaves, "image": [x], "stem_weight": [parameters.get(original.stem_weight)]}
    leaf = places[at] if at in places else [parameters[at]]
    (gradient,) = torch.autograd.grad(loss(output, target), leaf, allow_unused=True, materialize_grads=True)
    return gradient


def without_skip_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace the gradient at the source of both branches by the part through the residual module."""
    source, *further = args
    residual_input, grads = source.view_as(source), []
    residual_input.register_hook(grads.append)
    source.register_hook(lambda _: grads[0])
    return (residual_input, *further)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


@contextmanager
def without(original: Original, model: nn.Module, blocks: Sequence[int]) -> Iterator[nn.Module]:
    """Make the residual modules of some blocks return zeros for a while."""
    with ExitStack() as hooks:
        for i in blocks:
            last = model.get_submodule(original.residuals[i].last)
            hooks.enter_context(last.register_forward_hook(changed(torch.zeros_like)))
        yield model
