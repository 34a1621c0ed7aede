"""Gradients and norms along paths and routings, and their sums over all paths of a length, at any of three places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines import fallback
from pathnet.full_precision import full_precision
from pathnet.recording import At
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record, routed_backward, routed_backward_norms

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
    """A comparison of the exact sums G_k of the gradients of all paths of length k, k = 0..n, and their sum G.

    G is the ordinary gradient; in a network with gates (highway) without the part through the gates themselves.

    Attributes:
        norm: float64 [n + 1], the norm of G_k.
        full_norm: the norm of G.
        next_cosine: float64 [n], the cosine between G_k and G_{k+1}; NaN where one of them is zero.
        full_cosine: float64 [n + 1], the cosine between G_k and G; NaN where one of them is zero.
        share: float64 [n + 1], the share of G that G_k explains, ``<G_k, G> / |G|^2``. Shares sum to 1; where lengths
            cancel each other some are negative or above one. NaN where G is zero.
        left: float64 [n + 1], ``|G - G_0 - ... - G_k| / |G|``: the part of G that the lengths up to k leave; not
            finite where G is zero.
    """

    norm: Tensor
    full_norm: float
    next_cosine: Tensor
    full_cosine: Tensor
    share: Tensor
    left: Tensor

    @property
    def explained(self) -> Tensor:
        """float64 [n + 1], the share of G that the lengths up to k explain."""
        return self.share.cumsum(0)

    def __repr__(self) -> str:
        share = self.share.where(self.share.isfinite(), -torch.inf)
        most = (
            f"length {int(share.argmax())} explains most ({float(share.max()):.0%})"
            if self.full_norm > 0
            else "G = 0"
        )
        return f"LengthSums(lengths 0 to {len(self.norm) - 1}, full_norm={self.full_norm:.3g}, {most})"


def place_shape(record: Record, at: At) -> torch.Size:
    """Return the shape of one gradient at ``at``."""
    if at == "y0":
        return record.y0_shape
    return record.images.shape if at == "image" else record.net.stem_weight().shape


def scaled_gradients(record: Record, routing: Tensor, at: At) -> Iterator[tuple[slice, ScaledGradient]]:
    """Compute the scaled gradients at ``at`` under every routing, chunk by chunk.

    Yields:
        The place of a chunk among the routings; its gradients [p, *shape at the place], exponents int32 [p, B], or
        [p, 1] where the batch is one object and at the stem's weight, which has no samples.
    """
    pull_back = _StemPullBack(record, at)
    for part, grads in routed_backward(record, routing):
        yield part, pull_back(grads)


def norms(record: Record, routing: Tensor, at: At, per_sample: bool) -> Tensor:
    """Return Euclidean norms of the gradients at ``at``: float64 [P], or [P, B] of each sample's share."""
    with full_precision():
        if at == "stem_weight" and per_sample:
            return _shares_of_samples(record, routing)
        # The first dimension of the stem's weight is output channels; their norms combine as those of samples do.
        samples = routed_backward_norms(record, routing) if at == "y0" else _norms_before_stem(record, routing, at)
        return samples if per_sample else scaling.combine(samples)


def _norms_before_stem(record: Record, routing: Tensor, at: At) -> Tensor:
    """Return the norms of the gradients at the image or the stem's weight: float64 [P, first dimension of it]."""
    device = record.start.mantissa.device
    result = torch.empty(len(routing), place_shape(record, at)[0], dtype=torch.float64, device=device)
    for part, grads in scaled_gradients(record, routing, at):
        result[part] = scaling.norms(*grads)
    return result


def _shares_of_samples(record: Record, routing: Tensor) -> Tensor:
    """Return float64 [P, B], the norms of the samples' shares in the gradient of the stem's weight."""
    width, device = len(record.images), record.start.mantissa.device
    result = torch.empty(len(routing), width, dtype=torch.float64, device=device)
    pull_back = _StemPullBack(record, "stem_weight")
    for part, grads in routed_backward(record, routing):
        for sample in range(width):
            result[part, sample] = scaling.combine(scaling.norms(*pull_back.of_sample(grads, sample)))
    return result


