"""Terms of a forward pass, in one program's tile: convolutions of normalised activations, and stores of a record."""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.tiles import behind_zeros, clamp, load_normalization


@triton.jit
def add_products(
    acc,
    x_ptr,
    weights_ptr,
    norm,
    points,
    size,
    channel,
    conv: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ``acc`` plus the convolution of relu(bn(x)), x [height, width, C]; weights [KERNEL**2, C, OUT_C]."""
    C: tl.constexpr = conv.C
    KERNEL: tl.constexpr = conv.KERNEL
    PADDING: tl.constexpr = KERNEL // 2
    first_row, first_column = points.row * conv.STRIDE, points.column * conv.STRIDE
    pixel = (points.sample * size.height + first_row) * size.width + first_column
    for depth in range((C + BLOCK_K - 1) // BLOCK_K):
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        known = deep < C
        normalization = load_normalization(norm, deep, known)
        for tap in range(KERNEL * KERNEL):
            rows, columns = tap // KERNEL - PADDING, tap % KERNEL - PADDING
            hit = points.inside & (first_row >= -rows) & (first_row < size.height - rows)
            hit = hit & (first_column >= -columns) & (first_column < size.width - columns)
            mask = hit[:, None] & known[None, :]
            places = ((pixel + (rows * size.width + columns)) * C)[:, None] + deep[None, :]
            x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, _rectified(x, normalization, norm.floor), 0.0).to(weights_ptr.dtype.element_ty)
            weights = tl.load(
                weights_ptr + (tap * C + deep)[:, None] * conv.OUT_C + channel[None, :],
                mask=known[:, None] & (channel < conv.OUT_C)[None, :],
                other=0.0,
            )
            acc = tl.dot(x, weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _rectified(x, normalization, floor):
    centred = x - normalization.mean[None, :]
    return clamp(centred * normalization.scale[None, :] + normalization.bias[None, :], floor)


@triton.jit
def load_pixels(x_ptr, points, size, channel, skip: tl.constexpr, BEFORE: tl.constexpr):
    """Return float32 [POINTS, BLOCK_N], every stride-th pixel of x [height, width, C], BEFORE zero channels in front
    of its own and 0 beyond them."""
    pixel = (points.sample * size.height + points.row * skip.STRIDE) * size.width + points.column * skip.STRIDE
    input_channel, has_channel = behind_zeros(channel, skip.C, BEFORE)
    places = (pixel * skip.C)[:, None] + input_channel[None, :]
    mask = points.inside[:, None] & has_channel[None, :]
    return tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_moments(moments_ptr, value, inside, channel, within, OUT_C: tl.constexpr):
    """Store count, mean and sum of squared deviations of each channel of a tile, [3, OUT_C]."""
    count = tl.sum(inside.to(tl.float32), 0)
    seen = tl.where(within, value.to(tl.float32), 0.0)
    mean = tl.sum(seen, 0) / count
    deviation = tl.where(within, seen - mean[None, :], 0.0)
    places = moments_ptr + channel
    tl.store(places, tl.zeros([value.shape[1]], tl.float32) + count, mask=channel < OUT_C)
    tl.store(places + OUT_C, mean, mask=channel < OUT_C)
    tl.store(places + 2 * OUT_C, tl.sum(deviation * deviation, 0), mask=channel < OUT_C)


@triton.jit
def save_input(
    x_ptr,
    bits_ptr,
    normalized_ptr,
    norm,
    points,
    size,
    part,
    conv: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store ReLU bits, and x_hat if there is memory for it, of input pixels that belong to output points.

    A program processes every PARTS-th block of BLOCK_K channels.
    """
    C: tl.constexpr = conv.C
    STRIDE: tl.constexpr = conv.STRIDE
    BYTES: tl.constexpr = (C + 7) // 8
    PHASES: tl.constexpr = STRIDE * STRIDE
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for step in range((BLOCKS + PARTS - 1) // PARTS * PHASES):
        depth, phase = step // PHASES * PARTS + part, step % PHASES
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        row, column = points.row * STRIDE + phase // STRIDE, points.column * STRIDE + phase % STRIDE
        seen = points.inside & (row < size.height) & (column < size.width)
        known = deep < C
        mask = seen[:, None] & known[None, :]
        pixel = (points.sample * size.height + row) * size.width + column
        x = tl.load(x_ptr + (pixel * C)[:, None] + deep[None, :], mask=mask, other=0.0).to(tl.float32)
        normalization = load_normalization(norm, deep, known)
        positive = (_rectified(x, normalization, norm.floor) > norm.floor) & known[None, :]
        eights = tl.reshape(positive.to(tl.int32), [x.shape[0], BLOCK_K // 8, 8])
        packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
        byte = depth * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        tl.store(
            bits_ptr + (pixel * BYTES)[:, None] + byte[None, :],
            packed.to(tl.uint8),
            mask=seen[:, None] & (byte < BYTES)[None, :],
        )
        if normalized_ptr is not None:
            x_hat = (x - normalization.mean[None, :]) * normalization.inverse_deviation[None, :]
            tl.store(
                normalized_ptr + (pixel * C)[:, None] + deep[None, :],
                x_hat.to(normalized_ptr.dtype.element_ty),
                mask=mask,
            )
