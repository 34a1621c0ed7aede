"""A block's vector-Jacobian products by autograd, on a graph that is kept.

The parts of a block, and what joins them, are cut off from each other and from other blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pathnet.models.residual_net import Block

__all__ = ["IDENTITY", "Pullback", "Pullbacks", "plain_pullbacks", "product", "saved_tensors"]

Pullback = Callable[[Tensor], Tensor]
"""A linear map of one gradient [B, ...] to the gradient before it, in the type of the walk."""


def IDENTITY(grad: Tensor) -> Tensor:  # noqa: N802
    """Return the gradient: the pull-back of a part that passes its input on."""
    return grad


@dataclass(frozen=True)
class Pullbacks:
    """The pull-backs of a block at a recorded input.

    Attributes:
        join: from the block's output to the sum of its parts.
        parts: from the sum to the input, through each part; None for a part that the block lacks, or that does not
            depend on the input.
        inner: the narrowest floating-point type of the block's output and parts.
        tensors: function that lists what they keep alive.
        kind: what captured pull-backs compute, equal for those that differ in values alone; None for plain ones.
    """

    join: Pullback
    parts: tuple[Pullback | None, ...]
    inner: torch.dtype
    tensors: Callable[[], Sequence[Tensor]]
    kind: object = None


def product(pullbacks: Pullbacks, factors: Sequence[float], grad: Tensor) -> Tensor:
    """Return the sum of a block's pull-backs times their factors.

    Args:
        factors: one for each part; parts with the factor 0 are left out, and at least one part is not.
    """
    grad = pullbacks.join(grad)
    total: Tensor | None = None
    for factor, part in zip(factors, pullbacks.parts, strict=True):
        if factor == 0 or part is None:
            continue
        pulled = part(grad)
        if total is None:
            total = pulled if factor == 1 else pulled * factor
        else:
            total = torch.add(total, pulled, alpha=factor)
    assert total is not None
    return total


def plain_pullbacks(block: Block, x: Tensor, copies: bool) -> tuple[Tensor, Pullbacks]:
    """Run a block forward; return its output, and its pull-backs by ``torch.autograd.grad``.

    Args:
        copies: whether a branch or the join changes its input in place, and so gets a copy.

    Raises:
        RuntimeError: ``copies`` is false, and one changes its input in place.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        entry = leaf.clone() if copies else leaf
        version = entry._version
        parts = block.parts(entry)
        z = block.summed(parts).detach().requires_grad_()
        joining = z.clone() if copies else z
        y = block.join(joining)
    of_state = torch.float64 if x.dtype == torch.float64 else torch.float32

    def pulled(output: Tensor, source: Tensor, grad: Tensor) -> Tensor:
        grad = grad.to(output.dtype)
        return torch.autograd.grad(output, source, grad, retain_graph=True)[0].to(of_state)

    def pullback(part: Tensor | None) -> Pullback | None:
        if part is entry and part._version == version:
            return IDENTITY
        return partial(pulled, part, leaf) if part is not None and part.requires_grad else None

    join = IDENTITY if y is joining and y._version == 0 else partial(pulled, y, z)
    outputs = [y, *(part for part in parts if part is not None)]
    inner = min((output.dtype for output in (x, *outputs)), key=_RANGES.__getitem__)
    return y.detach(), Pullbacks(join, tuple(map(pullback, parts)), inner, partial(saved_tensors, outputs))


_RANGES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def saved_tensors(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that the graphs behind the outputs keep for the backward pass."""
    pending: list[Any] = [output.grad_fn for output in outputs]
    visited: set[Any] = {None}
    tensors: list[Tensor] = []
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        pending += [following for following, _ in node.next_functions]
        kind: Any = type(node)
        values = [getattr(node, name) for name in _saved_names(kind)]
        values += getattr(node, "saved_tensors", ())
        for value in values:
            several = value if isinstance(value, (list, tuple)) else [value]
            tensors += [tensor for tensor in several if isinstance(tensor, Tensor)]
    return tensors


@cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]