def sums_by_length(record: Record, routing: Tensor, at: At) -> ScaledGradient:
    """Return the scaled sums [n + 1, *shape at the place], exponents int32 [n + 1, B] or [n + 1, 1]; see `Walk`."""
    sums = record.walk.sums_by_length(record.start, routing.to(record.start.mantissa.dtype))
    if at == "y0":
        return sums
    pull_back = _StemPullBack(record, at)
    pulled = [pull_back(ScaledGradient(grad[None], exponent[None])) for grad, exponent in zip(*sums, strict=True)]
    return ScaledGradient(*(torch.cat(tensors) for tensors in zip(*pulled, strict=True)))


@full_precision()
def squared_norms_by_length(record: Record, signs: Tensor, at: At) -> Tensor:
    """Return float64 [draws, n + 1]: the squared norms of the sums by length, with random signs of the modules.

    Args:
        signs: [draws, n], the sign of each residual module.
    """
    like = record.start.mantissa
    result = torch.empty(len(signs), signs.shape[1] + 1, dtype=torch.float64, device=like.device)
    for draw, residual in enumerate(signs.to(like.dtype)):
        routing = torch.stack([torch.ones_like(residual), residual], 1)
        if at == "y0":
            samples = record.walk.sums_by_length_norms(record.start, routing)
        else:
            samples = fallback.norms_of(sums_by_length(record, routing, at))
        result[draw] = scaling.combine(samples).square()
    return result


@full_precision()
def compare_lengths(sums: ScaledGradient) -> LengthSums:
    """Compare the scaled sums by length [n + 1, ...], one gradient in float64 at a time.

    Inner products are taken of gradients scaled to norm 1, so no square leaves the range of float64.
    """
    count = len(sums.mantissa)

    def of_length(k: int) -> Tensor:
        return scaling.value(sums.mantissa[k][None], sums.exponent[k][None])[0]

    full = sum((of_length(k) for k in range(1, count)), of_length(0))
    norm, full_norm = torch.empty(count, dtype=torch.float64), _norm(full)
    direction = full / full_norm if full_norm > 0 else full
    next_cosine, full_cosine = (torch.full((size,), torch.nan, dtype=torch.float64) for size in (count - 1, count))
    left, remainder, before = torch.empty(count, dtype=torch.float64), full, None
    for k in range(count):
        grad = of_length(k)
        remainder = remainder - grad
        norm[k], left[k] = _norm(grad), _norm(remainder)
        unit = grad / norm[k] if norm[k] > 0 else None
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
    """Pull-back of scaled gradients at ``y_0`` to the image or to the first convolution's weight, by autograd."""

    def __init__(self, record: Record, at: At) -> None:
        self.at = at
        if at == "y0":
            return
        with torch.enable_grad(), record.autocast.entered() if record.autocast is not None else nullcontext():
            images = record.images.detach()
            if at == "image":
                self.leaf = images.requires_grad_()
            else:
                self.leaf = record.net.stem_weight().requires_grad_()
            self.y0 = record.net.stem(images.clone())

    def __call__(self, grads: ScaledGradient) -> ScaledGradient:
        if self.at == "y0":
            return grads
        if self.at == "stem_weight":
            grads = scaling.align(*grads)
        mantissa, exponent = grads
        pulled = [
            torch.autograd.grad(self.y0, self.leaf, grad.to(self.y0.dtype), retain_graph=True)[0].to(grad.dtype)
            for grad in mantissa
        ]
        return scaling.rescale(torch.stack(pulled), exponent)

    def of_sample(self, grads: ScaledGradient, sample: int) -> ScaledGradient:
        """Return the part of the weight's gradient that comes through one sample's slice at ``y_0``."""
        mantissa, exponent = grads
        alone = torch.zeros_like(mantissa)
        alone[:, sample] = mantissa[:, sample]
        return self(ScaledGradient(alone, exponent[:, sample : sample + 1] if exponent.shape[1] > 1 else exponent))
