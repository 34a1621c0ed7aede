"""Path gradients and deletions by hooks on a model's submodules, without any code of pathnet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import Branch, Kind

Routes = tuple[bool, ...]
"""Whether gradients pass a block's skip connection, and each of its residual modules."""


def run(kind: Kind, model: nn.Module, batch: Any) -> Tensor:
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
    if kind.output is not None:
        output = output[kind.output]
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return torch.as_tensor(output)


def mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: mapped(change, value) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(mapped(change, value) for value in batch)
    return change(batch) if isinstance(batch, Tensor) else batch


def doubled(batch: Any) -> Any:
    return mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def target_of(output: Tensor, seed: int) -> Tensor:
    """Return random labels, some of which are left out of the loss if there are many of each sample."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, output.shape[-1], output.shape[:-1], generator=generator)
    if target.ndim == 2:
        target[:, -1] = torch.where(torch.arange(len(target)) % 2 == 0, target[:, -1], -100)
    return target


class Float64Throughout(TorchFunctionMode):
    """Lets a model in float64 compute in float64 also where it asks for float32, as normalisations do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = Tensor.double if function is Tensor.float else function
        return function(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


class Calls:
    """Runs a hook only on one call of a module."""

    def __init__(self, hook: Callable[..., Any], call: int) -> None:
        self.hook, self.remaining = hook, call

    def __call__(self, *args: Any) -> Any:
        self.remaining -= 1
        return self.hook(*args) if self.remaining == -1 else None


def entered(change: Callable[[Tensor], Tensor], module: nn.Module, branch: Branch | None = None) -> Any:
    """Change the first argument of a module, under every name that the call gives it."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        changed = change(first)
        return (
            tuple(changed if value is first else value for value in args),
            {name: changed if value is first else value for name, value in kwargs.items()},
        )

    return module.register_forward_pre_hook(Calls(hook, branch.call if branch else 0), with_kwargs=True)


def left(change: Callable[[Tensor], Tensor], module: nn.Module, branch: Branch) -> Any:
    """Change the output of a module, or the first of its outputs."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(Calls(hook, branch.call))


def truth(
    kind: Kind,
    model: nn.Module,
    batch: Any,
    target: Tensor,
    routes: Sequence[Routes] | None = None,
    parameter: str | None = None,
) -> Tensor:
    """Return dloss/dy_0 in float64 along the open routes; the ordinary gradient without any.

    The outputs of closed residual modules are detached. If the skip connection is closed, the gradient at the common
    source is replaced by the part through the residual modules.

    Args:
        parameter: the name of a parameter whose gradient it is instead.
    """
    model = copy.deepcopy(model).double()
    leaves: list[Tensor] = []

    def enter(y: Tensor) -> Tensor:
        leaves.append(y.detach().requires_grad_())
        return leaves[0] * 1.0

    with Float64Throughout(), ExitStack() as hooks:
        hooks.enter_context(entered(enter, model.get_submodule(kind.entry)))
        for addition, (skip, *residuals) in zip(kind.additions, routes or (), strict=routes is not None):
            for branch, is_open in zip(addition, residuals, strict=True):
                if not is_open:
                    hooks.enter_context(left(Tensor.detach, model.get_submodule(branch.last), branch))
            if not skip:
                without_skip = _WithoutSkip()
                for first in dict.fromkeys(Branch(branch.first, "", branch.call) for branch in addition):
                    hooks.enter_context(entered(without_skip, model.get_submodule(first.first), first))
        output = run(kind, model, doubled(batch))
        place = leaves if parameter is None else [model.get_parameter(parameter)]
        (gradient,) = torch.autograd.grad(loss(output, target), place)
    return gradient if parameter else gradient.movedim(kind.batch_dim, 0)


class _WithoutSkip:
    """Replaces the gradient at the source of a block by the part through its residual modules."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []
        self.source: Tensor | None = None

    def __call__(self, source: Tensor) -> Tensor:
        if self.source is None:
            source.register_hook(lambda grad: torch.stack(self.grads).sum(0) if self.grads else grad * 0)
            self.source = source
        assert source is self.source
        residual_input = source.view_as(source)
        residual_input.register_hook(self.grads.append)
        return residual_input


def deleted(kind: Kind, model: nn.Module, batch: Any, blocks: Sequence[int]) -> Tensor:
    """Return the output of the model in which the residual modules of some blocks return zeros."""
    with ExitStack() as hooks, torch.no_grad():
        for i in blocks:
            for branch in kind.additions[i]:
                hooks.enter_context(left(torch.zeros_like, model.get_submodule(branch.last), branch))
        return run(kind, model, batch)


def path_routes(kind: Kind, path: Sequence[int]) -> list[Routes]:
    """Return the routes of a path through the skip connection (0) or through all residual modules together (1)."""
    return [(not bit, *[bool(bit)] * len(addition)) for bit, addition in zip(path, kind.additions, strict=True)]
