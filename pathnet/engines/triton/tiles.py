"""What the kernels share: where a program's pixels lie, and gradients as they stand behind a batch normalisation."""

from __future__ import annotations

import triton
import triton.language as tl

NO_SKIP, DIRECT, PROJECTION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a launch takes of the skip: nothing; every stride-th pixel, channels filled up; or its projection."""

ROW_FIELDS = tl.constexpr(5)
"""Of a row: source, target and the block's own state (-1 for none), the coefficients a and c as bits of float32."""

STATE_FIELDS = tl.constexpr(2)
"""Of a state: its slot, and the unit whose BN's means are still to be taken off (-1 where there is none)."""


@triton.jit
def quotient(numbers, inverse):
    """``numbers // divisor`` from the divisor's inverse: a fifth of the instructions of a division of integers.

    Exact for numbers from 0 to 2**20: with 1/2 added, their quotients are 1/2 / divisor or further from any integer,
    and rounded by 2**-22 of themselves.
    """
    return ((numbers.to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit
def points_of(tile, batch, height, width, inverse_width, pixel_tiles, SAMPLES: tl.constexpr, PIXELS: tl.constexpr):
    """Sample, row, column and validity of the SAMPLES * PIXELS points of a tile of images height x width.

    The tile's first pixel is divided as an integer, once. How many rows below it a point lies is a `quotient` of
    numbers below width + PIXELS.
    """
    point = tl.arange(0, SAMPLES * PIXELS)
    sample = (tile // pixel_tiles) * SAMPLES + point // PIXELS
    first = (tile % pixel_tiles) * PIXELS
    first_row = first // width
    along = first - first_row * width + point % PIXELS
    rows = quotient(along, inverse_width)
    row = first_row + rows
    return sample, row, along - rows * width, (sample < batch) & (row < height)


@triton.jit
def shift_of(largest):
    """The power of two that brings the largest magnitude, given as the bits of a float32, into [1/2, 1).

    Zero, infinity and NaN stay as they are, as in `pathnet.scaling.rescale`.
    """
    exponent = largest >> 23
    shift = tl.minimum(tl.maximum(exponent - 126, -125), 126)
    return tl.where((largest == 0) | (exponent == 255), 0, shift)


@triton.jit
def power_of_two(exponent):
    """``2**exponent`` for exponents from -126 to 127, by its bits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def cut_off(x, floor):
    """The larger of the two. A NaN stays one, where a GPU by itself would take the other number."""
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def batch_norm(gain_ptr, bias_ptr, mean_ptr, variance_ptr, epsilon, channel, known):
    """BN of some channels: mean, one over the deviation, that times the gain, bias."""
    mean = tl.load(mean_ptr + channel, mask=known, other=0.0)
    deviation = tl.rsqrt(tl.load(variance_ptr + channel, mask=known, other=1.0) + epsilon)
    scale = tl.load(gain_ptr + channel, mask=known, other=0.0) * deviation
    return mean, deviation, scale, tl.load(bias_ptr + channel, mask=known, other=0.0)


@triton.jit
def locate(states, live, slot_size, states_ptr, offsets_ptr):
    """Where gradients of states [PATHS] lie, int64; whether they wait for a BN's means; where its x_hat begins.

    All live states of a program wait for the same means.
    """
    fields = states_ptr + tl.maximum(states, 0) * STATE_FIELDS
    unit = tl.max(tl.where(live, tl.load(fields + 1), -1), 0)
    first = tl.multiple_of(tl.load(offsets_ptr + tl.maximum(unit, 0)), 16)
    return tl.load(fields).to(tl.int64) * slot_size, unit >= 0, first


@triton.jit
def load_means(corrections_ptr, width, states, known, channel, has_channel):
    """float32 [PATHS, K] twice: the means that BN's backward pass takes off gradients; 0 where none are known."""
    means = corrections_ptr + tl.maximum(states, 0).to(tl.int64)[:, None] * (2 * width) + channel[None, :]
    mask = known[:, None] & has_channel[None, :]
    return tl.load(means, mask=mask, other=0.0), tl.load(means + width, mask=mask, other=0.0)


@triton.jit
def load_gradients(gradients_ptr, slots, at, mask, x_hat_ptr, x_hat_mask, mean, mean_x_hat, CORRECT: tl.constexpr):
    """[PATHS, POINTS, K]: gradients at points, 0 where masked; behind BN float32, with its two means taken off.

    What BN's backward pass gives is ``values - mean(values) - x_hat mean(values x_hat)``, of which the values alone
    are stored.

    Args:
        slots: int64 [PATHS]
        at, x_hat_mask: [POINTS, K], places in a gradient and in x_hat.
        mask: [PATHS, POINTS, K]
    """
    values = tl.load(gradients_ptr + slots[:, None, None] + at[None, :, :], mask=mask, other=0.0)
    if CORRECT:
        x_hat = tl.load(x_hat_ptr + at, mask=x_hat_mask, other=0.0).to(tl.float32)
        values = values.to(tl.float32) - (x_hat[None, :, :] * mean_x_hat[:, None, :] + mean[:, None, :])
        values = tl.where(mask, values, 0.0)
    return values
