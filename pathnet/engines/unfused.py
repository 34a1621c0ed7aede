"""What engines share that have no fused form of their own: norms of whole gradients, the blocks' own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.chunks import in_chunks
from pathnet.models.residual_net import Block

__all__ = ["norms", "routed_forward"]


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
    outputs = []
    for coefficients in routing.tolist():
        y = y0
        for block, (a, c) in zip(blocks, coefficients, strict=True):
            # A copy, since a branch or a join may begin with an in-place ReLU.
            y = block.join(_branches(block, y.clone(), a, c))
        outputs.append(y)
    return torch.stack(outputs)


def _branches(block: Block, y: Tensor, a: float, c: float) -> Tensor:
    """``a skip(y) + c residual(y)``; a branch with the coefficient 0 is left out, whatever it would have given."""
    if c == 0:
        return a * block.skip(y)
    if a == 0:
        return c * block.residual(y)
    skip, residual = block.branches(y)
    return a * skip + c * residual
