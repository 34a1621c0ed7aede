"""The weight gradient of one BN-ReLU-convolution unit.

A program takes BLOCK_M channels of the convolution's output, BLOCK_N columns of its weight (a column is a tap and a
channel of the input: any width fills the tile) and ``span`` of the batch's output points, which it multiplies
BLOCK_K at a time: incoming gradients, BN's means subtracted as they are loaded, times relu(gain x_hat + bias),
computed from x_hat as it is loaded. Each span has its own result; they are added in their order. Spans are as long as
a full GPU allows: a weight of 512 x 512 channels has 576 tiles, and three results of 9 MB, not a thousand.

Limits on an H100, computed for stage 1 of a CIFAR network at batch 128: 64 ranges of 2,048 points times three tiles
of columns are 192 programs. The gradient is read three times and x_hat nine times out of L1 and L2, 51 MB, but once
from HBM, 8.4 MB or 2.8 us. 604 MFLOP on 16 of the 64 rows that a tensor core takes at once are 3 us at a quarter of
its rate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.configurations import FLOAT32, WGRAD, of_width
from pathnet.engines.triton.launch import launch, power_of_two_from, programs_for
from pathnet.engines.triton.network import PackedConvolution
from pathnet.engines.triton.state import GradientStates, Saved
from pathnet.engines.triton.tiles import (
    ConvConstants,
    GradientMemory,
    ImageSize,
    clamp,
    load_gradients,
    load_means,
    locate,
    quotient,
)

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
    COLUMNS: tl.constexpr = KERNEL * KERNEL * C
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    ROW_TILES: tl.constexpr = (OUT_C + BLOCK_M - 1) // BLOCK_M
    conv: tl.constexpr = ConvConstants(C, OUT_C, KERNEL, STRIDE)
    size, out_size = ImageSize(height, width), ImageSize(out_height, out_width)
    memory = GradientMemory(
        gradients_ptr, slot_size, states_ptr, offsets_ptr, normalized_ptr, corrections_ptr, corrections_width
    )
    program = tl.program_id(0)
    channel = program % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program // ROW_TILES % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // ROW_TILES // COLUMN_TILES
    has_channel, has_column = channel < OUT_C, column < COLUMNS
    gain = tl.load(gain_ptr + column % C, mask=has_column, other=0.0)
    bias = tl.load(bias_ptr + column % C, mask=has_column, other=0.0)

    states = state + tl.zeros([1], tl.int32)
    located = locate(memory, states, states >= 0)
    means = load_means(memory, located, channel, has_channel, CORRECT)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = part * span
    for begin in tl.range(start, start + tl.minimum(span, points - start), BLOCK_K):
        point = begin + tl.arange(0, BLOCK_K)
        places = point[:, None] * OUT_C + channel[None, :]
        within = (point < points)[:, None] & has_channel[None, :]
        gradients = load_gradients(memory, located, places, within, means, CORRECT)
        gradients = gradients.to(gradients_ptr.dtype.element_ty)
        places, hit = _inputs(begin, column, size, out_size, inverse_out_height, inverse_out_width, conv, BLOCK_K)
        hit = hit & (point < points)[:, None] & has_column[None, :]
        x_hat = tl.load(input_ptr + places, mask=hit, other=0.0).to(tl.float32)
        rectified = tl.where(hit, clamp(x_hat * gain[None, :] + bias[None, :], 0.0), 0.0)
        gradients = tl.trans(tl.reshape(gradients, [BLOCK_K, BLOCK_M]))
        acc = tl.dot(gradients, rectified.to(gradients_ptr.dtype.element_ty), acc, input_precision=PRECISION)
    part_ptr = parts_ptr + part.to(tl.int64) * (OUT_C * COLUMNS)
    places = (channel * COLUMNS)[:, None] + column[None, :]
    tl.store(part_ptr + places, acc, mask=has_channel[:, None] & has_column[None, :])


@triton.jit
def _inputs(
    first_point,
    column,
    size,
    out_size,
    inverse_out_height,
    inverse_out_width,
    conv: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the input's elements that columns connect to output points, [BLOCK_K, BLOCK_N], and which exist."""
    PADDING: tl.constexpr = conv.KERNEL // 2
    tap = column // conv.C
    tap_row, tap_column = (tap // conv.KERNEL - PADDING)[None, :], (tap % conv.KERNEL - PADDING)[None, :]
    from_tap = (tap_row * size.width + tap_column) * conv.C + (column % conv.C)[None, :]
    first_row = first_point // out_size.width
    along = first_point - first_row * out_size.width + tl.arange(0, BLOCK_K)
    down = quotient(along, inverse_out_width)
    first_sample = first_row // out_size.height
    rows = first_row - first_sample * out_size.height + down
    samples = quotient(rows, inverse_out_height)
    row = ((rows - samples * out_size.height) * conv.STRIDE)[:, None]
    image_column = ((along - down * out_size.width) * conv.STRIDE)[:, None]
    hit = (row >= -tap_row) & (row < size.height - tap_row)
    hit = hit & (image_column >= -tap_column) & (image_column < size.width - tap_column)
    pixel = ((first_sample + samples)[:, None] * size.height + row) * size.width + image_column
    return pixel * conv.C + from_tap, hit


def wgrad(
    gradients: GradientStates, saved: Saved, state: int, conv: PackedConvolution, unit: int, affine: Tensor
) -> Tensor:
    """Return float32 [C_out, C, kernel, kernel], the gradient of a convolution's weight.

    Args:
        state: state of the gradient at the convolution's output.
        unit: unit whose BN and ReLU precede the convolution.
        affine: float32 [2, C], gain and bias of that BN.
    """
    inputs, outputs = conv.input, conv.output
    tile = of_width(WGRAD, gradients.values, outputs.channels)
    points, columns = gradients.batch * outputs.pixels, conv.kernel**2 * inputs.channels
    rows = min(64, max(16, power_of_two_from(outputs.channels)))
    tiles = -(-outputs.channels // rows) * -(-columns // tile.channels)
    ranges = -(-programs_for(-(-points // tile.points) * tiles, affine.device) // tiles)
    span = -(-points // (ranges * tile.depth)) * tile.depth
    ranges = -(-points // span)
    parts = torch.empty(ranges, outputs.channels, columns, device=gradients.values.device)
    launch(
        _wgrad_kernel,
        ranges * tiles,
        tile,
        gradients_ptr=gradients.values,
        slot_size=gradients.values.shape[1],
        state=state,
        states_ptr=gradients.states,
        points=points,
        span=span,
        height=inputs.height,
        width=inputs.width,
        out_height=outputs.height,
        out_width=outputs.width,
        inverse_out_height=1 / outputs.height,
        inverse_out_width=1 / outputs.width,
        offsets_ptr=saved.normalized_starts,
        normalized_ptr=saved.normalized,
        corrections_ptr=gradients.corrections,
        corrections_width=gradients.corrections.shape[-1],
        input_ptr=saved.unit_normalized(unit),
        gain_ptr=affine[0],
        bias_ptr=affine[1],
        parts_ptr=parts,
        C=inputs.channels,
        OUT_C=outputs.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        CORRECT=gradients.by_batch,
        BLOCK_M=rows,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    gradient = parts.sum(0).reshape(outputs.channels, conv.kernel, conv.kernel, inputs.channels)
    return gradient.permute(0, 3, 1, 2)
