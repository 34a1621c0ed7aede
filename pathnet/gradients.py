"""What a tape is asked for, at any of three places: gradients and norms along paths and routings, and their sums over
all paths of a length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines import Engine, fallback
from pathnet.full_precision import full_precision
from pathnet.recording import At, Record
from pathnet.routing import routed_backward, routed_backward_norms

__all__ = [
    "LengthSums",
    "compare_lengths",
    "norms",
    "place_shape",
    "scaled_gradients",
    "squared_norms_by_length",
    "sums_by_length",
]


@dataclass(frozen=True)
class LengthSums:
    """How the exact sums G_k of the gradients of all paths of length k, k = 0..n, lie to each other and to their sum
    G: the ordinary gradient, in a network with gates (highway) without what flows through the gates themselves.

    Attributes:
        norm: float64 [n + 1], of G_k.
        full_norm: of G.
        next_cosine: float64 [n], between G_k and G_{k+1}; NaN where one of them is zero.
        full_cosine: float64 [n + 1], between G_k and G; NaN where one of them is zero.
        share: float64 [n + 1], of G that G_k explains, ``<G_k, G> / |G|^2``. Shares sum to 1; where lengths cancel
            each other some are negative or above one. NaN where G is zero.
        left: float64 [n + 1], ``|G - G_0 - ... - G_k| / |G|``: what the lengths up to k leave of G; not finite where
            G is zero.
    """

    norm: Tensor
    full_norm: float
    next_cosine: Tensor
    full_cosine: Tensor
    share: Tensor
    left: Tensor

    @property
    def explained(self) -> Tensor:
        """float64 [n + 1]: the share of G that the lengths up to k explain."""
        return self.share.cumsum(0)


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


def sums_by_length(engine: Engine, record: Record, routing: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Scaled sums [n + 1, *shape at the place], exponents int32 [n + 1, B] or [n + 1, 1]; see `Engine`."""
    walked = engine.sums_by_length(record.blocks, record.grad, record.exponent, routing.to(record.grad.dtype))
    if at == "y0":
        return walked
    pull_back = _StemPullBack(record, at)
    pulled = [pull_back(grad[None], exponent[None]) for grad, exponent in zip(*walked, strict=True)]
    return torch.cat([grad for grad, _ in pulled]), torch.cat([exponent for _, exponent in pulled])


@full_precision()
def squared_norms_by_length(engine: Engine, record: Record, signs: Tensor, at: At) -> Tensor:
    """float64 [draws, n + 1]: the squared norms of the sums by length, each module's residual with its sign.

    Args:
        signs: [draws, n], of each module.
    """
    result = torch.empty(len(signs), signs.shape[1] + 1, dtype=torch.float64, device=record.grad.device)
    for draw, own in enumerate(signs.to(record.grad.dtype)):
        routing = torch.stack([torch.ones_like(own), own], 1)
        if at == "y0":
            samples = engine.sums_by_length_norms(record.blocks, record.grad, record.exponent, routing)
        else:
            samples = fallback.norms_of(*sums_by_length(engine, record, routing, at))
        result[draw] = scaling.combine(samples).square()
    return result


@full_precision()
def compare_lengths(grads: Tensor, exponents: Tensor) -> LengthSums:
    """Of the scaled sums by length [n + 1, ...] and their exponents, one gradient in float64 at a time.

    Inner products are of gradients scaled to size one, so that no square leaves the range of float64.
    """
    count = len(grads)

    def one(k: int) -> Tensor:
        return scaling.value(grads[k][None], exponents[k][None])[0]

    full = sum((one(k) for k in range(1, count)), one(0))
    norm, full_norm = torch.empty(count, dtype=torch.float64), _norm(full)
    direction = full / full_norm if full_norm > 0 else full
    next_cosine, full_cosine = (torch.full((size,), torch.nan, dtype=torch.float64) for size in (count - 1, count))
    left, rest, before = torch.empty(count, dtype=torch.float64), full, None
    for k in range(count):
        own = one(k)
        rest = rest - own
        norm[k], left[k] = _norm(own), _norm(rest)
        unit = own / norm[k] if norm[k] > 0 else None
        if unit is not None and full_norm > 0:
            full_cosine[k] = (unit * direction).sum()
        if unit is not None and before is not None:
            next_cosine[k - 1] = (before * unit).sum()
        before = unit
    share = full_cosine * norm / full_norm
    if full_norm > 0:
        share = share.where(norm > 0, 0.0)
    return LengthSums(norm, full_norm, next_cosine, full_cosine, share, left / full_norm)


def _norm(grad: Tensor) -> float:
    return float(scaling.combine(grad.flatten()[None].abs()))


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
