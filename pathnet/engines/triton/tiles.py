"""Parts that the kernels share: the pixels of a program, and gradients at the input of a batch normalisation."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

NO_SKIP, DIRECT, PROJECTION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Skips of a launch: none; every stride-th pixel, zero channels added; or the skip's projection."""

ROW_FIELDS = tl.constexpr(5)
"""Fields of a row: the states source, target and entered (-1 for none), the coefficients a and c as float32 bits.

``entered`` is the state in which the routing arrives at the block, or the gradient at the input of the projection's
BN: what the block's skip reads.
"""

STATE_FIELDS = tl.constexpr(2)
"""Fields of a state: its slot, and the unit whose BN means are still to be subtracted (-1 for none)."""


class Points(NamedTuple):
    """Points of a tile, each field [POINTS]; `inside` tells which of them are in an image of the batch."""

    sample: tl.tensor
    row: tl.tensor
    column: tl.tensor
    inside: tl.tensor


class ImageSize(NamedTuple):
    """Height and width of an image, in pixels."""

    height: tl.tensor
    width: tl.tensor


class ConvConstants(NamedTuple):
    """Constants of a convolution [OUT_C, C, KERNEL, KERNEL]."""

    C: tl.constexpr
    OUT_C: tl.constexpr
    KERNEL: tl.constexpr
    STRIDE: tl.constexpr


class TileConstants(NamedTuple):
    """Constants of a tile: its gradients, its channels of the result, channels multiplied at a time, and how."""

    PATHS: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_K: tl.constexpr
    PRECISION: tl.constexpr


class NormPointers(NamedTuple):
    """A batch normalisation and the ReLU after it, which clamps at ``floor``; pointers are to float32 [C]."""

    gain_ptr: tl.tensor
    bias_ptr: tl.tensor
    mean_ptr: tl.tensor
    variance_ptr: tl.tensor
    epsilon: tl.tensor
    floor: tl.tensor


class NormValues(NamedTuple):
    """Values of a batch normalisation for some channels, [K] each: ``scale`` is the gain divided by the deviation."""

    mean: tl.tensor
    inverse_deviation: tl.tensor
    scale: tl.tensor
    bias: tl.tensor


class GradientMemory(NamedTuple):
    """Memory of a backward pass, see `state.GradientStates` and `state.Saved`.

    Attributes:
        gradients_ptr, slot_size: [slots, slot_size], one state's gradient in each slot.
        states_ptr: int32 [states, STATE_FIELDS]
        offsets_ptr, normalized_ptr: int64 [units], where each unit's x_hat begins, and all units' x_hat.
        corrections_ptr, corrections_width: float32 [states, 2, width], the two means that BN subtracts.
    """

    gradients_ptr: tl.tensor
    slot_size: tl.tensor
    states_ptr: tl.tensor
    offsets_ptr: tl.tensor
    normalized_ptr: tl.tensor
    corrections_ptr: tl.tensor
    corrections_width: tl.tensor


class LocatedStates(NamedTuple):
    """States [PATHS] that a program reads: the first element of each, int64; whether they still await BN's means, and
    the x_hat that those means go with."""

    states: tl.tensor
    live: tl.tensor
    starts: tl.tensor
    awaits_means: tl.tensor
    x_hat_ptr: tl.tensor


class BackwardMeans(NamedTuple):
    """Means of the gradient, and of its product with x_hat, float32 [PATHS, K], that BN's backward pass subtracts."""

    mean: tl.tensor
    mean_x_hat: tl.tensor


