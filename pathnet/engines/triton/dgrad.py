"""The input gradient of one BN-ReLU-convolution unit, for many gradients at once, with routing.

A tile is PATHS gradients at SAMPLES * PIXELS points of the unit's input and BLOCK_N of its channels: an implicit
matrix product of PATHS * SAMPLES * PIXELS rows, and for every tap of the kernel BLOCK_K channels of the incoming
gradient at a time. Weights, ReLU bits and x_hat are read once for the PATHS gradients; tiles that differ in their
gradients alone stand side by side, so that others find them in L2. With a stride, the points of a tile are of one
phase (row and column modulo the stride), which leaves out the taps that meet none of its pixels.

How many rows a launch has is known on the device alone, so that one captured graph serves every set of paths: a
program takes one tile after the other, a grid apart, until there are no more. Left to itself the compiler hoists out
of that loop what each layout knows of its points, 213 to 255 registers where 2 to 4 programs had room on a
multiprocessor; without hoisting it takes 160 to 250. Programs beyond the last row that leave at once would take as
few, but half the grid of a launch with room for 55 rows and 28 in it is 14,000 programs, reckoned 38 us.

What BN does to a gradient takes two means over the whole batch, known only when every program of a launch is done.
So a program stores ``scale * bit * (J_conv^T g)``, and its share of the two sums beside it; whoever reads that
gradient takes the means off: on loading (`tiles.load_gradients`), or, where a convolution reads it once a tap, by a
second product (`folding`). Each gradient is read and written once a convolution.

Limits on an H100, reckoned and not yet measured. Stage 1 of a CIFAR network (16 channels, side 32, batch 128) has
2.1 M values a gradient and 604 MFLOP a convolution: bf16 in and out are 8.4 MB, 2.8 us at 3 TB/s; the products 1.5 us
at 400 TFLOP/s (half the rate: 16 columns leave tensor cores waiting for operands). By the compiler's own code 128
rows of a tile take some 800 instructions a warp in BN mode ``running`` and 1,300 in ``batch``; at one a clock and
scheduler that is 3.5 us and 5.8 us. Issue slots bound it, then memory; stages 2 and 3 take half and a quarter. Of the
instructions a seventh is for sides that are known at run time alone: kernels are compiled for channels, kernel and
stride, and serve images of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import DGRAD, FLOAT32, STRIDED, of_width
from pathnet.engines.triton.folding import fold_means, taps_of
from pathnet.engines.triton.launch import Tile, launch, programs_for
from pathnet.engines.triton.network import Convolution, FusedBlock
from pathnet.engines.triton.plan import Launch
from pathnet.engines.triton.products import shared_products, transposed_products
from pathnet.engines.triton.state import Gradients, Kept
from pathnet.engines.triton.sums import take_means
from pathnet.engines.triton.tiles import (
    DIRECT,
    NO_SKIP,
    PROJECTION,
    ROW_FIELDS,
    STATE_FIELDS,
    load_gradients,
    load_means,
    locate,
    points_of,
    power_of_two,
    shift_of,
)

__all__ = ["dgrad", "dgrad_point_tiles", "dgrad_tile"]


@triton.jit(
    do_not_specialize=[
        "batch",
        "unit",
        "point_tiles",
        "pixel_tiles",
        "phase_height",
        "phase_width",
        "height",
        "width",
        "out_height",
        "out_width",
        "skip_height",
        "skip_width",
    ],
    do_not_specialize_on_alignment=["launch_ptr"],
)
def _dgrad_kernel(
    gradients_ptr,
    slot_size,
    rows_ptr,
    launch_ptr,
    states_ptr,
    batch,
    point_tiles,
    pixel_tiles,
    phase_height,
    phase_width,
    inverse_phase_width,
    height,
    width,
    out_height,
    out_width,
    skip_height,
    skip_width,
    weights_ptr,
    projection_ptr,
    scales_ptr,
    bits_ptr,
    normalized_ptr,
    offsets_ptr,
    corrections_ptr,
    corrections_width,
    sums_ptr,
    folded_ptr,
    constants_ptr,
    largest_ptr,
    exponents_ptr,
    unit,
    C: tl.constexpr,
    OUT_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SKIP: tl.constexpr,
    SKIP_C: tl.constexpr,
    SKIP_STRIDE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ENTRY: tl.constexpr,
    EXIT: tl.constexpr,
    SUMS: tl.constexpr,
    CORRECT: tl.constexpr,
    FOLDED: tl.constexpr,
    TAPS_KEPT: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    PATHS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PHASES: tl.constexpr = STRIDE
    POINTS: tl.constexpr = SAMPLES * PIXELS
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    path_tiles = tl.load(launch_ptr + 1) // PATHS

    tiles = path_tiles * CHANNEL_TILES * point_tiles
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        path_tile = program % path_tiles
        channel_tile = program // path_tiles % CHANNEL_TILES
        point_tile = program // path_tiles // CHANNEL_TILES
        phase = point_tile % (PHASES * PHASES)
        sample, row, column, inside = points_of(
            point_tile // (PHASES * PHASES),
            batch,
            phase_height,
            phase_width,
            inverse_phase_width,
            pixel_tiles,
            SAMPLES,
            PIXELS,
        )
        row, column = row * PHASES + phase // PHASES, column * PHASES + phase % PHASES
        inside = inside & (row < height) & (column < width)
        channel = channel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        has_channel = channel < C

        path = path_tile * PATHS + tl.arange(0, PATHS)
        fields = rows_ptr + path * ROW_FIELDS
        source, target, block = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        live = target >= 0

        # A block's gradient lies there unscaled: what is linear in it takes its power of two on the way.
        factor = tl.full([PATHS, POINTS], 1.0, tl.float32)
        if ENTRY or EXIT:
            slot = sample if PER_SAMPLE else sample * 0
            slots = batch if PER_SAMPLE else 1
            places = (tl.maximum(block, 0).to(tl.int64) * slots)[:, None] + slot[None, :]
            known = live[:, None] & (sample < batch)[None, :]
            shift = shift_of(tl.load(largest_ptr + places, mask=known, other=0))
            factor = power_of_two(-shift)
            if EXIT:
                own_places = (tl.maximum(target, 0).to(tl.int64) * slots)[:, None] + slot[None, :]
                exponent = tl.load(exponents_ptr + places, mask=known, other=0) + shift
                tl.store(exponents_ptr + own_places, exponent, mask=known)

        value = tl.zeros([PATHS, POINTS, BLOCK_N], tl.float32)
        if RESIDUAL:
            products = transposed_products(
                tl.zeros([PATHS * POINTS, BLOCK_N], tl.float32),
                gradients_ptr,
                slot_size,
                weights_ptr,
                source,
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
                phase // PHASES,
                phase % PHASES,
                channel,
                out_height,
                out_width,
                C,
                OUT_C,
                KERNEL,
                STRIDE,
                PHASES,
                CORRECT and not FOLDED,
                BLOCK_K,
                PRECISION,
            )
            value = tl.reshape(products, [PATHS, POINTS, BLOCK_N])
            if FOLDED:
                _, waits, first = locate(source, live, slot_size, states_ptr, offsets_ptr)
                value += shared_products(
                    normalized_ptr + first,
                    folded_ptr,
                    constants_ptr,
                    path_tile * PATHS,
                    waits,
                    sample,
                    row,
                    column,
                    inside,
                    phase // PHASES,
                    phase % PHASES,
                    channel_tile * BLOCK_N,
                    out_height,
                    out_width,
                    C,
                    OUT_C,
                    KERNEL,
                    STRIDE,
                    PATHS,
                    TAPS_KEPT,
                    BLOCK_N,
                    BLOCK_K,
                    PRECISION,
                )
            if EXIT:
                value *= tl.load(fields + 4).to(tl.float32, bitcast=True)[:, None, None]
            if ENTRY:
                value *= factor[:, :, None]
        if EXIT:
            a = tl.load(fields + 3).to(tl.float32, bitcast=True)
            factor *= a[:, None]
            taken = live & (a != 0)
        if SKIP == PROJECTION:
            products = transposed_products(
                tl.zeros([PATHS * POINTS, BLOCK_N], tl.float32),
                gradients_ptr,
                slot_size,
                projection_ptr,
                block,
                taken,
                states_ptr,
                offsets_ptr,
                normalized_ptr,
                corrections_ptr,
                corrections_width,
                sample,
                row,
                column,
                inside,
                0,
                0,
                channel,
                skip_height,
                skip_width,
                C,
                SKIP_C,
                1,
                SKIP_STRIDE,
                1,
                CORRECT,
                BLOCK_K,
                PRECISION,
            )
            value += tl.reshape(products, [PATHS, POINTS, BLOCK_N]) * factor[:, :, None]

        within = inside[:, None] & has_channel[None, :]
        pixel = (sample * height + row) * width + column
        if RESIDUAL or SKIP == PROJECTION or ACTIVATED:
            byte = tl.load(
                bits_ptr + (pixel * ((C + 7) // 8))[:, None] + (channel // 8)[None, :], mask=within, other=0
            ).to(tl.int32)
            passes = (byte >> (channel % 8)[None, :] & 1 != 0)[None, :, :]
            value = tl.where(passes, value, 0.0)
        if SUMS:
            x_hat = tl.load(
                normalized_ptr
                + tl.multiple_of(tl.load(offsets_ptr + unit), 16)
                + (pixel * C)[:, None]
                + channel[None, :],
                mask=within,
                other=0.0,
            ).to(tl.float32)
            own = sums_ptr + ((path.to(tl.int64) * point_tiles + point_tile) * (2 * C))[:, None] + channel[None, :]
            given = live[:, None] & has_channel[None, :]
            tl.store(own, tl.sum(value, 1), mask=given)
            tl.store(own + C, tl.sum(value * x_hat[None, :, :], 1), mask=given)
        if RESIDUAL or SKIP == PROJECTION:
            value *= tl.load(scales_ptr + channel, mask=has_channel, other=0.0)[None, None, :]
        if SKIP == DIRECT:
            met = inside & (row % SKIP_STRIDE == 0) & (column % SKIP_STRIDE == 0)
            at = ((sample * skip_height + row // SKIP_STRIDE) * skip_width + column // SKIP_STRIDE) * SKIP_C
            slots, waits, first = locate(block, taken, slot_size, states_ptr, offsets_ptr)
            has_skip = has_channel & (channel < SKIP_C)
            mean, mean_x_hat = 0.0, 0.0
            if CORRECT:
                mean, mean_x_hat = load_means(
                    corrections_ptr, corrections_width, block, taken & waits, channel, has_skip
                )
            skip_mask = met[:, None] & has_skip[None, :]
            skipped = load_gradients(
                gradients_ptr,
                slots,
                at[:, None] + channel[None, :],
                taken[:, None, None] & skip_mask[None, :, :],
                normalized_ptr + first,
                skip_mask & waits,
                mean,
                mean_x_hat,
                CORRECT,
            )
            if ACTIVATED:
                skipped = tl.where(passes, skipped, 0.0)
            value += skipped * factor[:, :, None]

        mask = live[:, None, None] & within[None, :, :]
        slots = tl.load(states_ptr + tl.maximum(target, 0) * STATE_FIELDS).to(tl.int64) * slot_size
        places = slots[:, None, None] + ((pixel * C)[:, None] + channel[None, :])[None, :, :]
        tl.store(gradients_ptr + places, value.to(gradients_ptr.dtype.element_ty), mask=mask)
        if EXIT:
            sizes = tl.where(mask, tl.abs(value), 0.0)
            if PER_SAMPLE:
                first = tl.arange(0, SAMPLES)
                own_sample = point_tile // (PHASES * PHASES) // pixel_tiles * SAMPLES + first
                largest = tl.max(tl.reshape(sizes, [PATHS, SAMPLES, PIXELS * BLOCK_N]), 2)
                own = (tl.maximum(target, 0).to(tl.int64) * batch)[:, None] + own_sample[None, :]
                known = live[:, None] & (own_sample < batch)[None, :]
            else:
                largest = tl.max(tl.reshape(sizes, [PATHS, POINTS * BLOCK_N]), 1)
                own, known = tl.maximum(target, 0), live
            tl.atomic_max(largest_ptr + own, largest.to(tl.int32, bitcast=True), mask=known, sem="relaxed")


def dgrad_tile(conv: Convolution) -> Tile:
    """The tile for gradients of a convolution's input, in the type of its transposed weights."""
    return of_width(DGRAD if conv.stride == 1 else STRIDED, conv.transposed, conv.given.channels)


