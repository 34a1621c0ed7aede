"""What engines share that have no fused form of their own: norms of whole gradients, the blocks' own modules, sums by
length as steps from block to block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.chunks import in_chunks
from pathnet.models.residual_net import Block

__all__ = ["norms", "norms_of", "routed_forward", "sums_by_length", "through_shared_prefixes"]

Step = TypeVar("Step", bound=Hashable)

Scaled = tuple[Tensor, Tensor]


def norms(walk: Callable[[Tensor], tuple[Tensor, Tensor]], grad: Tensor, bytes_each: int, routing: Tensor) -> Tensor:
    """float64 [P, B]: the samples' norms, from gradients that are walked chunk by chunk.

    Args:
        walk: takes routings [p, n, 2] to the scaled gradients at ``y_0``.
        grad: [B, ...], what all walks start from.
        bytes_each: of the largest gradient on the way, under one routing.
        routing: [P, n, 2]
    """
    result = torch.empty(len(routing), len(grad), dtype=torch.float64, device=grad.device)
    for part, samples in in_chunks(len(routing), bytes_each, lambda part: scaling.norms(*walk(routing[part]))):
        result[part] = samples
    return result


def sums_by_length(
    walk: Callable[[int, Tensor, Tensor, Sequence[tuple[float, float]]], Scaled],
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
) -> Scaled:
    """``G_k <- a J_skip^T G_k + c J_residual^T G_{k-1}`` from the last block to the first: `Engine.sums_by_length`.

    What is held are n + 1 gradients before a block and behind it; a block takes all of them at once, or as many as
    there is memory for beside them.

    Args:
        walk: one block's routed Jacobian. Takes the block's number, scaled gradients [g, B, ...] at its output, and
            (a, c) for each of them, to the scaled gradients at its input: first (a, 0) for each G_k, then (0, c).
        grad, exponent: [B, ...] and int32 [B] or [1], what the walk starts from.
        routing: [n, 2]
    """
    sums: Scaled = (grad[None], exponent[None])
    room = _room(grad.device)
    for i, (a, c) in reversed(list(enumerate(routing.tolist()))):
        sums = _through_one_block(partial(walk, i), *sums, (a, c), room)
    return sums


COPIES = 16
"""Gradients that a block holds beside each coefficient: both terms on the way in, in the walk, on the way out, and
what brings them to one exponent."""


def _room(device: torch.device) -> int | None:
    """Bytes for a block's work: of a GPU half of what is free, elsewhere what a chunk may take anyway."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2


def _through_one_block(
    walk: Callable[[Tensor, Tensor, Sequence[tuple[float, float]]], Scaled],
    grads: Tensor,
    exponents: Tensor,
    coefficients: tuple[float, float],
    room: int | None,
) -> Scaled:
    count, (a, c) = len(grads), coefficients

    def work(part: slice) -> Scaled:
        by_skip = slice(part.start, min(part.stop, count))
        by_residual = slice(max(part.start - 1, 0), part.stop - 1)
        skips, residuals = by_skip.stop - by_skip.start, by_residual.stop - by_residual.start
        # Slices, since a list of places would be a copy to the device that waits.
        entering = [torch.cat([tensor[by_skip], tensor[by_residual]]) for tensor in (grads, exponents)]
        walked = walk(entering[0], entering[1], [(a, 0.0)] * skips + [(0.0, c)] * residuals)
        length = part.stop - part.start
        skip = [_filled(tensor[:skips], behind=length - skips) for tensor in walked]
        residual = [_filled(tensor[skips:], before=length - residuals) for tensor in walked]
        return scaling.add((skip[0], skip[1]), (residual[0], residual[1]))

    parts = [done for _, done in in_chunks(count + 1, COPIES * grads[0].nbytes, work, room)]
    return torch.cat([grad for grad, _ in parts]), torch.cat([exponent for _, exponent in parts])


def _filled(tensor: Tensor, before: int = 0, behind: int = 0) -> Tensor:
    """With so many zeros before or behind."""
    zeros = (tensor.new_zeros(count, *tensor.shape[1:]) for count in (before, behind))
    return torch.cat([next(zeros), tensor, next(zeros)])


def norms_of(grads: Tensor, exponents: Tensor) -> Tensor:
    """float64 [G, B]: the samples' norms of scaled gradients, chunk by chunk."""
    parts = in_chunks(len(grads), 2 * grads[:1].nbytes, lambda part: scaling.norms(grads[part], exponents[part]))
    return torch.cat([own for _, own in parts])


@torch.no_grad()
def routed_forward(blocks: Sequence[Block], y0: Tensor, routing: Tensor) -> Tensor:
    """[P, B, *y_n.shape[1:]] of at least one routing [P, n, 2], through the blocks' own branches."""
    # A copy, since a branch or a join may begin with an in-place ReLU.
    ways = [tuple(map(tuple, coefficients)) for coefficients in routing.tolist()]
    return torch.stack(
        through_shared_prefixes(
            y0, ways, lambda i, y, step: blocks[i].join(_branches(blocks[i], y.clone(), step[0], step[1]))
        )
    )


def through_shared_prefixes(
    y0: Tensor, ways: Sequence[Sequence[Step]], apply: Callable[[int, Tensor, Step], Tensor]
) -> list[Tensor]:
    """What comes out of each way from block to block, where ways that begin alike share their beginning.

    Args:
        ways: for each way, what is done at each block; all of one length.
        apply: takes the number of the block (from 0), its input and what is done there, to its output.
    """
    ends: list[Tensor] = [y0] * len(ways)

    def walk(start: int, y: Tensor, together: Sequence[int]) -> None:
        for i in range(start, len(ways[0])):
            parting: defaultdict[Step, list[int]] = defaultdict(list)
            for way in together:
                parting[ways[way][i]].append(way)
            # The largest group last, for which no input is kept: no more are then than log2 of the ways.
            *others, (step, together) = sorted(parting.items(), key=lambda group: len(group[1]))
            for other, own in others:
                walk(i + 1, apply(i, y, other), own)
            y = apply(i, y, step)
        for way in together:
            ends[way] = y

    if ways:
        walk(0, y0, range(len(ways)))
    return ends


def _branches(block: Block, y: Tensor, a: float, c: float) -> Tensor:
    """``a skip(y) + c residual(y)``; a branch with the coefficient 0 is left out, whatever it would have given."""
    if c == 0:
        return a * block.skip(y)
    if a == 0:
        return c * block.residual(y)
    skip, residual = block.branches(y)
    return a * skip + c * residual
