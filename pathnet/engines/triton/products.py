"""Transposed convolutions as matrix products of one program's tile, which `dgrad` adds up."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from pathnet.engines.triton.tiles import Points, load_gradients, load_means


class OutputPixels(NamedTuple):
    """Pixels of a convolution's output that its middle tap connects to the input's points, each field [POINTS]."""

    pixel: tl.tensor
    row: tl.tensor
    column: tl.tensor
    inside: tl.tensor


class TapPixels(NamedTuple):
    """A tap: its row and column, which may be beyond the kernel, and the output's pixels that it connects to points.

    ``pixel`` and ``hit`` are [POINTS]; without a hit the pixel is outside of the image.
    """

    row: tl.tensor
    column: tl.tensor
    pixel: tl.tensor
    hit: tl.tensor


class Phase(NamedTuple):
    """Row and column of the input's points, modulo the stride."""

    row: tl.tensor
    column: tl.tensor


@triton.jit
def outputs_of(points, size, STRIDE: tl.constexpr, PHASES: tl.constexpr):
    """Return the output's pixels of points, which are in any phase if PHASES is 1, in one phase if it is STRIDE."""
    inside = points.inside
    if PHASES < STRIDE:
        inside = inside & (points.row % STRIDE == 0) & (points.column % STRIDE == 0)
    row, column = points.row // STRIDE, points.column // STRIDE
    return OutputPixels((points.sample * size.height + row) * size.width + column, row, column, inside)


