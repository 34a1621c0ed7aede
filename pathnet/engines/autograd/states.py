"""One gradient between two blocks, as a mantissa and powers of two that are numbers in Python.

Most blocks leave the largest magnitudes of a gradient in a window around 1, and then nothing but those magnitudes is
computed. `reference` rescales after every block; the values are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.scaling import ScaledGradient

__all__ = [
    "ScaledState",
    "added",
    "in_range",
    "in_range_together",
    "multiplied",
    "norms_of",
    "scaled_to_one",
    "started",
    "times",
]

WINDOW = 2.0**-8, 2.0**8
"""Largest magnitudes of a sample that stay as they are between blocks."""

LOST = {torch.float64: 2.0**-450, torch.float32: 2.0**-50, torch.bfloat16: 2.0**-50, torch.float16: 2.0**-8}
"""Largest magnitude behind a block, by the type inside it, below which digits may be lost."""

LIFT = {torch.float64: 900, torch.float32: 100, torch.bfloat16: 100, torch.float16: 10}
"""The power of two that lifts a gradient which a block takes below `LOST`, or lowers one that is not finite."""


class ScaledState(NamedTuple):
    """A gradient that is not zero.

    Attributes:
        mantissa: [B, ...], float32 or float64.
        exponents: one for each sample, or one where the batch is one object.
        peaks: the largest magnitude of the mantissa under each exponent.
    """

    mantissa: Tensor
    exponents: tuple[int, ...]
    peaks: tuple[float, ...]


def started(start: ScaledGradient) -> ScaledState | None:
    """Return the gradient at ``y_n`` as a state; None if it is zero."""
    mantissa = start.mantissa
    if mantissa.dtype not in (torch.float32, torch.float64):
        mantissa = mantissa.float()
    exponents = tuple(start.exponent.tolist())
    peaks = _peaks(mantissa, len(exponents))
    return ScaledState(mantissa, exponents, peaks) if any(peaks) else None


Product = Callable[[Tensor], Tensor]
"""A linear map of gradients."""


def in_range(product: Product, state: ScaledState, inner: torch.dtype) -> ScaledState | None:
    """Return ``product`` of a gradient, as a state; None if it is zero.

    Inside ``product`` nothing is rescaled. Where a sample's gradient nearly vanishes, or is not finite, the product
    is taken once more, lifted or lowered by a power of two: a block may shrink a gradient by 2^200 in float32.

    Args:
        product: a linear map from [B, ...] to [B, ...].
        inner: the narrowest type inside ``product``.
    """
    grad = product(state.mantissa)
    return _settled(product, state, grad, _peaks(grad, len(state.exponents)), inner)


def in_range_together(
    at_once: Product, alone: Product, states: Sequence[ScaledState], inner: torch.dtype
) -> list[ScaledState | None]:
    """Return what `in_range` does for each of several states, whose products are taken at once.

    Args:
        at_once: the linear map of gradients [k, B, ...].
        alone: the linear map of one gradient, for those that are lifted or lowered.
    """
    grads = at_once(torch.stack([state.mantissa for state in states]))
    slots = len(states[0].exponents)
    magnitudes = grads.abs().flatten(1) if slots == 1 else grads.abs().flatten(2)
    all_peaks = magnitudes.amax(-1).reshape(len(states), slots).tolist()
    # Copies, since a slice would keep all of them alive.
    return [
        _settled(alone, state, grad.clone(), tuple(peaks), inner)
        for state, grad, peaks in zip(states, grads, all_peaks, strict=True)
    ]


def _settled(
    product: Product, state: ScaledState, grad: Tensor, peaks: tuple[float, ...], inner: torch.dtype
) -> ScaledState | None:
    """Return the product ``grad`` of a state's mantissa as a state, see `in_range`.

    Args:
        peaks: the largest magnitude of ``grad`` under each exponent.
    """
    if _ordinary(peaks):
        return ScaledState(grad, state.exponents, peaks)
    slots = len(peaks)
    lifts = [0] * slots
    if not all(LOST[inner] <= peak < math.inf for peak in peaks):
        lift = LIFT[inner]
        lifts = [
            -lift if not math.isfinite(peak) else lift if peak < LOST[inner] and before > 0 else 0
            for peak, before in zip(peaks, state.peaks, strict=True)
        ]
    if any(lifts):
        again = product(times(state.mantissa, lifts))
        again_peaks = _peaks(again, slots)
        lifts = [power if math.isfinite(peak) else 0 for power, peak in zip(lifts, again_peaks, strict=True)]
        lifted = torch.tensor([power != 0 for power in lifts], device=grad.device)
        grad = torch.where(scaling.beside(lifted, grad), again, grad)
        peaks = tuple(b if power else a for a, b, power in zip(peaks, again_peaks, lifts, strict=True))
    exponents = [exponent - power for exponent, power in zip(state.exponents, lifts, strict=True)]
    return _scaled(grad, exponents, peaks)


def added(first: ScaledState | None, second: ScaledState | None) -> ScaledState | None:
    """Return the sum of two states; None if it is zero."""
    if first is None or second is None:
        return second if first is None else first
    pairs = list(zip(first.exponents, first.peaks, second.exponents, second.peaks, strict=True))
    # The exponent of a sample that is all zero says nothing.
    exponents = tuple(
        max(one if peak > 0 else another, another if another_peak > 0 else one)
        for one, peak, another, another_peak in pairs
    )
    lowered = [
        (state.mantissa, [min(e - top, 0) for e, top in zip(state.exponents, exponents, strict=True)])
        for state in (first, second)
    ]
    total = times(*lowered[0]) + times(*lowered[1])
    peaks = _peaks(total, len(exponents))
    return ScaledState(total, exponents, peaks) if _ordinary(peaks) else _scaled(total, exponents, peaks)


def multiplied(state: ScaledState, factor: float) -> ScaledState:
    """Return a state times a factor that is not zero."""
    significand, power = math.frexp(factor)
    exponents = tuple(exponent + power for exponent in state.exponents)
    peaks = tuple(peak * abs(significand) for peak in state.peaks)
    return ScaledState(state.mantissa * significand, exponents, peaks)


def scaled_to_one(state: ScaledState) -> ScaledState:
    """Return the state with its largest magnitudes in [1/2, 1)."""
    return _scaled(*state) or state


def norms_of(state: ScaledState) -> Tensor:
    """Return float64 [B], the samples' norms, without the powers of two."""
    norms: Tensor = torch.linalg.vector_norm(state.mantissa.flatten(1), dim=1, dtype=torch.float64)
    return norms


