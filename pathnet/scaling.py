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

    Attributes:
        mantissa: [G, B, ...]; without the first dimension for one gradient.
        exponent: int32 [G, B] where samples are independent, or [G, 1] where the batch is one object; without the
            first dimension for one gradient.
    """

    mantissa: Tensor
    exponent: Tensor


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent``, exact as long as the result is a normal number of ``x``'s type.

    In two factors, since ``2**exponent`` itself can leave the range that the result lies in.
    """
    half = torch.div(exponent, 2, rounding_mode="floor")
    return x * _power_of_two(half, x.dtype) * _power_of_two(exponent - half, x.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2**exponent`` by its bits, as near as normal numbers come: a GPU's ``pow`` may round, as may ``ldexp``."""
    integer, bits, bias = (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)
    exponent = exponent.to(integer).clamp(1 - bias, bias)
    return (exponent + bias << bits).view(dtype)


def beside(exponent: Tensor, grad: Tensor) -> Tensor:
    """The exponents with as many dimensions as the gradients, to be broadcast to them."""
    return exponent.reshape(*exponent.shape, *(1,) * (grad.ndim - exponent.ndim))


def largest(grad: Tensor, exponent: Tensor) -> Tensor:
    """[G, B] or [G, 1], as the exponents: the largest magnitude of every slot of the mantissas."""
    samples = grad.abs().flatten(2).amax(2)
    return samples.amax(1, keepdim=True) if exponent.shape[1] == 1 else samples


def rescale(grad: Tensor, exponent: Tensor) -> ScaledGradient:
    """The same values with the largest magnitude of every slot in [1/2, 1); zero and non-finite slots stay."""
    magnitude = largest(grad, exponent)
    shift = torch.frexp(magnitude).exponent
    shift = torch.where(torch.isfinite(magnitude) & (magnitude > 0), shift, torch.zeros_like(shift))
    return ScaledGradient(times_power_of_two(grad, -beside(shift, grad)), exponent + shift)


COEFFICIENTS = 60
"""Coefficients of a block stay as they are where the larger one lies within 2^-60 and 2^60."""


def of_coefficients(routing: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divide the coefficients [P, n, 2] of each block by a power of two where a walk's float32 would not stand them.

    Returns:
        The coefficients, and int32 [P], by which powers of two their gradients are to be multiplied; None where all
        coefficients stay as they are.
    """
    exponents = torch.frexp(routing.detach().double().abs().amax(2)).exponent
    exponents = torch.where(exponents.abs() > COEFFICIENTS, exponents, 0)
    if not exponents.any():
        return routing, None
    return times_power_of_two(routing.double(), -exponents[..., None]), exponents.sum(1).int()


def value(grad: Tensor, exponent: Tensor) -> Tensor:
    """float64 [G, B, ...]: the pair as plain numbers."""
    return times_power_of_two(grad.double(), beside(exponent, grad))


def align(grad: Tensor, exponent: Tensor) -> ScaledGradient:
    """The same values under one exponent a gradient, [G, 1]: the largest of its samples that are not zero."""
    common = _or_any(_weight(grad, exponent).amax(1, keepdim=True))
    return ScaledGradient(times_power_of_two(grad, beside(exponent - common, grad)), common)


def add(first: ScaledGradient, second: ScaledGradient) -> ScaledGradient:
    """The sum of two scaled gradients of one shape, brought back into range; zero slots have no say in its scale."""
    (grad, exponent), (other, others) = rescale(*first), rescale(*second)
    common = _or_any(torch.maximum(_weight(grad, exponent), _weight(other, others)))
    terms = (
        times_power_of_two(own, beside((exponents.long() - common).clamp(min=-_FAR).int(), own))
        for own, exponents in ((grad, exponent), (other, others))
    )
    return rescale(sum(terms, torch.zeros_like(grad)), common)


_NOTHING = torch.iinfo(torch.int32).min
_FAR = 1 << 12


def _weight(grad: Tensor, exponent: Tensor) -> Tensor:
    """The exponents, and less than any where a slot is zero."""
    nonzero = grad.flatten(2).any(2)
    if exponent.shape[1] == 1:
        nonzero = nonzero.any(1, keepdim=True)
    return torch.where(nonzero, exponent, torch.full_like(exponent, _NOTHING))


def _or_any(exponent: Tensor) -> Tensor:
    """The exponents; 0 where all is zero, which any will do for."""
    return torch.where(exponent == _NOTHING, torch.zeros_like(exponent), exponent)


def norms(grad: Tensor, exponent: Tensor) -> Tensor:
    """float64 [G, B]: the Euclidean norm of every sample, with full relative precision down to 1e-300."""
    squares = grad.double().square().flatten(2).sum(2)
    return times_power_of_two(squares.sqrt(), exponent.expand_as(squares))


def combine(sample_norms: Tensor) -> Tensor:
    """float64 [G]: the norm of the batch from those of its samples [G, B], squares kept in range."""
    peak = sample_norms.amax(1, keepdim=True)
    safe = torch.where((peak > 0) & torch.isfinite(peak), peak, torch.ones_like(peak))
    return (sample_norms / safe).square().sum(1).sqrt() * safe[:, 0]
