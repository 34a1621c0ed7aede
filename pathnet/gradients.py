"""What a tape is asked for: gradients and norms along paths and routings, at any of three places."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines import Engine
from pathnet.record import At, Record, full_precision
from pathnet.routed import routed_backward, routed_backward_norms

__all__ = ["norms", "place_shape", "scaled_gradients"]


def place_shape(record: Record, at: At) -> torch.Size:
    """The shape of one gradient at ``at``."""
    if at == "y0":
        return record.y0_shape
    return record.images.shape if at == "image" else record.net.stem_weight().shape


def scaled_gradients(
    engine: Engine, record: Record, routing: Tensor, at: At
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The gradient at ``at`` under every routing, as scaled pairs, chunk by chunk.

    Yields:
        Which routings; gradients [p, *shape at the place]; exponents int32 [p, B], or [p, 1] where the batch is
        one object and at the stem's weight, which has no samples.
    """
    pull_back = _StemPullBack(record, at)
    for part, grad, exponent in routed_backward(engine, record, routing):
        yield part, *pull_back(grad, exponent)


@full_precision()
def norms(engine: Engine, record: Record, routing: Tensor, at: At, per_sample: bool) -> Tensor:
    """Euclidean norms of the gradients at ``at``: float64 [P], or [P, B] of the samples' own shares."""
    if at == "y0":
        samples = routed_backward_norms(engine, record, routing)
        return samples if per_sample else scaling.combine(samples)
    width = len(record.images)
    result = torch.empty(len(routing), width if per_sample else 1, dtype=torch.float64, device=record.grad.device)
    if at == "stem_weight" and per_sample:
        pull_back = _StemPullBack(record, at)
        for part, grad, exponent in routed_backward(engine, record, routing):
            for sample in range(width):
                result[part, sample] = scaling.combine(scaling.norms(*pull_back.of_sample(grad, exponent, sample)))
        return result
    for part, grad, exponent in scaled_gradients(engine, record, routing, at):
        slots = scaling.norms(grad, exponent)
        result[part] = slots if per_sample else scaling.combine(slots)[:, None]
    return result if per_sample else result[:, 0]


class _StemPullBack:
    """Takes scaled gradients at ``y_0`` back to the image or to the first convolution's weight by autograd."""

    def __init__(self, record: Record, at: At) -> None:
        self.at = at
        if at == "y0":
            return
        with torch.enable_grad():
            images = record.images.detach()
            if at == "image":
                self.leaf = images.requires_grad_()
            else:
                self.leaf = record.net.stem_weight().requires_grad_()
            self.y0 = record.net.stem(images.clone())

    def __call__(self, grad: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
        if self.at == "y0":
            return grad, exponent
        if self.at == "stem_weight":
            grad, exponent = scaling.align(grad, exponent)
        pulled = [torch.autograd.grad(self.y0, self.leaf, one, retain_graph=True)[0] for one in grad]
        return scaling.rescale(torch.stack(pulled), exponent)

    def of_sample(self, grad: Tensor, exponent: Tensor, sample: int) -> tuple[Tensor, Tensor]:
        """The part of the weight's gradient that comes through one sample's slice of the gradient at ``y_0``."""
        only = torch.zeros_like(grad)
        only[:, sample] = grad[:, sample]
        own = exponent[:, sample : sample + 1] if exponent.shape[1] > 1 else exponent
        return self(only, own)
