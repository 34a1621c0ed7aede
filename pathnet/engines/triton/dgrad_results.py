"""The last steps of the input gradient, in one program's tile: BN-ReLU backward, BN's sums, and stores."""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.tiles import STATE_FIELDS


@triton.jit
def relu_passes(bits_ptr, pixel, channel, within, C: tl.constexpr):
    """Return bool [1, POINTS, BLOCK_N], where the recorded ReLU lets a gradient pass."""
    byte = tl.load(bits_ptr + (pixel * ((C + 7) // 8))[:, None] + (channel // 8)[None, :], mask=within, other=0)
    return (byte.to(tl.int32) >> (channel % 8)[None, :] & 1 != 0)[None, :, :]


@triton.jit
def store_sums(
    sums_ptr, value, x_hat_ptr, path, live, point_tile, point_tiles, pixel, channel, within, C: tl.constexpr
):
    """Store the tile's share of BN's two sums, of the gradients and of their products with the unit's x_hat."""
    x_hat = tl.load(x_hat_ptr + (pixel * C)[:, None] + channel[None, :], mask=within, other=0.0).to(tl.float32)
    places = sums_ptr + ((path.to(tl.int64) * point_tiles + point_tile) * (2 * C))[:, None] + channel[None, :]
    mask = live[:, None] & (channel < C)[None, :]
    tl.store(places, tl.sum(value, 1), mask=mask)
    tl.store(places + C, tl.sum(value * x_hat[None, :, :], 1), mask=mask)


@triton.jit
def store_gradients(memory, target, value, pixel, channel, mask, C: tl.constexpr):
    """Store the gradients of the target states."""
    starts = tl.load(memory.states_ptr + tl.maximum(target, 0) * STATE_FIELDS).to(tl.int64) * memory.slot_size
    places = starts[:, None, None] + ((pixel * C)[:, None] + channel[None, :])[None, :, :]
    tl.store(memory.gradients_ptr + places, value.to(memory.gradients_ptr.dtype.element_ty), mask=mask)


@triton.jit
def update_largest(
    largest_ptr, target, live, magnitudes, first_sample, batch, SAMPLES: tl.constexpr, PER_SAMPLE: tl.constexpr
):
    """Update the target states' largest magnitudes, of each sample or of the whole batch.

    Args:
        magnitudes: [PATHS, POINTS, BLOCK_N], 0 where nothing is stored.
    """
    PATHS: tl.constexpr = magnitudes.shape[0]
    SIZE: tl.constexpr = magnitudes.shape[1] * magnitudes.shape[2]
    if PER_SAMPLE:
        sample = first_sample + tl.arange(0, SAMPLES)
        largest = tl.max(tl.reshape(magnitudes, [PATHS, SAMPLES, SIZE // SAMPLES]), 2)
        places = (tl.maximum(target, 0).to(tl.int64) * batch)[:, None] + sample[None, :]
        known = live[:, None] & (sample < batch)[None, :]
    else:
        largest = tl.max(tl.reshape(magnitudes, [PATHS, SIZE]), 1)
        places, known = tl.maximum(target, 0), live
    tl.atomic_max(largest_ptr + places, largest.to(tl.int32, bitcast=True), mask=known, sem="relaxed")
