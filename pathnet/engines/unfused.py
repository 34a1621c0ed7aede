"""What engines share that have no fused form of their own: norms of whole gradients, the blocks' own modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.chunks import in_chunks
from pathnet.models.residual_net import Block

__all__ = ["norms", "routed_forward", "through_shared_prefixes"]

Step = TypeVar("Step", bound=Hashable)


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
