"""The input gradient of one BN-ReLU-convolution unit, for many gradients at once, with routing.

A tile is PATHS gradients at SAMPLES * PIXELS points of the unit's input and BLOCK_N of its channels: an implicit
matrix product with PATHS * SAMPLES * PIXELS rows that takes, for every tap of the kernel, BLOCK_K channels of the
incoming gradient at a time. Weights, ReLU bits and x_hat are read once for the PATHS gradients. Tiles that differ
only in their gradients are neighbours in the grid, so L2 serves all but the first. With a stride, all points of a
tile have one phase (row and column modulo the stride), which leaves out the taps that reach none of its pixels.

Only the device knows the number of rows of a launch, so one captured graph serves every set of paths: a program
processes one tile after the other, a grid apart, until there are no more. By default the compiler hoists the
per-layout index arithmetic of the points out of that loop, which takes 213 to 255 registers where a multiprocessor
had room for 2 to 4 programs; without hoisting it takes 160 to 250. One program per tile that exits at once beyond the
last row would take as few, but half the grid of a launch with room for 55 rows and 28 in it is 14,000 programs, about
38 us (computed, not measured).

BN's backward pass subtracts two means over the whole batch, known only when every program of a launch is done. So a
program stores ``scale * bit * (J_conv^T g)``, and next to it its share of the two sums; the reader of that gradient
subtracts the means: as it loads the gradient (`tiles.load_gradients`), or, where a convolution reads it once for each
tap, by a second product (`folding`). Each gradient is read and written once per convolution.

Limits on an H100, computed, not measured. Stage 1 of a CIFAR network (16 channels, side 32, batch 128) has 2.1 M
values in a gradient and 604 MFLOP in a convolution. Reading and writing bf16 is 8.4 MB, 2.8 us at 3 TB/s; the
products take 1.5 us at 400 TFLOP/s (half the rate: with 16 columns, tensor cores wait for operands). By the
compiler's output, 128 rows of a tile take some 800 instructions of a warp in BN mode ``running`` and 1,300 in
``batch``; at one per clock and scheduler that is 3.5 us and 5.8 us. Issue slots are the bound, then memory; stages 2
and 3 take half and a quarter. A seventh of the instructions computes with sides that are known only at run time:
kernels are compiled for channels, kernel and stride, and serve images of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import DGRAD, FLOAT32, STRIDED, of_width
from pathnet.engines.triton.dgrad_results import relu_passes, store_gradients, store_sums, update_largest
from pathnet.engines.triton.dgrad_terms import direct_gradients, projected_gradients, rescaling, residual_gradients
from pathnet.engines.triton.folding import fold_means, taps_of
from pathnet.engines.triton.launch import Tile, launch, programs_for
from pathnet.engines.triton.network import FusedBlock, PackedConvolution
from pathnet.engines.triton.products import Phase
from pathnet.engines.triton.schedule import Launch
from pathnet.engines.triton.state import GradientStates, Saved
from pathnet.engines.triton.sums import take_means
from pathnet.engines.triton.tiles import (
    DIRECT,
    NO_SKIP,
    PROJECTION,
    ROW_FIELDS,
    ConvConstants,
    GradientMemory,
    ImageSize,
    Points,
    TileConstants,
    load_coefficient,
    points_of,
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
    BEFORE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ENTRY: tl.constexpr,
    EXIT: tl.constexpr,
    SUMS: tl.constexpr,
    CORRECT: tl.constexpr,
    FOLDED: tl.constexpr,
    ALL_TAPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    PATHS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PHASES: tl.constexpr = STRIDE * STRIDE
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    conv: tl.constexpr = ConvConstants(C, OUT_C, KERNEL, STRIDE)
    skip: tl.constexpr = ConvConstants(C, SKIP_C, 1, SKIP_STRIDE)
    block: tl.constexpr = TileConstants(PATHS, BLOCK_N, BLOCK_K, PRECISION)
    size, out_size, skip_size = (
        ImageSize(height, width),
        ImageSize(out_height, out_width),
        ImageSize(skip_height, skip_width),
    )
    memory = GradientMemory(
        gradients_ptr, slot_size, states_ptr, offsets_ptr, normalized_ptr, corrections_ptr, corrections_width
    )
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    path_tiles = tl.load(launch_ptr + 1) // PATHS

    tiles = path_tiles * CHANNEL_TILES * point_tiles
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        path_tile = program % path_tiles
        channel_tile = program // path_tiles % CHANNEL_TILES
        point_tile = program // path_tiles // CHANNEL_TILES
        phase = Phase(point_tile % PHASES // STRIDE, point_tile % PHASES % STRIDE)
        points = points_of(
            point_tile // PHASES, batch, phase_height, phase_width, inverse_phase_width, pixel_tiles, SAMPLES, PIXELS
        )
        points = _in_image(points, phase, size, STRIDE)
        channel = channel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        has_channel = channel < C
        path = path_tile * PATHS + tl.arange(0, PATHS)
        fields = rows_ptr + path * ROW_FIELDS
        source, target, entered = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        live = target >= 0

        factor = tl.full([PATHS, SAMPLES * PIXELS], 1.0, tl.float32)
        if ENTRY or EXIT:
            factor = rescaling(
                largest_ptr, exponents_ptr, entered, target, live, points.sample, batch, EXIT, PER_SAMPLE
            )
        value = tl.zeros([PATHS, SAMPLES * PIXELS, BLOCK_N], tl.float32)
        if RESIDUAL:
            value = residual_gradients(
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
                out_size,
                channel,
                conv,
                block,
                CORRECT,
                FOLDED,
                ALL_TAPS,
            )
            if EXIT:
                value *= load_coefficient(fields + 4)[:, None, None]
            if ENTRY:
                value *= factor[:, :, None]
        if EXIT:
            a = load_coefficient(fields + 3)
            factor *= a[:, None]
            skips = live & (a != 0)
        if SKIP == PROJECTION:
            skipped = projected_gradients(
                memory, entered, skips, projection_ptr, points, skip_size, channel, skip, block, CORRECT
            )
            value += skipped * factor[:, :, None]

        within = points.inside[:, None] & has_channel[None, :]
        pixel = (points.sample * height + points.row) * width + points.column
        if RESIDUAL or SKIP == PROJECTION or ACTIVATED:
            passes = relu_passes(bits_ptr, pixel, channel, within, C)
            value = tl.where(passes, value, 0.0)
        if SUMS:
            x_hat_ptr = normalized_ptr + tl.multiple_of(tl.load(offsets_ptr + unit), 16)
            store_sums(sums_ptr, value, x_hat_ptr, path, live, point_tile, point_tiles, pixel, channel, within, C)
        if RESIDUAL or SKIP == PROJECTION:
            value *= tl.load(scales_ptr + channel, mask=has_channel, other=0.0)[None, None, :]
        if SKIP == DIRECT:
            skipped = direct_gradients(memory, entered, skips, points, skip_size, channel, skip, BEFORE, CORRECT)
            if ACTIVATED:
                skipped = tl.where(passes, skipped, 0.0)
            value += skipped * factor[:, :, None]

        mask = live[:, None, None] & within[None, :, :]
        store_gradients(memory, target, value, pixel, channel, mask, C)
        if EXIT:
            magnitudes = tl.where(mask, tl.abs(value), 0.0)
            first_sample = point_tile // PHASES // pixel_tiles * SAMPLES
            update_largest(largest_ptr, target, live, magnitudes, first_sample, batch, SAMPLES, PER_SAMPLE)


@triton.jit
def _in_image(points, phase, size, STRIDE: tl.constexpr):
    """Return points of one phase with their pixels in the whole image."""
    row, column = points.row * STRIDE + phase.row, points.column * STRIDE + phase.column
    return Points(points.sample, row, column, points.inside & (row < size.height) & (column < size.width))


def dgrad_tile(conv: PackedConvolution) -> Tile:
    """Return the tile for gradients of a convolution's input, in the type of its transposed weights."""
    return of_width(DGRAD if conv.stride == 1 else STRIDED, conv.transposed, conv.input.channels)


