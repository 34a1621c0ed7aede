"""Transposed convolutions as products of matrices, in terms of one program's tile: what `dgrad` is made of."""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.tiles import load_gradients, load_means, locate


@triton.jit
def transposed_products(
    acc,
    gradients_ptr,
    slot_size,
    weights_ptr,
    states,
    live,
    states_ptr,
    offsets_ptr,
    normalized_ptr,
    corrections_ptr,
    corrections_width,
    sample,
    row,
    column,
    inside,
    phase_row,
    phase_column,
    channel,
    out_height,
    out_width,
    C: tl.constexpr,
    OUT_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PHASES: tl.constexpr,
    CORRECT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` and the transposed convolution of gradients [out_height, out_width, OUT_C].

    Weights are [KERNEL**2, OUT_C, C].

    Args:
        phase_row, phase_column: of all the points' rows and columns, modulo PHASES.
    """
    PADDING: tl.constexpr = KERNEL // 2
    TAPS: tl.constexpr = (KERNEL + PHASES - 1) // PHASES
    slots, waits, first = locate(states, live, slot_size, states_ptr, offsets_ptr)
    # A tap's pixel lies as far from the first as a tap's of any other point of the same phase.
    if PHASES < STRIDE:
        inside = inside & (row % STRIDE == 0) & (column % STRIDE == 0)
    first_row, first_column = row // STRIDE, column // STRIDE
    pixel = (sample * out_height + first_row) * out_width + first_column
    for depth in range((OUT_C + BLOCK_K - 1) // BLOCK_K):
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        has_deep = deep < OUT_C
        mean, mean_x_hat = 0.0, 0.0
        if CORRECT:
            mean, mean_x_hat = load_means(corrections_ptr, corrections_width, states, live & waits, deep, has_deep)
        for tap in range(TAPS * TAPS):
            tap_row = (phase_row + PADDING) % PHASES + (tap // TAPS) * PHASES
            tap_column = (phase_column + PADDING) % PHASES + (tap % TAPS) * PHASES
            rows, columns = (phase_row + PADDING - tap_row) // STRIDE, (phase_column + PADDING - tap_column) // STRIDE
            hit = inside & (first_row >= -rows) & (first_row < out_height - rows)
            hit = hit & (first_column >= -columns) & (first_column < out_width - columns)
            mask = hit[:, None] & has_deep[None, :]
            gradients = load_gradients(
                gradients_ptr,
                slots,
                ((pixel + (rows * out_width + columns)) * OUT_C)[:, None] + deep[None, :],
                live[:, None, None] & mask[None, :, :],
                normalized_ptr + first,
                mask & waits,
                mean,
                mean_x_hat,
                CORRECT,
            ).to(gradients_ptr.dtype.element_ty)
            known = has_deep & (tap_row < KERNEL) & (tap_column < KERNEL)
            weights = tl.load(
                weights_ptr + ((tap_row * KERNEL + tap_column) * OUT_C + deep)[:, None] * C + channel[None, :],
                mask=known[:, None] & (channel < C)[None, :],
                other=0.0,
            )
            acc = tl.dot(tl.reshape(gradients, [acc.shape[0], BLOCK_K]), weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def shared_products(
    x_hat_ptr,
    folded_ptr,
    constants_ptr,
    first_path,
    waits,
    sample,
    row,
    column,
    inside,
    phase_row,
    phase_column,
    first_channel,
    out_height,
    out_width,
    C: tl.constexpr,
    OUT_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PATHS: tl.constexpr,
    TAPS_KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[PATHS, POINTS, BLOCK_N]: what BN's means take off the convolution of PATHS gradients that share x_hat;
    `folding`.

    A row of products is a point, its columns the channels of one gradient after the other.
    """
    PADDING: tl.constexpr = KERNEL // 2
    TAPS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    column_of = tl.arange(0, PATHS * BLOCK_N)
    path = (first_path + column_of // BLOCK_N).to(tl.int64)
    channel = first_channel + column_of % BLOCK_N
    has_channel = channel < C
    first_row, first_column = row // STRIDE, column // STRIDE
    pixel = (sample * out_height + first_row) * out_width + first_column
    inside = inside & waits
    acc = tl.zeros([sample.shape[0], PATHS * BLOCK_N], tl.float32)
    for depth in range((OUT_C + BLOCK_K - 1) // BLOCK_K):
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        has_deep = deep < OUT_C
        for tap in range(TAPS * TAPS):
            tap_row = (phase_row + PADDING) % STRIDE + (tap // TAPS) * STRIDE
            tap_column = (phase_column + PADDING) % STRIDE + (tap % TAPS) * STRIDE
            rows, columns = (phase_row + PADDING - tap_row) // STRIDE, (phase_column + PADDING - tap_column) // STRIDE
            hit = inside & (first_row >= -rows) & (first_row < out_height - rows)
            hit = hit & (first_column >= -columns) & (first_column < out_width - columns)
            at = (pixel + (rows * out_width + columns)) * OUT_C
            x_hat = tl.load(x_hat_ptr + at[:, None] + deep[None, :], mask=hit[:, None] & has_deep[None, :], other=0.0)
            known = has_deep & (tap_row < KERNEL) & (tap_column < KERNEL)
            own = path * (KERNEL * KERNEL * OUT_C * C) + channel
            weights = tl.load(
                folded_ptr + ((tap_row * KERNEL + tap_column) * OUT_C + deep)[:, None] * C + own[None, :],
                mask=known[:, None] & has_channel[None, :],
                other=0.0,
            )
            acc = tl.dot(x_hat, weights, acc, input_precision=PRECISION)
    tap = tl.arange(0, TAPS_KEPT)
    to_row = row[:, None] + (PADDING - tap // KERNEL)[None, :]
    to_column = column[:, None] + (PADDING - tap % KERNEL)[None, :]
    hits = (to_row >= 0) & (to_column >= 0) & (to_row % STRIDE == 0) & (to_column % STRIDE == 0)
    hits = (
        hits & (to_row // STRIDE < out_height) & (to_column // STRIDE < out_width) & (tap < KERNEL * KERNEL)[None, :]
    )
    hits = (hits & waits).to(tl.float32).to(constants_ptr.dtype.element_ty)
    for term in tl.static_range(2):
        own = path * (2 * TAPS_KEPT * C) + term * TAPS_KEPT * C + channel
        constants = tl.load(
            constants_ptr + (tap * C)[:, None] + own[None, :],
            mask=has_channel[None, :] & (tap < TAPS_KEPT)[:, None],
            other=0.0,
        )
        acc = tl.dot(hits, constants, acc, input_precision=PRECISION)
    return tl.permute(tl.reshape(acc, [sample.shape[0], PATHS, BLOCK_N]), [1, 0, 2])
