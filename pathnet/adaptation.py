"""Somebody else's model as a `ResidualNet`, found by tracing it, without editing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.checks import MOST_INTEGER, check_integer, check_tensor, described
from pathnet.engines import Job, refusals
from pathnet.full_precision import full_precision
from pathnet.models.residual_net import ResidualNet
from pathnet.models.tracing.blocks import TracedBlock
from pathnet.models.tracing.by_hand import Part, assembled, inlined, inside, submodules
from pathnet.models.tracing.dissect import Dissection, dissect
from pathnet.models.tracing.examples import examples
from pathnet.models.tracing.graphs import Dropout, differs, first_line
from pathnet.models.tracing.tracers import attempts, untouched, untraceable

__all__ = ["AdaptedNet", "adapt"]


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


class AdaptedNet(ResidualNet):
    """The view of a model as stem, residual blocks and head, over the model's own modules and weights.

    Training it, moving it or changing its mode does so to the model. Its text (``print``) is a report of what was
    found and which engines serve it.

    Attributes:
        traced_by: ``torch.fx`` or ``torch.export``, or ``hand`` where its parts were given.
        shapes: for the example, what enters each block and what leaves the last, without the batch.
        fixed: why it takes inputs of the example's shape alone, batch apart; empty where it takes others.
        dropouts: the model's dropout modules, with their names, that `torch.export` left out.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[TracedBlock],
        head: nn.Module,
        traced_by: str,
        shapes: Sequence[torch.Size],
        fixed: Sequence[str] = (),
        frozen_statistics: Sequence[str] = (),
        dropouts: Sequence[tuple[str, Dropout]] = (),
    ) -> None:
        super().__init__(stem, blocks, head)
        self.frozen_statistics = tuple(frozen_statistics)
        self.traced_by, self.shapes, self.fixed = traced_by, tuple(shapes), tuple(fixed)
        self.dropouts = tuple(dropouts)

    def train(self, mode: bool = True) -> AdaptedNet:
        """As of any module.

        Raises:
            ValueError: to be trained, and the model has dropout that was left out.
        """
        live = [f"{name!r} (p = {own.p:g})" for name, own in self.dropouts if own.p > 0]
        if mode and live:
            raise ValueError(
                "net: tracing left the model's dropout out, which training would go without: expected p = 0, got "
                f"{', '.join(live[:3])}; set it, or give blocks' branches by hand (blocks=)"
            )
        super().train(mode)
        return self

    def stem_weight(self) -> Tensor:
        if isinstance(self.stem, fx.GraphModule):
            # Modules come in the order in which the model names them, operations in that in which they run.
            held = dict(self.stem.named_modules())
            for node in self.stem.graph.nodes:
                module = held.get(str(node.target)) if node.op == "call_module" else None
                if isinstance(module, nn.Conv2d):
                    return module.weight
        return super().stem_weight()

    def __repr__(self) -> str:
        return self.report()

    def report(self) -> str:
        """What was found, a line a block, and which engines serve."""
        rows: list[Sequence[str]] = [("block", "in the model", "input", "output", "skip", "residual module")]
        for i, block in enumerate(self):
            assert isinstance(block, TracedBlock)
            shapes = ("x".join(map(str, shape)) for shape in self.shapes[i : i + 2])
            rows.append((str(i + 1), block.name, *shapes, block.skip_kind(), block.kind()))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.n} residual blocks, found by {self.traced_by}"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        for name, reason in refusals(Job(self, "running", "float32", self.shapes[0], device)).items():
            lines.append(f"engine {name}: {'serves' if reason is None else reason}")
        if self.dropouts:
            lines.append(f"without dropout, in evaluation alone: {', '.join(name for name, _ in self.dropouts[:3])}")
        if self.fixed:
            lines.append(f"for inputs of the example's shape: {'; '.join(self.fixed[:3])}")
        return "\n".join(lines)


