"""The weight gradient of one BN-ReLU-convolution unit.

A program owns BLOCK_M channels of the convolution's output, BLOCK_N columns of its weight (a column is a tap and a
channel of the input, so that any width fills the tile) and `span` of the batch's output points, which it multiplies
BLOCK_K at a time: incoming gradients, BN's means taken off as they are loaded, against relu(gain x_hat + bias), made
from x_hat as it is loaded. Each span leaves a result of its own; they are added in their order. Spans are no shorter
than a GPU needs to be full: a weight of 512 x 512 channels has 576 tiles, and three results of 9 MB, not a thousand.

Limits on an H100, stage 1 of a CIFAR network at batch 128: 64 ranges of 2,048 points times three tiles of columns are
192 programs; the gradient is read three times and x_hat nine, out of L1 and L2, 51 MB, from HBM once, 8.4 MB or 2.8
us; 604 MFLOP on 16 rows of 64 a tensor core takes at once, 3 us at a quarter of its rate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.configurations import FLOAT32, WGRAD, of_width
from pathnet.engines.triton.launch import launch, power_of_two_from, programs_for
from pathnet.engines.triton.network import Convolution
from pathnet.engines.triton.state import Gradients, Kept
from pathnet.engines.triton.tiles import cut_off, load_gradients, load_means, locate, quotient

__all__ = ["wgrad"]


@triton.jit(do_not_specialize=["points", "span", "state", "height", "width", "out_height", "out_width"])
def _wgrad_kernel(
    gradients_ptr,
    slot_size,
    state,
    states_ptr,
    points,
    span,
    height,
    width,
    out_height,
    out_width,
    inverse_out_height,
    inverse_out_width,
    offsets_ptr,
    normalized_ptr,
    corrections_ptr,
    corrections_width,
    input_ptr,
    gain_ptr,
    bias_ptr,
    parts_ptr,
    C: tl.constexpr,
    OUT_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CORRECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PADDING: tl.constexpr = KERNEL // 2
    COLUMNS: tl.constexpr = KERNEL * KERNEL * C
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    ROW_TILES: tl.constexpr = (OUT_C + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    channel = program % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program // ROW_TILES % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // ROW_TILES // COLUMN_TILES
    tap, given = column // C, column % C
    has_channel, has_column = channel < OUT_C, column < COLUMNS
    gain = tl.load(gain_ptr + given, mask=has_column, other=0.0)
    bias = tl.load(bias_ptr + given, mask=has_column, other=0.0)

    states = state + tl.zeros([1], tl.int32)
    live = states >= 0
    slots, waits, first = locate(states, live, slot_size, states_ptr, offsets_ptr)
    mean, mean_x_hat = 0.0, 0.0
    if CORRECT:
        mean, mean_x_hat = load_means(corrections_ptr, corrections_width, states, live & waits, channel, has_channel)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tap_row, tap_column = (tap // KERNEL - PADDING)[None, :], (tap % KERNEL - PADDING)[None, :]
    from_tap = (tap_row * width + tap_column) * C + given[None, :]
    start = part * span
    for begin in tl.range(start, start + tl.minimum(span, points - start), BLOCK_K):
        point = begin + tl.arange(0, BLOCK_K)
        mask = (point < points)[:, None] & has_channel[None, :]
        gradients = load_gradients(
            gradients_ptr,
            slots,
            point[:, None] * OUT_C + channel[None, :],
            mask[None, :, :],
            normalized_ptr + first,
            mask & waits,
            mean,
            mean_x_hat,
            CORRECT,
        ).to(gradients_ptr.dtype.element_ty)
        first_row = begin // out_width
        along = begin - first_row * out_width + tl.arange(0, BLOCK_K)
        down = quotient(along, inverse_out_width)
        first_sample = first_row // out_height
        rows = first_row - first_sample * out_height + down
        samples = quotient(rows, inverse_out_height)
        row = ((rows - samples * out_height) * STRIDE)[:, None]
        column_of = ((along - down * out_width) * STRIDE)[:, None]
        hit = (
            (row >= -tap_row)
            & (row < height - tap_row)
            & (column_of >= -tap_column)
            & (column_of < width - tap_column)
        )
        hit = hit & (point < points)[:, None] & has_column[None, :]
        at = (((first_sample + samples)[:, None] * height + row) * width + column_of) * C + from_tap
        x_hat = tl.load(input_ptr + at, mask=hit, other=0.0).to(tl.float32)
        rectified = tl.where(hit, cut_off(x_hat * gain[None, :] + bias[None, :], 0.0), 0.0)
        acc = tl.dot(
            tl.trans(tl.reshape(gradients, [BLOCK_K, BLOCK_M])),
            rectified.to(gradients_ptr.dtype.element_ty),
            acc,
            input_precision=PRECISION,
        )
    made = parts_ptr + part.to(tl.int64) * (OUT_C * COLUMNS) + (channel * COLUMNS)[:, None] + column[None, :]
    tl.store(made, acc, mask=has_channel[:, None] & has_column[None, :])


def wgrad(gradients: Gradients, kept: Kept, state: int, conv: Convolution, unit: int, affine: Tensor) -> Tensor:
    """float32 [C_out, C, kernel, kernel]: the gradient of a convolution's weight.

    Args:
        state: that of the gradient at the convolution's output.
        unit: whose BN and ReLU the convolution's input has passed.
        affine: float32 [2, C], that BN's gain and bias.
    """
    given, made = conv.given, conv.made
    tile = of_width(WGRAD, gradients.values, made.channels)
    points, columns = gradients.batch * made.pixels, conv.kernel**2 * given.channels
    rows = min(64, max(16, power_of_two_from(made.channels)))
    tiles = -(-made.channels // rows) * -(-columns // tile.channels)
    ranges = -(-programs_for(-(-points // tile.points) * tiles, affine.device) // tiles)
    span = -(-points // (ranges * tile.depth)) * tile.depth
    ranges = -(-points // span)
    parts = torch.empty(ranges, made.channels, columns, device=gradients.values.device)
    launch(
        _wgrad_kernel,
        ranges * tiles,
        tile,
        gradients.values,
        gradients.values.shape[1],
        state,
        gradients.states,
        points,
        span,
        given.height,
        given.width,
        made.height,
        made.width,
        1 / made.height,
        1 / made.width,
        kept.normalized_starts,
        kept.normalized,
        gradients.corrections,
        gradients.corrections.shape[-1],
        kept.unit_normalized(unit),
        affine[0],
        affine[1],
        parts,
        C=given.channels,
        OUT_C=made.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        CORRECT=gradients.waits,
        BLOCK_M=rows,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    whole = parts.sum(0).reshape(made.channels, conv.kernel, conv.kernel, given.channels)
    return whole.permute(0, 3, 1, 2)
