"""Terms of the input gradient, in one program's tile: through the residual module's unit, and through the skip."""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.products import Phase, shared_products, transposed_products
from pathnet.engines.triton.tiles import load_gradients, load_means, locate, power_of_two, shift_of


@triton.jit
def rescaling(
    largest_ptr, exponents_ptr, entered, target, live, sample, batch, EXIT: tl.constexpr, PER_SAMPLE: tl.constexpr
):
    """Return float32 [PATHS, POINTS], powers of two that rescale the gradients at a block's output.

    Memory holds those gradients unscaled; the factors apply to terms that are linear in them. Where the backward pass
    leaves a block, the exponents of the new states are stored.
    """
    slot = sample if PER_SAMPLE else sample * 0
    slots = batch if PER_SAMPLE else 1
    places = (tl.maximum(entered, 0).to(tl.int64) * slots)[:, None] + slot[None, :]
    known = live[:, None] & (sample < batch)[None, :]
    shift = shift_of(tl.load(largest_ptr + places, mask=known, other=0))
    factor = power_of_two(-shift)
    if EXIT:
        target_places = (tl.maximum(target, 0).to(tl.int64) * slots)[:, None] + slot[None, :]
        exponent = tl.load(exponents_ptr + places, mask=known, other=0) + shift
        tl.store(exponents_ptr + target_places, exponent, mask=known)
    return factor


@triton.jit
def residual_gradients(
    memory,
    source,
    live,
    weights_ptr,
    folded_ptr,
    constants_ptr,
    path_tile,
    channel_tile,
    points,
    phase,
    size,
    channel,
    conv: tl.constexpr,
    block: tl.constexpr,
    CORRECT: tl.constexpr,
    FOLDED: tl.constexpr,
    ALL_TAPS: tl.constexpr,
):
    """Return float32 [PATHS, POINTS, BLOCK_N], gradients of ``source`` through the unit's transposed convolution.

    With FOLDED, a second product subtracts BN's means; with CORRECT alone, the gradients are corrected as loaded.
    """
    POINTS: tl.constexpr = points.sample.shape[0]
    located = locate(memory, source, live)
    acc = tl.zeros([block.PATHS * POINTS, block.BLOCK_N], tl.float32)
    corrects: tl.constexpr = CORRECT and not FOLDED
    acc = transposed_products(
        acc, memory, located, weights_ptr, points, phase, size, channel, conv, block, conv.STRIDE, corrects
    )
    value = tl.reshape(acc, [block.PATHS, POINTS, block.BLOCK_N])
    if FOLDED:
        # Located again, since keeping the locations would take registers during the first product.
        located = locate(memory, source, live)
        value += shared_products(
            located, folded_ptr, constants_ptr, path_tile, channel_tile, points, phase, size, conv, block, ALL_TAPS
        )
    return value


@triton.jit
def projected_gradients(
    memory,
    entered,
    live,
    projection_ptr,
    points,
    size,
    channel,
    projection: tl.constexpr,
    block: tl.constexpr,
    CORRECT: tl.constexpr,
):
    """Return float32 [PATHS, POINTS, BLOCK_N], gradients of ``entered`` through the projection's transpose."""
    POINTS: tl.constexpr = points.sample.shape[0]
    located = locate(memory, entered, live)
    acc = tl.zeros([block.PATHS * POINTS, block.BLOCK_N], tl.float32)
    acc = transposed_products(
        acc, memory, located, projection_ptr, points, Phase(0, 0), size, channel, projection, block, 1, CORRECT
    )
    return tl.reshape(acc, [block.PATHS, POINTS, block.BLOCK_N])


@triton.jit
def direct_gradients(
    memory, entered, live, points, size, channel, skip: tl.constexpr, BEFORE: tl.constexpr, CORRECT: tl.constexpr
):
    """Return [PATHS, POINTS, BLOCK_N], gradients of ``entered`` [height, width] at every stride-th pixel, else 0.

    There a channel stands behind the BEFORE zero channels that the skip adds in front.
    """
    pixel = (points.sample * size.height + points.row // skip.STRIDE) * size.width + points.column // skip.STRIDE
    meets = points.inside & (points.row % skip.STRIDE == 0) & (points.column % skip.STRIDE == 0)
    has_channel = (channel < skip.C) & (channel < skip.OUT_C - BEFORE)
    channel += BEFORE
    located = locate(memory, entered, live)
    means = load_means(memory, located, channel, has_channel, CORRECT)
    places = (pixel * skip.OUT_C)[:, None] + channel[None, :]
    return load_gradients(memory, located, places, meets[:, None] & has_channel[None, :], means, CORRECT)
