"""The weight gradient of one BN-ReLU-convolution unit.

A program owns BLOCK_M channels of the convolution's output, BLOCK_N columns of its weight (a column is a tap and a
channel of the input, so that any width fills the tile) and a range of the batch's output points, which it multiplies
BLOCK_K at a time: incoming gradients, BN's means taken off as they are loaded, against relu(gain x_hat + bias), made
from x_hat as it is loaded. Each range leaves a result of its own; they are added in their order.

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
from pathnet.engines.triton.launch import launch, power_of_two_from
from pathnet.engines.triton.network import Convolution
from pathnet.engines.triton.state import Gradients, Kept
from pathnet.engines.triton.tiles import cut_off, load_gradients, load_means, locate

__all__ = ["wgrad"]


@triton.jit(do_not_specialize=["points", "state"])
def _wgrad_kernel(
    gradients_ptr,
    slot_size,
    state,
    states_ptr,
    points,
    offsets_ptr,
    normalized_ptr,
    corrections_ptr,
    corrections_width,
    input_ptr,
    gain_ptr,
    bias_ptr,
    parts_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    OUT_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CORRECT: tl.constexpr,
    RANGE: tl.constexpr,
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
    for step in range(RANGE // BLOCK_K):
        point = part * RANGE + step * BLOCK_K + tl.arange(0, BLOCK_K)
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
        row = (point // OUT_W % OUT_H * STRIDE - PADDING)[:, None] + (tap // KERNEL)[None, :]
        own_column = (point % OUT_W * STRIDE - PADDING)[:, None] + (tap % KERNEL)[None, :]
        sample = (point // (OUT_H * OUT_W))[:, None]
        hit = (row >= 0) & (row < H) & (own_column >= 0) & (own_column < W)
        hit = hit & (point < points)[:, None] & has_column[None, :]
        at = ((sample * H + row) * W + own_column) * C + given[None, :]
        x_hat = tl.load(input_ptr + at, mask=hit, other=0.0).to(tl.float32)
        rectified = tl.where(hit, cut_off(x_hat * gain[None, :] + bias[None, :], 0.0), 0.0)
        acc = tl.dot(
            tl.trans(tl.reshape(gradients, [BLOCK_K, BLOCK_M])),
            rectified.to(gradients_ptr.dtype.element_ty),
            acc,
            input_precision=PRECISION,
        )
    made = parts_ptr + (part * OUT_C + channel)[:, None] * COLUMNS + column[None, :]
    tl.store(made, acc, mask=has_channel[:, None] & has_column[None, :])


def wgrad(gradients: Gradients, kept: Kept, state: int, conv: Convolution, unit: int, affine: Tensor) -> Tensor:
    """float32 [C_out, C, kernel, kernel]: the gradient of a convolution's weight.

    Args:
        state: that of the gradient at the convolution's output.
        unit: whose BN and ReLU the convolution's input has passed.
        affine: float32 [2, C], that BN's gain and bias.
    """
    given, made = conv.given, conv.made
    tile = of_width(WGRAD, gradients.values.dtype, made.channels)
    points, columns = gradients.batch * made.pixels, conv.kernel**2 * given.channels
    rows = min(64, max(16, power_of_two_from(made.channels)))
    ranges = -(-points // tile.points)
    parts = torch.empty(ranges, made.channels, columns, device=gradients.values.device)
    launch(
        _wgrad_kernel,
        ranges * -(-made.channels // rows) * -(-columns // tile.channels),
        tile,
        gradients.values,
        gradients.values.shape[1],
        state,
        gradients.states,
        points,
        kept.normalized_starts,
        kept.normalized,
        gradients.corrections,
        gradients.corrections.shape[-1],
        kept.unit_normalized(unit),
        affine[0],
        affine[1],
        parts,
        H=given.height,
        W=given.width,
        C=given.channels,
        OUT_H=made.height,
        OUT_W=made.width,
        OUT_C=made.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        CORRECT=gradients.waits,
        RANGE=tile.points,
        BLOCK_M=rows,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    whole = parts.sum(0).reshape(made.channels, conv.kernel, conv.kernel, given.channels)
    return whole.permute(0, 3, 1, 2)
