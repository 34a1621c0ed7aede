"""One recorded forward pass, and backward passes over it under any number of routings, chunk by chunk.

Chunks are chunks of routings, never of samples, since in BN mode ``batch`` the batch is one object. All engines'
routings are chunked here, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pathnet.chunks import Pace, in_chunks
from pathnet.engines.engine import Prepared, Walk
from pathnet.engines.memory import storages
from pathnet.full_precision import Autocast, full_precision
from pathnet.models.context import NO_CONTEXT, Context
from pathnet.models.residual_net import ResidualNet
from pathnet.scaling import ScaledGradient

__all__ = ["Record", "routed_backward", "routed_backward_norms", "routed_forward"]


@dataclass(frozen=True)
class Record:
    """One forward pass, independent of the network it was taken from.

    Attributes:
        net: a frozen copy of the network, in the precision of the passes; shared with other passes.
        images: the network's main input, [B, C, H, W] or of any other shape that begins with the batch.
        y0_shape: (B, C_0, H_0, W_0), or (B, T, C) of tokens.
        engine: name of the engine that recorded the pass.
        walk: the engine's record of the blocks, which runs the backward passes.
        output: the head's output, [B, ...].
        loss: [], the loss of (output, target).
        start: the gradient dL/dy_n from which every backward pass starts: [B, *y_n.shape[1:]], and int32 [B] in BN
            mode ``running``, [1] in ``batch``, where the batch is one object.
        context: what the blocks and the head read besides.
        autocast: the automatic mixed precision of the forward pass; None for none.
    """

    net: ResidualNet
    images: Tensor
    y0_shape: torch.Size
    engine: str
    walk: Walk
    output: Tensor
    loss: Tensor
    start: ScaledGradient
    context: Context = NO_CONTEXT
    autocast: Autocast | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pass's buffers, and of the network's copy and the engine's form of it."""
        tensors = [self.images, self.output, *self.start, *self.walk.tensors, *self.context.tensors]
        tensors += self.net.state_dict().values()
        return sum(storages(tensors).values())

    @property
    @full_precision()
    @torch.no_grad()
    def y0(self) -> Tensor:
        """The stem's output, of shape ``y0_shape``; computed anew, since it would be a third of the memory."""
        return torch.as_tensor(self.net.stem(self.images.clone()))


def routed_backward(record: Record, routing: Tensor) -> Iterator[tuple[slice, ScaledGradient]]:
    """Pull the loss gradient back to ``y_0`` under every routing: ``g <- a J_skip^T g + c J_residual^T g`` per block.

    Args:
        routing: [P, n, 2] or [P, n, parts], see `Block.coefficients`; the blocks from input to output.

    Yields:
        The place of a chunk among the routings; its scaled gradients [p, *y0_shape], exponents int32 [p, B] (BN mode
        ``running``) or [p, 1] (``batch``).
    """
    grad = record.start.mantissa
    return in_chunks(
        routing.to(grad.dtype),
        max(record.y0_shape.numel() * grad.element_size(), grad.nbytes),
        partial(record.walk.routed_backward, record.start),
        most=record.walk.max_routings(),
        pace=_pace(grad, routing),
    )


def routed_backward_norms(record: Record, routing: Tensor) -> Tensor:
    """Return float64 [P, B], on the record's device: the norms of the samples' slices of `routed_backward`.

    Args:
        routing: [P, n, 2] or [P, n, parts], see `Block.coefficients`; the blocks from input to output.
    """
    grad = record.start.mantissa
    norms = torch.empty(len(routing), len(grad), dtype=torch.float64, device=grad.device)
    for part, samples in in_chunks(
        routing.to(grad.dtype),
        norms[:1].nbytes,
        partial(record.walk.norms, record.start),
        most=record.walk.max_routings(),
        pace=_pace(grad, routing),
    ):
        norms[part] = samples
    return norms


def routed_forward(prepared: Prepared, y0: Tensor, routing: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Run the blocks forward under every routing: ``y <- join(a skip(y) + c residual(y))`` per block.

    Args:
        y0: [B, C_0, H_0, W_0], or [B, T, C] of tokens.
        routing: [P, n, 2], the (a, c) of every block, from input to output.

    Yields:
        The place of a chunk among the routings; its outputs [p, B, *y_n.shape[1:]].
    """
    return in_chunks(
        routing.to(torch.float64 if y0.dtype == torch.float64 else torch.float32),
        y0.nbytes,
        partial(prepared.routed_forward, y0),
        most=prepared.max_routings(y0),
        pace=_pace(y0, routing),
    )


def _pace(batch: Tensor, routing: Tensor) -> Pace:
    return Pace(batch.device, len(batch) * routing.shape[1])
