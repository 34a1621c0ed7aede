"""Gradients and norms along paths and routings, and their sums over all paths of a length, at any place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathnet import chunks, scaling
from pathnet.engines import fallback
from pathnet.engines.transfers import to_device
from pathnet.full_precision import full_precision
from pathnet.places import Place
from pathnet.pull_backs import PullBack, Rows, place_shape
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record, routed_backward, routed_backward_norms

__all__ = [
    "LengthSums",
    "compare_lengths",
    "norms",
    "scaled_gradients",
    "shaped",
    "squared_norms_by_length",
    "sums_by_length",
    "under_routings",
    "values",
]


_BYTES = 8
"""Bytes of a number of the results, float64."""


@dataclass(frozen=True)
class LengthSums:
    """A comparison of the exact sums G_k of the gradients of all paths of length k, k = 0..n, and their sum G.

    `Tape.compare_lengths` returns one. G is the ordinary gradient; in a network with gates (highway) without the part
    through the gates themselves.

    Attributes:
        norm: float64 [n + 1], the Euclidean norm of G_k.
        full_norm: the Euclidean norm of G.
        next_cosine: float64 [n], the cosine between G_k and G_{k+1}; NaN where one of them is zero.
        full_cosine: float64 [n + 1], the cosine between G_k and G; NaN where one of them is zero.
        share: float64 [n + 1], the share of G that G_k explains, ``<G_k, G> / |G|^2``. Shares sum to 1; where lengths
            cancel each other some are negative or above one. NaN where G is zero.
        left: float64 [n + 1], ``|G - G_0 - ... - G_k| / |G|``: the part of G that the lengths up to k leave; not
            finite where G is zero.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> sums = pathnet.record(net, images, labels).compare_lengths()
        >>> sums
        LengthSums(lengths 0 to 6, full_norm=0.159, length 2 explains most (37%))
        >>> sums.share
        tensor([0.0502, 0.2373, 0.3714, 0.2342, 0.0833, 0.0210, 0.0027],
               dtype=torch.float64)
        >>> sums.explained[3]
        tensor(0.8930, dtype=torch.float64)
    """

    norm: Tensor
    full_norm: float
    next_cosine: Tensor
    full_cosine: Tensor
    share: Tensor
    left: Tensor

    @property
    def explained(self) -> Tensor:
        """Share of G that the lengths up to k explain, float64 [n + 1]."""
        return self.share.cumsum(0)

    def __repr__(self) -> str:
        share = self.share.where(self.share.isfinite(), -torch.inf)
        most = (
            f"length {int(share.argmax())} explains most ({float(share.max()):.0%})"
            if self.full_norm > 0
            else "G = 0"
        )
        return f"LengthSums(lengths 0 to {len(self.norm) - 1}, full_norm={self.full_norm:.3g}, {most})"


def scaled_gradients(record: Record, routing: Tensor, place: Place) -> Iterator[tuple[slice, ScaledGradient]]:
    """Compute the scaled gradients at a place under every routing, chunk by chunk.

    Yields:
        The position of a chunk among the routings; its gradients [p, *shape at the place], exponents int32 [p, B], or
        [p, 1] where the batch is one object. A parameter of N numbers has no samples: [p, 1, N] and [p, 1].
    """
    pull_back = PullBack(record, place)
    for part, grads, rows in _walked(record, routing, place):
        yield part, pull_back(grads, rows)


def under_routings(
    record: Record, routing: Tensor, powers: Tensor | None, place: Place, scaled: bool
) -> Tensor | ScaledGradient:
    """Return the gradients at a place, each times ``2**power``: float64 [P, *shape at the place], or scaled.

    Args:
        routing: [P, n, 2 or parts]
        powers: int32 [P]; None for zeros.
    """
    shape, count = place_shape(record, place), len(routing)
    like, exponent = record.start
    inner, slots = ((1, shape.numel()), 1) if place.parameter else (shape, len(exponent))
    mantissa = like.new_empty(count, *inner, dtype=like.dtype if scaled else torch.float64)
    exponents = torch.empty(count, slots, dtype=torch.int32, device=like.device)
    for part, (grad, exponent) in scaled_gradients(record, routing, place):
        if powers is not None:
            exponent = exponent + to_device(powers[part, None], exponent.device)
        mantissa[part] = grad if scaled else scaling.value(grad, exponent)
        exponents[part] = exponent
    return shaped(ScaledGradient(mantissa, exponents), place, shape) if scaled else mantissa.reshape(count, *shape)


def shaped(grads: ScaledGradient, place: Place, shape: torch.Size) -> ScaledGradient:
    """Return scaled gradients [P, *shape at the place], the exponents with dimensions that broadcast."""
    mantissa = grads.mantissa.reshape(-1, *shape)
    exponent = grads.exponent[:, 0] if place.parameter else grads.exponent
    return ScaledGradient(mantissa, scaling.beside(exponent, mantissa))


def values(grads: ScaledGradient) -> Tensor:
    """Return float64 [P, ...], the values of scaled gradients, one after the other to save memory."""
    result = grads.mantissa.new_empty(grads.mantissa.shape, dtype=torch.float64)
    for i, (mantissa, exponent) in enumerate(zip(*grads, strict=True)):
        result[i] = scaling.value(mantissa[None], exponent[None])[0]
    return result


def _walked(record: Record, routing: Tensor, place: Place) -> Iterator[tuple[slice, ScaledGradient, Rows]]:
    """Yield chunks of gradients where the walk ends, with the rows of the block that holds the parameter."""
    rows, behind = _split(record, routing, place)
    most = max(1, chunks.CHUNK_BYTES // max(1, place_shape(record, place).numel() * _BYTES))
    for part, (mantissa, exponent) in routed_backward(record, behind):
        for start in range(0, len(mantissa), most):
            piece = slice(start, start + most)
            position = slice(part.start + start, min(part.start + start + most, part.stop))
            yield position, ScaledGradient(mantissa[piece], exponent[piece]), rows[position]


def _split(record: Record, routing: Tensor, place: Place) -> tuple[Rows, Tensor]:
    """Return the rows of the block that holds the parameter, and the routing of the blocks behind it."""
    if place.block is None:
        return [], routing
    return routing[:, 0].tolist(), routing[:, 1:, : record.net.parts]


def norms(record: Record, routing: Tensor, place: Place, per_sample: bool) -> Tensor:
    """Return Euclidean norms of the gradients at a place: float64 [P], or [P, B] of each sample's share."""
    with full_precision():
        if place.parameter:
            return _norms_at_parameter(record, routing, place, per_sample)
        if place.at != "image":
            samples = routed_backward_norms(record, routing)
        else:
            samples = _empty_norms(record, routing, len(record.images))
            for part, grads in scaled_gradients(record, routing, place):
                samples[part] = scaling.norms(*grads)
        return samples if per_sample else scaling.combine(samples)


