"""Generic implementations for engines that lack a kernel: sums by length block by block, norms of gradients, and
routed forward passes through the blocks' modules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.chunks import in_chunks
from pathnet.engines.sharing import walk_together
from pathnet.models.residual_net import Block
from pathnet.scaling import ScaledGradient

__all__ = ["norms_of", "routed_forward", "sums_by_length", "through_block", "through_shared_prefixes"]

Step = TypeVar("Step", bound=Hashable)

Row = tuple[float, ...]
"""The coefficients of a block in a routing, see `Block.coefficients`."""
Rows = Sequence[Row]
"""Those of each of several gradients."""


def sums_by_length(
    through_block: Callable[[int, ScaledGradient, Rows], ScaledGradient],
    start: ScaledGradient,
    routing: Tensor,
) -> ScaledGradient:
    """Compute ``G_k <- a J_skip^T G_k + c J_residual^T G_{k-1}`` from last block to first: `Walk.sums_by_length`.

    Both sides of a block hold up to n + 1 gradients. They pass through it together, or in chunks if memory is short.

    Args:
        through_block: one block's routed vector-Jacobian product. Takes the block's number, scaled gradients
            [g, B, ...] at its output, and a routing's row for each of them: first (a, 0) for each G_k, then (0, c).
            Returns the scaled gradients at the block's input.
        start: the scaled gradient at ``y_n``: [B, ...] and int32 [B] or [1].
        routing: [n, 2], or [n, 1 + m] with a coefficient for each of m residual modules in parallel.
    """
    sums = ScaledGradient(start.mantissa[None], start.exponent[None])
    room = _room(start.mantissa.device)
    for i, row in reversed(list(enumerate(routing.tolist()))):
        sums = _through_one_block(partial(through_block, i), sums, row, room)
    return sums


COPIES = 16
"""Gradient-sized buffers per length while a block is processed (an estimate): two terms, each as input, intermediate
and output, plus the copies that `scaling.add` aligns."""


def _room(device: torch.device) -> int | None:
    """Return the bytes of memory for a block's work: half of a GPU's free memory; None for the default elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2


def _through_one_block(
    through_block: Callable[[ScaledGradient, Rows], ScaledGradient],
    sums: ScaledGradient,
    row: Row,
    room: int | None,
) -> ScaledGradient:
    count, (a, *modules) = len(sums.mantissa), row

    def work(lengths: range) -> ScaledGradient:
        by_skip = slice(lengths.start, min(lengths.stop, count))
        by_residual = slice(max(lengths.start - 1, 0), lengths.stop - 1)
        skips, residuals = by_skip.stop - by_skip.start, by_residual.stop - by_residual.start
        # Slices, since copying a list of indices to the device would synchronise.
        entering = (torch.cat([tensor[by_skip], tensor[by_residual]]) for tensor in sums)
        rows = [(a, *[0.0] * len(modules))] * skips + [(0.0, *modules)] * residuals
        walked = through_block(ScaledGradient(*entering), rows)
        skip = (_padded(tensor[:skips], after=len(lengths) - skips) for tensor in walked)
        residual = (_padded(tensor[skips:], before=len(lengths) - residuals) for tensor in walked)
        return scaling.add(ScaledGradient(*skip), ScaledGradient(*residual))

    chunks = in_chunks(range(count + 1), COPIES * sums.mantissa[0].nbytes, work, room)
    parts = [part for _, part in chunks]
    return ScaledGradient(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _padded(tensor: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """Return the tensor with that many zeros before or after it along the first dimension."""
    zeros = (tensor.new_zeros(count, *tensor.shape[1:]) for count in (before, after))
    return torch.cat([next(zeros), tensor, next(zeros)])


def norms_of(grads: ScaledGradient) -> Tensor:
    """Return float64 [G, B], the samples' norms of scaled gradients, chunk by chunk."""

    def work(gradients: range) -> Tensor:
        part = slice(gradients.start, gradients.stop)
        return scaling.norms(grads.mantissa[part], grads.exponent[part])

    chunks = in_chunks(range(len(grads.mantissa)), 2 * grads.mantissa[:1].nbytes, work)
    return torch.cat([norms for _, norms in chunks])


@torch.no_grad()
def routed_forward(blocks: Sequence[Block], y0: Tensor, routing: Tensor) -> Tensor:
    """Return [P, B, *y_n.shape[1:]] under at least one routing [P, n, 2 or more], through the blocks' branches."""

    def apply(i: int, y: Tensor, row: Row) -> Tensor:
        return through_block(blocks[i], y.clone(), row)

    passes = [[tuple(row) for row in rows] for rows in routing.tolist()]
    return torch.stack(through_shared_prefixes(y0, passes, apply))


def through_shared_prefixes(
    y0: Tensor, passes: Sequence[Sequence[Step]], apply: Callable[[int, Tensor, Step], Tensor]
) -> list[Tensor]:
    """Return the output of each forward pass, where passes that begin alike share their beginning.

    Args:
        passes: the step of each pass at each block; all of one length.
        apply: takes the number of the block (from 0), its input and the step there; returns the block's output.
    """
    outputs: list[Tensor] = [y0] * len(passes)

    def finish(numbers: Sequence[int], y: Tensor) -> None:
        for number in numbers:
            outputs[number] = y

    def apply_all(i: int, inputs: Sequence[Tensor], steps: Sequence[Step]) -> list[Tensor]:
        return [apply(i, y, step) for y, step in zip(inputs, steps, strict=True)]

    walk_together(y0, passes, apply_all, finish)
    return outputs


def through_block(block: Block, y: Tensor, row: Row) -> Tensor:
    """Return ``join(a skip(y) + c residual(y))``; a branch with the coefficient 0 is left out, finite or not.

    Args:
        y: the input, which a branch or the join may change in place.
    """
    factors = block.coefficients(row)[: 1 + block.residual_modules]
    wanted = [i for i, factor in enumerate(factors) if factor != 0] or [0]
    parts = block.parts(y, wanted)
    terms = [factors[i] * part for i in wanted if (part := parts[i]) is not None]
    return block.join(sum(terms[1:], terms[0]))