@triton.jit
def tap_of(number, phase, outputs, size, conv: tl.constexpr, PHASES: tl.constexpr):
    """Return tap ``number`` of those that reach this phase.

    Its offset from the middle tap's pixel is the same for all points.
    """
    PADDING: tl.constexpr = conv.KERNEL // 2
    TAPS: tl.constexpr = (conv.KERNEL + PHASES - 1) // PHASES
    tap_row = (phase.row + PADDING) % PHASES + (number // TAPS) * PHASES
    tap_column = (phase.column + PADDING) % PHASES + (number % TAPS) * PHASES
    rows = (phase.row + PADDING - tap_row) // conv.STRIDE
    columns = (phase.column + PADDING - tap_column) // conv.STRIDE
    hit = outputs.inside & (outputs.row >= -rows) & (outputs.row < size.height - rows)
    hit = hit & (outputs.column >= -columns) & (outputs.column < size.width - columns)
    return TapPixels(tap_row, tap_column, outputs.pixel + (rows * size.width + columns), hit)


@triton.jit
def transposed_products(
    acc,
    memory,
    located,
    weights_ptr,
    points,
    phase,
    size,
    channel,
    conv: tl.constexpr,
    block: tl.constexpr,
    PHASES: tl.constexpr,
    CORRECT: tl.constexpr,
):
    """Return ``acc`` plus the transposed convolution of gradients [height, width, OUT_C].

    Weights are [KERNEL**2, OUT_C, C].

    Args:
        phase: rows and columns of all points, modulo PHASES.
        size: that of the convolution's output.
    """
    BLOCK_K: tl.constexpr = block.BLOCK_K
    TAPS: tl.constexpr = (conv.KERNEL + PHASES - 1) // PHASES
    outputs = outputs_of(points, size, conv.STRIDE, PHASES)
    for depth in range((conv.OUT_C + BLOCK_K - 1) // BLOCK_K):
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        has_deep = deep < conv.OUT_C
        means = load_means(memory, located, deep, has_deep, CORRECT)
        for number in range(TAPS * TAPS):
            tap = tap_of(number, phase, outputs, size, conv, PHASES)
            places = (tap.pixel * conv.OUT_C)[:, None] + deep[None, :]
            within = tap.hit[:, None] & has_deep[None, :]
            gradients = load_gradients(memory, located, places, within, means, CORRECT)
            gradients = gradients.to(memory.gradients_ptr.dtype.element_ty)
            known = has_deep & (tap.row < conv.KERNEL) & (tap.column < conv.KERNEL)
            first = (tap.row * conv.KERNEL + tap.column) * conv.OUT_C
            weights = tl.load(
                weights_ptr + (first + deep)[:, None] * conv.C + channel[None, :],
                mask=known[:, None] & (channel < conv.C)[None, :],
                other=0.0,
            )
            gradients = tl.reshape(gradients, [acc.shape[0], BLOCK_K])
            acc = tl.dot(gradients, weights, acc, input_precision=block.PRECISION)
    return acc


@triton.jit
def shared_products(
    located,
    folded_ptr,
    constants_ptr,
    path_tile,
    channel_tile,
    points,
    phase,
    size,
    conv: tl.constexpr,
    block: tl.constexpr,
    ALL_TAPS: tl.constexpr,
):
    """Return [PATHS, POINTS, BLOCK_N], the share of BN's means in the convolution of gradients; see `folding`.

    The PATHS gradients share x_hat. A row of products is a point, its columns the channels of one gradient after the
    other.
    """
    C: tl.constexpr = conv.C
    BLOCK_K: tl.constexpr = block.BLOCK_K
    COLUMNS: tl.constexpr = block.PATHS * block.BLOCK_N
    TAPS: tl.constexpr = (conv.KERNEL + conv.STRIDE - 1) // conv.STRIDE
    column = tl.arange(0, COLUMNS)
    path = (path_tile * block.PATHS + column // block.BLOCK_N).to(tl.int64)
    channel = channel_tile * block.BLOCK_N + column % block.BLOCK_N
    has_channel = channel < C
    waiting = Points(points.sample, points.row, points.column, points.inside & located.awaits_means)
    outputs = outputs_of(waiting, size, conv.STRIDE, conv.STRIDE)
    acc = tl.zeros([points.sample.shape[0], COLUMNS], tl.float32)
    for depth in range((conv.OUT_C + BLOCK_K - 1) // BLOCK_K):
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        has_deep = deep < conv.OUT_C
        for number in range(TAPS * TAPS):
            tap = tap_of(number, phase, outputs, size, conv, conv.STRIDE)
            x_hat = tl.load(
                located.x_hat_ptr + (tap.pixel * conv.OUT_C)[:, None] + deep[None, :],
                mask=tap.hit[:, None] & has_deep[None, :],
                other=0.0,
            )
            known = has_deep & (tap.row < conv.KERNEL) & (tap.column < conv.KERNEL)
            columns = path * (conv.KERNEL * conv.KERNEL * conv.OUT_C * C) + channel
            first = (tap.row * conv.KERNEL + tap.column) * conv.OUT_C
            weights = tl.load(
                folded_ptr + (first + deep)[:, None] * C + columns[None, :],
                mask=known[:, None] & has_channel[None, :],
                other=0.0,
            )
            acc = tl.dot(x_hat, weights, acc, input_precision=block.PRECISION)
    all_taps = tl.arange(0, ALL_TAPS)
    hits = _hits(points, all_taps, size, conv) & located.awaits_means
    hits = hits.to(tl.float32).to(constants_ptr.dtype.element_ty)
    for term in tl.static_range(2):
        columns = path * (2 * ALL_TAPS * C) + term * ALL_TAPS * C + channel
        constants = tl.load(
            constants_ptr + (all_taps * C)[:, None] + columns[None, :],
            mask=has_channel[None, :] & (all_taps < ALL_TAPS)[:, None],
            other=0.0,
        )
        acc = tl.dot(hits, constants, acc, input_precision=block.PRECISION)
    return tl.permute(tl.reshape(acc, [points.sample.shape[0], block.PATHS, block.BLOCK_N]), [1, 0, 2])


@triton.jit
def _hits(points, tap, size, conv: tl.constexpr):
    """Return bool [POINTS, taps], whether a tap connects a point to a pixel of the output."""
    PADDING: tl.constexpr = conv.KERNEL // 2
    row = points.row[:, None] + (PADDING - tap // conv.KERNEL)[None, :]
    column = points.column[:, None] + (PADDING - tap % conv.KERNEL)[None, :]
    hits = (row >= 0) & (column >= 0) & (row % conv.STRIDE == 0) & (column % conv.STRIDE == 0)
    hits = hits & (row // conv.STRIDE < size.height) & (column // conv.STRIDE < size.width)
    return hits & (tap < conv.KERNEL * conv.KERNEL)[None, :]