def _norms_at_parameter(record: Record, routing: Tensor, place: Place, per_sample: bool) -> Tensor:
    """Return the norms of a parameter's gradients, float64 [P], or of the samples' shares in them, [P, B]."""
    width = len(record.images) if per_sample else 1
    result, pull_back = _empty_norms(record, routing, width), PullBack(record, place)
    for part, grads, rows in _walked(record, routing, place):
        for sample in range(width):
            pulled = pull_back.of_sample(grads, rows, sample) if per_sample else pull_back(grads, rows)
            result[part, sample] = scaling.norms(*pulled)[:, 0]
    return result if per_sample else result[:, 0]


def _empty_norms(record: Record, routing: Tensor, width: int) -> Tensor:
    return torch.empty(len(routing), width, dtype=torch.float64, device=record.start.mantissa.device)


def sums_by_length(record: Record, routing: Tensor, place: Place) -> ScaledGradient:
    """Return the scaled sums of the gradients of all paths of each length, as `scaled_gradients`; see `Walk`.

    Args:
        routing: [n, 2], the (a, c) of every block; or [n, 1 + m] with a coefficient for each residual module.
    """
    rows, behind = _split(record, routing[None], place)
    sums = record.walk.sums_by_length(record.start, behind[0].to(record.start.mantissa.dtype))
    if place.parameter == "" and place.at != "image":
        return sums
    pull_back = PullBack(record, place)

    def pulled(row: Rows) -> ScaledGradient:
        parts = [
            pull_back(ScaledGradient(grad[None], exponent[None]), row) for grad, exponent in zip(*sums, strict=True)
        ]
        return ScaledGradient(*map(torch.cat, zip(*parts, strict=True)))

    if place.block is None:
        return pulled([])
    # Paths through the skip connection keep their length; those through the residual module grow by one.
    a, *modules = rows[0]
    same, longer = pulled([(a, *[0.0] * len(modules))]), pulled([(0.0, *modules)])
    none = ScaledGradient(*(torch.zeros_like(tensor[:1]) for tensor in same))
    ends = (same, none), (none, longer)
    return scaling.add(*(ScaledGradient(*map(torch.cat, zip(*end, strict=True))) for end in ends))


@full_precision()
def squared_norms_by_length(record: Record, signs: Tensor, place: Place) -> Tensor:
    """Return float64 [draws, n + 1]: the squared norms of the sums by length, with random signs of the modules.

    Args:
        signs: [draws, n, m], the sign of each residual module, of up to m in a block.
    """
    like = record.start.mantissa
    result = torch.empty(len(signs), signs.shape[1] + 1, dtype=torch.float64, device=like.device)
    for draw, residual in enumerate(signs.to(like.dtype)):
        routing = torch.cat([torch.ones_like(residual[:, :1]), residual], 1)
        if place.parameter or place.at == "image":
            samples = fallback.norms_of(sums_by_length(record, routing, place))
        else:
            samples = record.walk.sums_by_length_norms(record.start, routing)
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
            full_cosine[k] = scaling.total((unit * direction).flatten())
        if unit is not None and before is not None:
            next_cosine[k - 1] = scaling.total((before * unit).flatten())
        before = unit
    share = full_cosine * norm / full_norm
    if full_norm > 0:
        share = share.where(norm > 0, 0.0)
    return LengthSums(norm, full_norm, next_cosine, full_cosine, share, left / full_norm)


def _norm(grad: Tensor) -> float:
    return float(scaling.combine(grad.flatten()[None].abs()))
