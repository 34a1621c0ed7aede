"""Gradients of a group of paths: the rows that go through each branch of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Rows", "copies", "put", "rows_of", "take"]

Rows = tuple[Tensor | None, Tensor | None]
"""The paths of a group that go through the residual module, and those through the skip; None if there are none."""


def rows_of(paths: Tensor, device: torch.device) -> list[Rows]:
    """Return the rows of each block for paths [P, n]."""
    active = paths.bool().cpu()
    rows: list[Rows] = []
    for column in active.T:
        on, off = column.nonzero()[:, 0].to(device), (~column).nonzero()[:, 0].to(device)
        rows.append((on if len(on) else None, off if len(off) else None))
    return rows


def copies(grad: Tensor, count: int) -> Tensor:
    """Return [P, *shape] of one gradient; copies if there are several, since `put` writes into them."""
    return grad.expand(count, *grad.shape) if count == 1 else grad.repeat(count, *(1,) * grad.ndim)


def take(grads: Tensor, rows: Tensor) -> Tensor:
    """Return the gradients of some paths, without a copy if they are all."""
    return grads if len(rows) == len(grads) else grads[rows]


def put(grads: Tensor, shape: Sequence[int], replacements: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradients [P, *shape] with some paths' replaced, in place where shapes allow."""
    for rows, replacement in replacements:
        if len(rows) == len(grads):
            return replacement
        if grads.shape[1:] != replacement.shape[1:]:
            grads = replacement.new_empty(len(grads), *shape)
        grads[rows] = replacement
    return grads