def times(grad: Tensor, powers: Sequence[int]) -> Tensor:
    """Return a gradient times a power of two for each sample, or one for all."""
    if not any(powers):
        return grad
    if all(-100 <= power <= 100 for power in powers):
        factors = torch.tensor([2.0**power for power in powers], dtype=grad.dtype, device=grad.device)
        return grad * scaling.beside(factors, grad)
    clamped = [min(max(power, -5000), 5000) for power in powers]
    exponents = torch.tensor(clamped, dtype=torch.int32, device=grad.device)
    return scaling.times_power_of_two(grad, scaling.beside(exponents, grad))


def _scaled(grad: Tensor, exponents: Sequence[int], peaks: Sequence[float]) -> ScaledState | None:
    """Return the state with the largest magnitudes scaled to [1/2, 1); zeros and what is not finite stay."""
    if not any(peaks):
        return None
    shifts = [math.frexp(peak)[1] if math.isfinite(peak) else 0 for peak in peaks]
    after = tuple(exponent + shift for exponent, shift in zip(exponents, shifts, strict=True))
    within = tuple(math.ldexp(peak, -shift) for peak, shift in zip(peaks, shifts, strict=True))
    return ScaledState(times(grad, [-shift for shift in shifts]), after, within)


def _peaks(grad: Tensor, slots: int) -> tuple[float, ...]:
    """Return the largest magnitude of each sample, or of all where the batch is one object."""
    magnitudes = grad.abs()
    return tuple((magnitudes.amax()[None] if slots == 1 else magnitudes.flatten(1).amax(1)).tolist())


def _ordinary(peaks: Sequence[float]) -> bool:
    return all(WINDOW[0] <= peak <= WINDOW[1] for peak in peaks)