def dgrad_point_tiles(conv: PackedConvolution, batch: int) -> int:
    """Return the number of tiles that hold all pixels of the input, one phase after the other."""
    inputs, stride = conv.input, conv.stride
    pixels = -(-inputs.height // stride) * -(-inputs.width // stride)
    return stride * stride * dgrad_tile(conv).point_tiles(batch, pixels)


def dgrad(gradients: GradientStates, saved: Saved, block: FusedBlock, task: Launch) -> None:
    """Take the states of a launch's rows back through one unit of a block, and at the block's input through its skip.

    If sums are requested, the new states' means are in ``gradients.corrections`` afterwards.
    """
    conv, projection, unit = block.convolutions[task.unit], block.projection, block.first + task.unit
    inputs, outputs, tile = conv.input, conv.output, dgrad_tile(conv)
    at_exit = task.unit == 0
    skip, skip_outputs = NO_SKIP, outputs
    if at_exit and task.skip:
        skip, skip_outputs = (PROJECTION if projection is not None else DIRECT), block.output
    # Post-activation blocks begin with a ReLU without BN.
    begins_with_bn = not (at_exit and block.activated)
    has_sums = begins_with_bn and gradients.sums.numel() > 0 and (task.residual or skip == PROJECTION)
    phase_height, phase_width = -(-inputs.height // conv.stride), -(-inputs.width // conv.stride)
    samples, pixels = tile.split(phase_height * phase_width)
    tiles, path_tiles = dgrad_point_tiles(conv, gradients.batch), task.count // tile.paths
    folded = gradients.by_batch and task.residual and conv.kernel > 1
    if folded:
        fold_means(gradients, conv, task)
    launch(
        _dgrad_kernel,
        programs_for(path_tiles * -(-inputs.channels // tile.channels) * tiles, gradients.values.device),
        tile,
        gradients_ptr=gradients.values,
        slot_size=gradients.values.shape[1],
        rows_ptr=gradients.rows,
        launch_ptr=gradients.launches[task.index],
        states_ptr=gradients.states,
        batch=gradients.batch,
        point_tiles=tiles,
        pixel_tiles=-(-phase_height * phase_width // pixels),
        phase_height=phase_height,
        phase_width=phase_width,
        inverse_phase_width=1 / phase_width,
        height=inputs.height,
        width=inputs.width,
        out_height=outputs.height,
        out_width=outputs.width,
        skip_height=skip_outputs.height,
        skip_width=skip_outputs.width,
        weights_ptr=conv.transposed,
        projection_ptr=None if projection is None or skip is not PROJECTION else projection.transposed,
        scales_ptr=saved.scales[unit],
        bits_ptr=saved.unit_bits(unit),
        normalized_ptr=saved.normalized,
        offsets_ptr=saved.normalized_starts,
        corrections_ptr=gradients.corrections,
        corrections_width=gradients.corrections.shape[-1],
        sums_ptr=gradients.sums,
        folded_ptr=gradients.folded,
        constants_ptr=gradients.constants,
        largest_ptr=gradients.largest,
        exponents_ptr=gradients.exponents,
        unit=unit,
        C=inputs.channels,
        OUT_C=outputs.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        SKIP=skip.value,
        SKIP_C=skip_outputs.channels,
        SKIP_STRIDE=1 if skip is NO_SKIP else block.stride,
        BEFORE=block.pad_before if skip is DIRECT else 0,
        ACTIVATED=block.activated and skip is DIRECT,
        RESIDUAL=task.residual,
        ENTRY=task.unit == len(block.convolutions) - 1 and not block.ends,
        EXIT=at_exit,
        SUMS=has_sums,
        CORRECT=gradients.by_batch,
        FOLDED=folded,
        ALL_TAPS=taps_of(conv),
        PER_SAMPLE=not gradients.by_batch,
        PATHS=tile.paths,
        SAMPLES=samples,
        PIXELS=pixels,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    if has_sums and gradients.by_batch:
        take_means(gradients, task, tiles, saved.scales[unit], inputs.channels, inputs.pixels)