def dgrad_point_tiles(conv: Convolution, batch: int) -> int:
    """How many tiles hold all pixels of the input, phase after phase."""
    given, stride = conv.given, conv.stride
    pixels = -(-given.height // stride) * -(-given.width // stride)
    return stride * stride * dgrad_tile(conv).point_tiles(batch, pixels)


def dgrad(gradients: Gradients, kept: Kept, block: FusedBlock, task: Launch) -> None:
    """Takes the states of a launch's rows through one unit of a block, and at the block's entrance through its skip.

    Where sums are wanted, the means of what was made are in ``gradients.corrections`` afterwards.
    """
    conv, projection, unit = block.convolutions[task.unit], block.projection, block.first + task.unit
    given, made, tile = conv.given, conv.made, dgrad_tile(conv)
    at_exit = task.unit == 0
    skip, skip_made = NO_SKIP, made
    if at_exit and task.skip:
        skip, skip_made = (PROJECTION if projection is not None else DIRECT), block.made
    # Post-activation blocks begin with a ReLU alone.
    begins_with_bn = not (at_exit and block.activated)
    has_sums = begins_with_bn and gradients.sums.numel() > 0 and (task.residual or skip == PROJECTION)
    phase_height, phase_width = -(-given.height // conv.stride), -(-given.width // conv.stride)
    samples, pixels = tile.split(phase_height * phase_width)
    tiles, path_tiles = dgrad_point_tiles(conv, gradients.batch), task.count // tile.paths
    folded = gradients.waits and task.residual and conv.kernel > 1
    if folded:
        fold_means(gradients, conv, task)
    launch(
        _dgrad_kernel,
        programs_for(path_tiles * -(-given.channels // tile.channels) * tiles, gradients.values.device),
        tile,
        gradients.values,
        gradients.values.shape[1],
        gradients.rows,
        gradients.launches[task.index],
        gradients.states,
        gradients.batch,
        tiles,
        -(-phase_height * phase_width // pixels),
        phase_height,
        phase_width,
        1 / phase_width,
        given.height,
        given.width,
        made.height,
        made.width,
        skip_made.height,
        skip_made.width,
        conv.transposed,
        conv.transposed if projection is None else projection.transposed,
        kept.scales[unit],
        kept.unit_bits(unit),
        kept.normalized,
        kept.normalized_starts,
        gradients.corrections,
        gradients.corrections.shape[-1],
        gradients.sums,
        gradients.folded,
        gradients.constants,
        gradients.largest,
        gradients.exponents,
        unit,
        C=given.channels,
        OUT_C=made.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        SKIP=skip.value,
        SKIP_C=skip_made.channels,
        SKIP_STRIDE=1 if skip is NO_SKIP else block.stride,
        ACTIVATED=block.activated and skip is DIRECT,
        RESIDUAL=task.residual,
        ENTRY=task.unit == len(block.convolutions) - 1 and not block.ends,
        EXIT=at_exit,
        SUMS=has_sums,
        CORRECT=gradients.waits,
        FOLDED=folded,
        TAPS_KEPT=taps_of(conv),
        PER_SAMPLE=gradients.per_sample,
        PATHS=tile.paths,
        SAMPLES=samples,
        PIXELS=pixels,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    if has_sums and gradients.waits:
        take_means(gradients, task, tiles, kept.scales[unit], given.channels, given.pixels)