def adapt(
    model: nn.Module,
    example: Tensor | None = None,
    blocks: Sequence[str | nn.Module | Sequence[Part | None]] | None = None,
    stem: Part | None = None,
    head: Part | None = None,
    output: str | int | None = None,
) -> AdaptedNet:
    """The `ResidualNet` view of a model, found by tracing it in evaluation mode (`torch.fx`, or `torch.export`).

    An addition is a residual connection if every way from the network's input to its output passes through it and
    through the common source of its operands, and if one of its branches has weights; a subtraction is the addition
    of a branch with its sign changed. Of the two branches the one
    with fewer layers of weights is the skip. An activation right behind the addition, which everything passes
    (post-activation blocks, ``y = relu(s(x) + f(x))``), is the block's `Block.join`: both branches pass its Jacobian.
    What else stands before the next block's source is part of both of its branches.

    The weights are the model's own, and the model is left as it was. Dropout modules are live in training; dropout
    written as a function stays as it was traced, in evaluation. `torch.export` leaves all dropout out: networks that
    it traced are refused by training (``net.train()``) while the model has dropout modules with p above 0.

    Args:
        example: an input batch, floating-point [B, C, H, W] or int64 [B, T], ...; guessed from the model by default.
        blocks: what tracing shall not, or cannot, find by itself. Either submodules that hold residual blocks, or
            their names: additions elsewhere then do not count, and where the whole model cannot be traced, these
            modules are, one by one. Or the branches of every block, as pairs (skip, residual) or (skip, residual,
            join); each is a submodule, its name, a function over submodules, or None for the identity.
        stem, head: what is before the first block and behind the last, as branches are given; with pairs only.
        output: which of the model's outputs, where there are several: a name or a number.

    Returns:
        The network, whose output and gradients (of the input and of all parameters) were found equal to the model's.

    Raises:
        ValueError: the model cannot be traced, has no residual connections (dense connections, concatenations around
            blocks), the adapted network is not equal to it, or an argument does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {described(model)}")
    if isinstance(model, WRAPPERS):
        raise ValueError(f"model: expected the module that was wrapped or scripted, got {type(model).__name__}")
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Sequence) or not len(blocks)):
        raise ValueError(f"blocks: expected a list of submodules or their names, got {described(blocks)}")
    if output is not None and not isinstance(output, str):
        output = check_integer("output", output, -MOST_INTEGER, MOST_INTEGER)
    owned = set(model.modules())
    choose = partial(_one, output=output)
    root = _OneOutput(model, choose)
    with full_precision(), untouched(model):
        example = _example(root, example)
        if blocks is not None and any(isinstance(own, (tuple, list)) for own in blocks):
            if stem is None or head is None:
                name = "stem" if stem is None else "head"
                raise ValueError(f"{name}: expected a part of the model with blocks as pairs of branches, got None")
            net = _network(assembled(model, example, stem, blocks, head), "hand", example)  # type: ignore[arg-type]
        elif stem is not None or head is not None:
            name = "head" if stem is None else "stem"
            raise ValueError(f"{name}: expected None but with blocks as pairs of branches")
        else:
            net = _found(root, model, example, blocks)  # type: ignore[arg-type]
        _check(root, net, model, example)
    for module in net.modules():
        if module not in owned:
            module.training = model.training
    return net


class _OneOutput(nn.Module):
    """A model of one input tensor and one of its outputs."""

    def __init__(self, model: nn.Module, choose: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.choose = model, choose

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.model(x))  # type: ignore[no-any-return]


def _one(given: Any, output: str | int | None) -> Tensor:
    if isinstance(given, fx.Proxy):
        return given  # type: ignore[return-value]
    if output is not None:
        if isinstance(given, Tensor):
            raise ValueError(f"output: expected None of a model that gives one tensor, got {output!r}")
        try:
            chosen = getattr(given, output) if isinstance(output, str) and hasattr(given, output) else given[output]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"output: the model has no output {output!r}, it gives {_described(given)}") from None
        return chosen  # type: ignore[no-any-return]
    given = getattr(given, "logits", given)
    if isinstance(given, Mapping) and "logits" in given:
        given = given["logits"]
    if isinstance(given, (Mapping, tuple, list)):
        values = list(given.values() if isinstance(given, Mapping) else given)
        if len(values) != 1:
            raise ValueError(
                f"output: the model has several, expected the name or number of one; {_described(given)}"
            )
        (given,) = values
    return given  # type: ignore[no-any-return]


def _described(given: Any) -> str:
    if isinstance(given, Mapping):
        return "names " + ", ".join(map(repr, given))
    if isinstance(given, (tuple, list)):
        return f"numbers 0 to {len(given) - 1}"
    return type(given).__name__


def _example(root: _OneOutput, example: Tensor | None) -> Tensor:
    """An input that the model takes.

    Raises:
        ValueError: it does not take the example, or none could be guessed.
    """
    if example is not None:
        check_tensor("example", example)
        if example.ndim == 0 or len(example) == 0:
            raise ValueError(f"example: expected a batch of inputs as a tensor, got {list(example.shape)}")
        example = example.detach()
        try:
            root.model(example.clone())
        except Exception as error:
            raise ValueError(
                f"example: the model refuses the shape {list(example.shape)} in {example.dtype} ({first_line(error)})"
            ) from error
        return example
    refused = []
    for guess in examples(root.model):
        try:
            root.model(guess.clone())
            return guess
        except Exception as error:
            refused.append(f"{list(guess.shape)}: {first_line(error)}")
    raise ValueError(
        f"example: none could be guessed, expected a batch of inputs ({'; '.join(refused[:3]) or 'no layer'})"
    )


def _found(
    root: _OneOutput, model: nn.Module, example: Tensor, blocks: Sequence[str | nn.Module] | None
) -> AdaptedNet:
    """By tracing, among the given submodules if there are any."""
    expected = root(example.clone()).detach()
    if not torch.isfinite(expected).all():
        raise ValueError("example: expected one for which the model's output is finite")
    if differs(root(example.clone()), expected):
        raise ValueError("model: expected the same output each time in evaluation mode; it draws random numbers?")
    named = submodules(model, blocks or ())
    by_block = partial(inlined, root, named, example) if named else None
    traced, reasons = attempts(root, model, root.choose, example, expected, by_block)
    if traced is None:
        raise _untraced(reasons)
    within = None if blocks is None else inside(traced, list(named))
    try:
        found = dissect(traced, example, within)
    except ValueError:
        if not traced.whole:
            raise
        # What was left whole may hold residual connections.
        raise _untraced(reasons) from None
    outside = (found.stem, *(block.before for block in found.blocks if block.before is not None), found.head)
    if any(module in traced.whole for part in outside for module in part.modules()):
        # It may hold residual connections of its own.
        raise _untraced(reasons)
    for name in named:
        if not any(f"{block.name.split(' ')[0]}.".startswith(f"{name}.") for block in found.blocks):
            raise ValueError(f"blocks: no addition in {name!r} is a residual connection, which every way passes")
    return _network(found, traced.kind, example, traced.frozen, traced.dropouts)


def _untraced(reasons: Mapping[str, str]) -> ValueError:
    return ValueError(f"model: {untraceable(reasons)}; blocks= takes branches, (skip, residual), by hand")


def _network(
    found: Dissection,
    traced_by: str,
    example: Tensor,
    frozen: Sequence[str] = (),
    dropouts: Sequence[tuple[str, Dropout]] = (),
) -> AdaptedNet:
    shapes, y = [], found.stem(example.clone())
    for block in found.blocks:
        shapes.append(y.shape[1:])
        y = block(y)
    shapes.append(y.shape[1:])
    return AdaptedNet(found.stem, found.blocks, found.head, traced_by, shapes, found.fixed, frozen, dropouts)


def _check(root: nn.Module, net: AdaptedNet, model: nn.Module, example: Tensor) -> None:
    """
    Raises:
        ValueError: output or gradients of ``net`` are not the model's, or samples of a batch influence each other.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    expected, gradients = _gradients(root, model, example)
    output, found = _gradients(net, model, example)
    if differs(output, expected):
        raise ValueError("model: the adapted network's output is not the model's")
    names = [*(["the input"] if example.is_floating_point() else []), *(name for name, _ in model.named_parameters())]
    largest = max((float(own.norm()) for own in gradients if own is not None), default=0.0)
    for name, own, other in zip(names, found, gradients, strict=True):
        if (own is None) != (other is None) or (
            own is not None and other is not None and differs(own, other, largest)
        ):
            raise ValueError(f"model: the adapted network's gradient of {name} is not the model's")
    with torch.no_grad():
        mixed = net(torch.cat([example, example.roll(1, -1)]))[: len(example)]
    if differs(mixed, expected):
        raise ValueError("model: samples of a batch influence each other in evaluation mode (by batch statistics?)")


def _gradients(net: nn.Module, model: nn.Module, example: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and the gradients of a random functional of it."""
    x = example.clone()
    leaves = list(model.parameters())
    if x.is_floating_point():
        leaves = [x.requires_grad_(), *leaves]  # type: ignore[list-item]
    output = net(x * 1 if x.is_floating_point() else x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