@triton.jit
def quotient(numbers, inverse):
    """Return ``numbers // divisor`` from the divisor's inverse: a fifth of an integer division's instructions.

    Exact for numbers from 0 to 2**20: with 1/2 added, their quotients are 1/2 / divisor or further from any integer,
    and rounded by 2**-22 of themselves.
    """
    return ((numbers.to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit
def points_of(tile, batch, height, width, inverse_width, pixel_tiles, SAMPLES: tl.constexpr, PIXELS: tl.constexpr):
    """Return the SAMPLES * PIXELS points of a tile of images height x width.

    The tile's first pixel is divided as an integer, once. How many rows below it a point is, is a `quotient` of
    numbers below width + PIXELS.
    """
    point = tl.arange(0, SAMPLES * PIXELS)
    sample = (tile // pixel_tiles) * SAMPLES + point // PIXELS
    first = (tile % pixel_tiles) * PIXELS
    first_row = first // width
    along = first - first_row * width + point % PIXELS
    rows = quotient(along, inverse_width)
    row = first_row + rows
    return Points(sample, row, along - rows * width, (sample < batch) & (row < height))


@triton.jit
def shift_of(largest):
    """Return the power of two that brings the largest magnitude, passed as float32 bits, into [1/2, 1).

    Zero, infinity and NaN stay as they are, as in `pathnet.scaling.rescale`.
    """
    exponent = largest >> 23
    shift = tl.minimum(tl.maximum(exponent - 126, -125), 126)
    return tl.where((largest == 0) | (exponent == 255), 0, shift)


@triton.jit
def power_of_two(exponent):
    """Return ``2**exponent`` for exponents from -126 to 127, by its bits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_coefficient(field_ptr):
    """Return a coefficient that a row holds as the bits of a float32."""
    return tl.load(field_ptr).to(tl.float32, bitcast=True)


@triton.jit
def behind_zeros(channel, C: tl.constexpr, BEFORE: tl.constexpr):
    """Return the channels of an input of C that a skip brings to ``channel`` behind BEFORE zero channels, and whether
    there are such."""
    input_channel = channel - BEFORE
    exists = input_channel < C
    if BEFORE > 0:
        exists = exists & (input_channel >= 0)
    return input_channel, exists


@triton.jit
def clamp(x, floor):
    """Return the larger of the two. A NaN stays one, where a GPU by itself would return the other number."""
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_normalization(norm, channel, known):
    """Return the values of a batch normalisation for some channels."""
    mean = tl.load(norm.mean_ptr + channel, mask=known, other=0.0)
    inverse_deviation = tl.rsqrt(tl.load(norm.variance_ptr + channel, mask=known, other=1.0) + norm.epsilon)
    scale = tl.load(norm.gain_ptr + channel, mask=known, other=0.0) * inverse_deviation
    return NormValues(mean, inverse_deviation, scale, tl.load(norm.bias_ptr + channel, mask=known, other=0.0))


@triton.jit
def locate(memory, states, live):
    """Return the locations of the gradients of states [PATHS]. All live states of a program await the same means."""
    fields = memory.states_ptr + tl.maximum(states, 0) * STATE_FIELDS
    unit = tl.max(tl.where(live, tl.load(fields + 1), -1), 0)
    first = tl.multiple_of(tl.load(memory.offsets_ptr + tl.maximum(unit, 0)), 16)
    starts = tl.load(fields).to(tl.int64) * memory.slot_size
    return LocatedStates(states, live, starts, unit >= 0, memory.normalized_ptr + first)


@triton.jit
def load_means(memory, located, channel, has_channel, CORRECT: tl.constexpr):
    """Return the means that BN subtracts from gradients; 0 for states that await none, and without CORRECT."""
    mean, mean_x_hat = 0.0, 0.0
    if CORRECT:
        width = memory.corrections_width
        means = memory.corrections_ptr + tl.maximum(located.states, 0).to(tl.int64)[:, None] * (2 * width)
        means += channel[None, :]
        mask = (located.live & located.awaits_means)[:, None] & has_channel[None, :]
        mean = tl.load(means, mask=mask, other=0.0)
        mean_x_hat = tl.load(means + width, mask=mask, other=0.0)
    return BackwardMeans(mean, mean_x_hat)


@triton.jit
def load_gradients(memory, located, places, within, means, CORRECT: tl.constexpr):
    """Return gradients at points, [PATHS, POINTS, K], 0 outside; with CORRECT float32, BN's two means subtracted.

    BN's backward pass gives ``values - mean(values) - x_hat mean(values x_hat)``; memory holds the values alone.

    Args:
        places: [POINTS, K], elements of a gradient, and of x_hat.
        within: bool [POINTS, K]
    """
    mask = located.live[:, None, None] & within[None, :, :]
    values = tl.load(memory.gradients_ptr + located.starts[:, None, None] + places[None, :, :], mask=mask, other=0.0)
    if CORRECT:
        x_hat = tl.load(located.x_hat_ptr + places, mask=within & located.awaits_means, other=0.0).to(tl.float32)
        correction = x_hat[None, :, :] * means.mean_x_hat[:, None, :] + means.mean[:, None, :]
        values = tl.where(mask, values.to(tl.float32) - correction, 0.0)
    return values
