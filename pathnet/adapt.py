"""Somebody else's model as a `ResidualNet`, found by tracing it, without editing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.engines import ENGINES
from pathnet.models.residual_net import ResidualNet
from pathnet.models.tracing.blocks import TracedBlock
from pathnet.models.tracing.dissect import Dissection, dissect
from pathnet.models.tracing.examples import examples
from pathnet.models.tracing.graphs import Traced, traces, untouched

__all__ = ["AdaptedNet", "adapt"]


class AdaptedNet(ResidualNet):
    """The view of a model as stem, residual blocks and head, over the model's own modules and weights.

    Training it, moving it or changing its mode does so to the model. Its text (``print``) is a report of what was
    found and which engines serve it.

    Attributes:
        traced_by: ``torch.fx`` or ``torch.export``, or ``hand`` where its parts were given.
        shapes: for the example, what enters each block and what leaves the last, without the batch.
        fixed: why it takes inputs of the example's shape alone, batch apart; empty where it takes others.
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
    ) -> None:
        super().__init__(stem, blocks, head)
        self.frozen_statistics = tuple(frozen_statistics)
        self.traced_by, self.shapes, self.fixed = traced_by, tuple(shapes), tuple(fixed)

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
        for engine in ENGINES:
            reason = engine.unavailable() or engine.unsupported(self, "running", "float32", self.shapes[0], device)
            lines.append(f"engine {engine.name}: {'serves' if reason is None else reason}")
        if self.fixed:
            lines.append(f"for inputs of the example's shape: {'; '.join(self.fixed[:3])}")
        return "\n".join(lines)


def adapt(model: nn.Module, example: Tensor | None = None, output: str | int | None = None) -> AdaptedNet:
    """The `ResidualNet` view of a model, found by tracing it in evaluation mode (`torch.fx`, or `torch.export`).

    An addition is a residual connection if every way from the network's input to its output passes through it and
    through the common source of its operands, and if one of its branches has weights. Of the two branches the one
    with fewer layers of weights is the skip. An activation right behind the addition, which everything passes
    (post-activation blocks, ``y = relu(s(x) + f(x))``), is the block's `Block.join`: both branches pass its Jacobian.
    What else stands before the next block's source is part of both of its branches.

    The weights are the model's own, and the model is left as it was. Dropout modules are live in training; dropout
    written as a function stays as it was traced, in evaluation.

    Args:
        example: an input batch, floating-point [B, C, H, W] or int64 [B, T], ...; guessed from the model by default.
        output: which of the model's outputs, where there are several: a name or a number.

    Returns:
        The network, whose output and gradients (of the input and of all parameters) were found equal to the model's.

    Raises:
        ValueError: the model cannot be traced, has no residual connections (dense connections, concatenations around
            blocks), or the adapted network is not equal to it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    owned = set(model.modules())
    root = _OneOutput(model, output)
    with untouched(model):
        example = _example(root, model, example)
        expected = root(example.clone()).detach()
        traced = _trace(root, model, example, expected)
        net = _network(dissect(traced, example), traced, example)
        _check(root, net, model, example)
    for module in net.modules():
        if module not in owned:
            module.training = model.training
    return net


class _OneOutput(nn.Module):
    """A model of one input tensor and one of its outputs."""

    def __init__(self, model: nn.Module, output: str | int | None) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        return _one(self.model(x), self.output)


def _one(given: Any, output: str | int | None) -> Tensor:
    if isinstance(given, fx.Proxy):
        return given  # type: ignore[return-value]
    if output is not None:
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


def _example(root: nn.Module, model: nn.Module, example: Tensor | None) -> Tensor:
    """An input that the model takes.

    Raises:
        ValueError: it does not take the example, or none could be guessed.
    """
    if example is not None:
        if not isinstance(example, Tensor) or example.ndim == 0 or len(example) == 0:
            raise ValueError(
                f"example: expected a batch of inputs as a tensor, got {getattr(example, 'shape', example)}"
            )
        example = example.detach()
        try:
            root(example.clone())
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(
                f"example: the model refuses the shape {list(example.shape)} ({_first(error)})"
            ) from error
        return example
    refused = []
    for guess in examples(model):
        try:
            root(guess.clone())
            return guess
        except (RuntimeError, TypeError, IndexError, AssertionError) as error:
            refused.append(f"{list(guess.shape)}: {_first(error)}")
    raise ValueError(
        f"example: none could be guessed, expected a batch of inputs ({'; '.join(refused) or 'no layer'})"
    )


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _trace(root: nn.Module, model: nn.Module, example: Tensor, expected: Tensor) -> Traced:
    """The first trace that computes what the model does.

    Raises:
        ValueError: there is none.
    """
    reasons = []
    for attempt in traces(root, model, example):
        try:
            traced = attempt()
            output = fx.GraphModule(traced.held, traced.graph)(example.clone())
            if _differs(output, expected):
                raise ValueError("its trace computes something else than the model")
            return traced
        except Exception as error:
            reasons.append(_first(error))
    raise ValueError(f"model: cannot be traced (torch.fx: {'; torch.export: '.join(reasons)}); give blocks= by hand")


def _network(found: Dissection, traced: Traced, example: Tensor) -> AdaptedNet:
    shapes, y = [], found.stem(example.clone())
    for block in found.blocks:
        shapes.append(y.shape[1:])
        y = block(y)
    shapes.append(y.shape[1:])
    return AdaptedNet(found.stem, found.blocks, found.head, traced.kind, shapes, found.fixed, traced.frozen)


def _check(root: nn.Module, net: AdaptedNet, model: nn.Module, example: Tensor) -> None:
    """
    Raises:
        ValueError: output or gradients of ``net`` are not the model's, or samples of a batch influence each other.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    expected, gradients = _gradients(root, model, example)
    output, found = _gradients(net, model, example)
    if _differs(output, expected):
        raise ValueError("model: the adapted network's output is not the model's")
    names = [*(["the input"] if example.is_floating_point() else []), *(name for name, _ in model.named_parameters())]
    largest = max((float(own.norm()) for own in gradients if own is not None), default=0.0)
    for name, own, other in zip(names, found, gradients, strict=True):
        if (own is None) != (other is None) or (
            own is not None and other is not None and _differs(own, other, largest)
        ):
            raise ValueError(f"model: the adapted network's gradient of {name} is not the model's")
    with torch.no_grad():
        mixed = net(torch.cat([example, example.roll(1, -1)]))[: len(example)]
    if _differs(mixed, expected):
        raise ValueError(
            "model: in evaluation mode samples of a batch influence each other (statistics of the batch?)"
        )


def _gradients(net: nn.Module, model: nn.Module, example: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and the gradients of a random functional of it."""
    x = example.clone()
    leaves = list(model.parameters())
    if x.is_floating_point():
        leaves = [x.requires_grad_(), *leaves]  # type: ignore[list-item]
    output = net(x * 1 if x.is_floating_point() else x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)


def _differs(given: Tensor, expected: Tensor, size: float = 0.0) -> bool:
    """By more than rounding, relative to the norm of what is expected; ``size`` is that of all of it."""
    if given.shape != expected.shape or not torch.isfinite(expected).all():
        return True
    own = float(expected.double().norm())
    rounding = torch.finfo(expected.dtype).eps
    return not float((given.double() - expected.double()).norm()) <= rounding**0.5 * own + 100 * rounding * size
