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

    What is held are n + 1 gradients before a block and behind it; a block takes as many at a time as fit in a chunk,
    whose results, and what makes them, are held beside.

    Args:
        walk: one block's routed Jacobian. Takes the block's number, scaled gradients [g, B, ...] at its output, and
            (a, c) for each of them, to the scaled gradients at its input.
        grad, exponent: [B, ...] and int32 [B] or [1], what the walk starts from.
        routing: [n, 2]
    """
    sums: Scaled = (grad[None], exponent[None])
    for i, (a, c) in reversed(list(enumerate(routing.tolist()))):
        sums = _through_one_block(partial(walk, i), *sums, a, c)
    return sums


def _through_one_block(
    walk: Callable[[Tensor, Tensor, Sequence[tuple[float, float]]], Scaled],
    grads: Tensor,
    exponents: Tensor,
    a: float,
    c: float,
) -> Scaled:
    count = len(grads)

    def work(part: slice) -> Scaled:
        through_skip = range(part.start, min(part.stop, count))
        through_residual = range(max(part.start - 1, 0), part.stop - 1)
        taken = torch.tensor([*through_skip, *through_residual], device=grads.device)
        ways = [(a, 0.0)] * len(through_skip) + [(0.0, c)] * len(through_residual)
        walked = walk(grads[taken], exponents[taken], ways)
        own, others = ((t[: len(through_skip)], t[len(through_skip) :]) for t in walked)
        lacking = part.stop - part.start
        skip = _filled(own[0], behind=lacking - len(own[0])), _filled(others[0], behind=lacking - len(own[0]))
        residual = _filled(own[1], before=lacking - len(own[1])), _filled(others[1], before=lacking - len(own[1]))
        return scaling.add(skip, residual)

    parts = [done for _, done in in_chunks(count + 1, 4 * grads[0].nbytes, work)]
    return torch.cat([own for own, _ in parts]), torch.cat([exponent for _, exponent in parts])


def _filled(own: Tensor, before: int = 0, behind: int = 0) -> Tensor:
    """With so many zeros before or behind."""
    return torch.cat([own.new_zeros(before, *own.shape[1:]), own, own.new_zeros(behind, *own.shape[1:])])


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
