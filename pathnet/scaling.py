"""Gradients as mantissa and power of two, so that long paths neither underflow nor crawl through denormals.

Scaling by a power of two is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ScaledGradient",
    "add",
    "align",
    "beside",
    "combine",
    "largest",
    "norms",
    "of_coefficients",
    "rescale",
    "times_power_of_two",
    "value",
]


class ScaledGradient(NamedTuple):
    """Gradients whose values are ``mantissa * 2**exponent``.

    A gradient of 1e-60 keeps the digits of its type this way, as one of 1e+60 does.

    Attributes:
        mantissa: [G, B, ...], in the type of the backward pass; without the first dimension for one gradient.
        exponent: int32 [G, B] where samples are independent, or [G, 1] where the batch is one object; without the
            first dimension for one gradient. A `Tape` returns it with further dimensions of 1, which broadcast to the
            mantissa.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> tape = pathnet.record(net, images, labels)
        >>> b = pathnet.paths.sample(n=6, length=5, count=2)
        >>> mantissa, exponent = tape.path_gradients(b, scaled=True)
        >>> mantissa.shape, exponent.shape
        (torch.Size([2, 4, 8, 8, 8]), torch.Size([2, 4, 1, 1, 1]))
        >>> torch.equal(mantissa.double() * 2.0**exponent, tape.path_gradients(b))
        True
    """

    mantissa: Tensor
    exponent: Tensor


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """Return ``x * 2**exponent``, exact as long as the result is a normal number of ``x``'s type.

    It multiplies by two factors, since ``2**exponent`` itself can leave the range of the result's type.
    """
    half = torch.div(exponent, 2, rounding_mode="floor")
    return x * _power_of_two(half, x.dtype) * _power_of_two(exponent - half, x.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the normal number next to ``2**exponent``, by its bits: a GPU's ``pow`` and ``ldexp`` may round."""
    integer, bits, bias = (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)
    exponent = exponent.to(integer).clamp(1 - bias, bias)
    return (exponent + bias << bits).view(dtype)


def beside(exponent: Tensor, grad: Tensor) -> Tensor:
    """Return the exponents with as many dimensions as the gradients, to be broadcast to them."""
    return exponent.reshape(*exponent.shape, *(1,) * (grad.ndim - exponent.ndim))


def largest(grad: Tensor, exponent: Tensor) -> Tensor:
    """Return the largest magnitude of the mantissas under each exponent: [G, B] or [G, 1]."""
    samples = grad.abs().flatten(2).amax(2)
    return samples.amax(1, keepdim=True) if exponent.shape[1] == 1 else samples


def rescale(grad: Tensor, exponent: Tensor) -> ScaledGradient:
    """Return the same values with the largest magnitude under each exponent in [1/2, 1); where it is zero or not
    finite, mantissas and exponent stay."""
    magnitude = largest(grad, exponent)
    shift = torch.frexp(magnitude).exponent
    shift = torch.where(torch.isfinite(magnitude) & (magnitude > 0), shift, torch.zeros_like(shift))
    return ScaledGradient(times_power_of_two(grad, -beside(shift, grad)), exponent + shift)


COEFFICIENTS = 60
"""Exponent up to which a block's coefficients stay as they are: the larger one is between 2^-60 and 2^60."""


def of_coefficients(routing: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divide each block's coefficients by a power of two if they would leave the range of a backward pass.

    Args:
        routing: [P, n, 2], or [P, n, 3] with gates.

    Returns:
        The coefficients, and int32 [P], the powers of two to multiply their gradients by; None where all coefficients
        stay as they are.
    """
    exponents = torch.frexp(routing.detach().double().abs().amax(2)).exponent
    exponents = torch.where(exponents.abs() > COEFFICIENTS, exponents, 0)
    if not exponents.any():
        return routing, None
    return times_power_of_two(routing.double(), -exponents[..., None]), exponents.sum(1).int()


def value(grad: Tensor, exponent: Tensor) -> Tensor:
    """Return float64 [G, B, ...], the values as plain numbers."""
    return times_power_of_two(grad.double(), beside(exponent, grad))


def align(grad: Tensor, exponent: Tensor) -> ScaledGradient:
    """Return the same values with one exponent per gradient, [G, 1]: the largest of its samples that are not zero."""
    common = _or_zero(_significant(grad, exponent).amax(1, keepdim=True))
    return ScaledGradient(times_power_of_two(grad, beside(exponent - common, grad)), common)


def add(first: ScaledGradient, second: ScaledGradient) -> ScaledGradient:
    """Return the sum of two scaled gradients of one shape, rescaled; zeros do not affect its exponents."""
    summands = rescale(*first), rescale(*second)
    common = _or_zero(torch.maximum(*(_significant(*summand) for summand in summands)))
    terms = (
        times_power_of_two(mantissa, beside((exponent.long() - common).clamp(min=-_FAR).int(), mantissa))
        for mantissa, exponent in summands
    )
    return rescale(sum(terms, torch.zeros_like(first.mantissa)), common)


_NOTHING = torch.iinfo(torch.int32).min
"""Stand-in for the exponent of zeros, below all exponents."""

_FAR = 1 << 12
"""Difference of exponents beyond which the smaller summand vanishes."""


def _significant(grad: Tensor, exponent: Tensor) -> Tensor:
    """Return the exponents; `_NOTHING` where all mantissas are zero."""
    nonzero = grad.flatten(2).any(2)
    if exponent.shape[1] == 1:
        nonzero = nonzero.any(1, keepdim=True)
    return torch.where(nonzero, exponent, torch.full_like(exponent, _NOTHING))


def _or_zero(exponent: Tensor) -> Tensor:
    """Return the exponents; 0 in place of `_NOTHING`."""
    return torch.where(exponent == _NOTHING, torch.zeros_like(exponent), exponent)


_PIECE = 1 << 12
"""Summands of a long sum that are added first."""


def total(values: Tensor) -> Tensor:
    """Return the sums over the last dimension, the same bits for any number of threads.

    On a processor, torch splits a single sum among its threads, but none of several sums.

    Args:
        values: [..., N].

    Returns:
        [...]
    """
    length = values.shape[-1]
    if values.numel() > length or length <= _PIECE or values.device.type != "cpu":
        return values.sum(-1)
    pieces = torch.nn.functional.pad(values, (0, -length % _PIECE)).reshape(*values.shape[:-1], -1, _PIECE)
    return total(pieces.sum(-1))


def norms(grad: Tensor, exponent: Tensor) -> Tensor:
    """Return float64 [G, B], the Euclidean norm of every sample, with full relative precision down to 1e-300."""
    squares = total(grad.double().square().flatten(2))
    return times_power_of_two(squares.sqrt(), exponent.expand_as(squares))


def combine(sample_norms: Tensor) -> Tensor:
    """Return float64 [G], the norm of the batch from the norms of its samples [G, B], squares kept in range."""
    peak = sample_norms.amax(1, keepdim=True)
    safe = torch.where((peak > 0) & torch.isfinite(peak), peak, torch.ones_like(peak))
    return total((sample_norms / safe).square()).sqrt() * safe[:, 0]
