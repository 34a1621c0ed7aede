"""The forward pass of one BN-ReLU-convolution unit, with routing; it saves what backward passes need.

A tile is points * channels of the output of one routing; a program processes one tile after the other, a grid apart,
since only the device knows the number of rows. It is an implicit matrix product with the points as rows that takes,
for every tap, BLOCK_K channels of the normalised, rectified input at a time, computed from the raw input as it is
loaded. So only the raw output is written, and in BN mode ``batch`` next to it its share of the next BN's statistics:
count, mean and sum of squared deviations of each tile and channel, which `statistics` merges without cancellation.

For a record, the programs also store what they load of the input: ReLU bits, eight channels in a byte, and, where
backward passes need it, x_hat in their type. Programs that share their points divide the input's channels among them.

Limits on an H100, computed: ResNet-110 on 128 CIFAR images is 65 GFLOP. Float32 accuracy takes three products of TF32
terms, at some 150 TFLOP/s 1.3 ms; activations are read and written once, 1.1 GB, 0.35 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import FLOAT32, FORWARD, of_width
from pathnet.engines.triton.forward_terms import add_products, load_pixels, save_input, store_moments
from pathnet.engines.triton.launch import Tile, launch, programs_for
from pathnet.engines.triton.network import FusedBlock, PackedConvolution, TritonNetwork
from pathnet.engines.triton.schedule import Launch
from pathnet.engines.triton.state import ActivationStates, Saved
from pathnet.engines.triton.statistics import take_statistics
from pathnet.engines.triton.tiles import (
    DIRECT,
    NO_SKIP,
    PROJECTION,
    ROW_FIELDS,
    STATE_FIELDS,
    ConvConstants,
    ImageSize,
    NormPointers,
    clamp,
    load_coefficient,
    points_of,
)

__all__ = ["forward_tile", "forward_unit", "passed"]


@triton.jit(
    do_not_specialize=[
        "batch",
        "point_tiles",
        "pixel_tiles",
        "height",
        "width",
        "out_height",
        "out_width",
        "skip_height",
        "skip_width",
    ],
    do_not_specialize_on_alignment=["launch_ptr"],
)
def _forward_kernel(
    activations_ptr,
    slot_size,
    rows_ptr,
    launch_ptr,
    states_ptr,
    batch,
    point_tiles,
    pixel_tiles,
    height,
    width,
    out_height,
    out_width,
    inverse_out_width,
    skip_height,
    skip_width,
    weights_ptr,
    projection_ptr,
    gain_ptr,
    bias_ptr,
    epsilon,
    floor,
    first_gain_ptr,
    first_bias_ptr,
    first_epsilon,
    first_floor,
    shift_ptr,
    projection_shift_ptr,
    statistics_ptr,
    statistics_width,
    first_statistics_ptr,
    moments_ptr,
    bits_ptr,
    normalized_ptr,
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
    EXIT: tl.constexpr,
    BATCH: tl.constexpr,
    SAMPLES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (OUT_C + BLOCK_N - 1) // BLOCK_N
    conv: tl.constexpr = ConvConstants(C, OUT_C, KERNEL, STRIDE)
    skip: tl.constexpr = ConvConstants(SKIP_C, OUT_C, 1, SKIP_STRIDE)
    size, skip_size = ImageSize(height, width), ImageSize(skip_height, skip_width)
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)
    slot_size = slot_size.to(tl.int64)

    tiles = rows * CHANNEL_TILES * point_tiles
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        path = program % rows
        channel_tile = program // rows % CHANNEL_TILES
        point_tile = program // rows // CHANNEL_TILES
        points = points_of(point_tile, batch, out_height, out_width, inverse_out_width, pixel_tiles, SAMPLES, PIXELS)
        channel = channel_tile * BLOCK_N + tl.arange(0, BLOCK_N)

        fields = rows_ptr + path * ROW_FIELDS
        source, target, entered = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        x_ptr = activations_ptr + tl.load(states_ptr + tl.maximum(source, 0) * STATE_FIELDS) * slot_size
        entered_ptr = activations_ptr + tl.load(states_ptr + entered * STATE_FIELDS) * slot_size
        y_ptr = activations_ptr + tl.load(states_ptr + target * STATE_FIELDS) * slot_size
        mean_ptr, first_mean_ptr = statistics_ptr, first_statistics_ptr
        if BATCH:
            mean_ptr = statistics_ptr + source.to(tl.int64) * (2 * statistics_width)
            first_mean_ptr = first_statistics_ptr + entered.to(tl.int64) * (2 * statistics_width)
        norm = NormPointers(gain_ptr, bias_ptr, mean_ptr, mean_ptr + statistics_width, epsilon, floor)

        value = tl.zeros([SAMPLES * PIXELS, BLOCK_N], tl.float32)
        if RESIDUAL:
            value = add_products(value, x_ptr, weights_ptr, norm, points, size, channel, conv, BLOCK_K, PRECISION)
            if shift_ptr is not None:
                value += tl.load(shift_ptr + channel, mask=channel < OUT_C, other=0.0)[None, :]
            if EXIT:
                value *= load_coefficient(fields + 4)
        if SKIP != NO_SKIP:
            a = load_coefficient(fields + 3)
        if SKIP == PROJECTION:
            first_variance_ptr = first_mean_ptr + statistics_width
            first_norm = NormPointers(
                first_gain_ptr, first_bias_ptr, first_mean_ptr, first_variance_ptr, first_epsilon, first_floor
            )
            skipped = tl.zeros([SAMPLES * PIXELS, BLOCK_N], tl.float32)
            skipped = add_products(
                skipped,
                entered_ptr,
                projection_ptr,
                first_norm,
                points,
                skip_size,
                channel,
                skip,
                BLOCK_K,
                PRECISION,
            )
            if projection_shift_ptr is not None:
                skipped += tl.load(projection_shift_ptr + channel, mask=channel < OUT_C, other=0.0)[None, :]
            value += a * skipped
        if SKIP == DIRECT:
            skipped = load_pixels(entered_ptr, points, skip_size, channel, skip, BEFORE)
            if ACTIVATED:
                skipped = clamp(skipped, first_floor)
            value += a * skipped

        pixel = (points.sample * out_height + points.row) * out_width + points.column
        within = points.inside[:, None] & (channel < OUT_C)[None, :]
        value = value.to(activations_ptr.dtype.element_ty)
        tl.store(y_ptr + (pixel * OUT_C)[:, None] + channel[None, :], value, mask=within)
        if BATCH:
            tile_moments_ptr = moments_ptr + (path.to(tl.int64) * point_tiles + point_tile) * (3 * OUT_C)
            store_moments(tile_moments_ptr, value, points.inside, channel, within, OUT_C)
        if bits_ptr is not None:
            save_input(
                x_ptr, bits_ptr, normalized_ptr, norm, points, size, channel_tile, conv, CHANNEL_TILES, BLOCK_K
            )


def forward_tile(conv: PackedConvolution) -> Tile:
    """Return the tile for a convolution's output, in the type of its weights."""
    return of_width(FORWARD, conv.weight, conv.output.channels)


def passed(block: FusedBlock, task: Launch) -> PackedConvolution:
    """Return the convolution of a launch; a projection whose output has its own BN has its own launch."""
    if task.skip and block.ends and block.projection is not None:
        return block.projection
    return block.convolutions[task.unit]


def forward_unit(
    network: TritonNetwork, activations: ActivationStates, task: Launch, saved: Saved | None = None
) -> None:
    """Take the states of a launch's rows through one unit of a block, and at the block's output add its skip.

    In BN mode ``batch`` the new states' statistics are in ``activations.statistics`` afterwards.

    Args:
        saved: memory for the ReLU bits of the unit's input, and in BN mode ``batch`` for x_hat.
    """
    block = network.blocks[task.block]
    conv, projection, unit = passed(block, task), block.projection, block.first + task.unit
    alone = conv is projection
    if alone:
        # The projection reads the first unit's activation, which that unit saves.
        saved = None
    inputs, outputs, tile = conv.input, conv.output, forward_tile(conv)
    at_exit = task.unit == len(block.convolutions) - 1 and not block.ends
    skip, skip_inputs = NO_SKIP, inputs
    if at_exit and task.skip:
        skip, skip_inputs = (PROJECTION if projection is not None else DIRECT), block.input
    by_batch = network.bn == "batch"
    statistics = (
        [activations.statistics] * 2 if by_batch else [network.statistics[index] for index in (unit, block.first)]
    )
    normalizes = saved is not None and saved.normalized.numel() > 0 and network.normalized[unit] is not None
    samples, pixels = tile.split(outputs.pixels)
    tiles = tile.point_tiles(activations.batch, outputs.pixels)
    launch(
        _forward_kernel,
        programs_for(task.count * -(-outputs.channels // tile.channels) * tiles, activations.values.device),
        tile,
        activations_ptr=activations.values,
        slot_size=activations.values.shape[1],
        rows_ptr=activations.rows,
        launch_ptr=activations.launches[task.index],
        states_ptr=activations.states,
        batch=activations.batch,
        point_tiles=tiles,
        pixel_tiles=-(-outputs.pixels // pixels),
        height=inputs.height,
        width=inputs.width,
        out_height=outputs.height,
        out_width=outputs.width,
        inverse_out_width=1 / outputs.width,
        skip_height=skip_inputs.height,
        skip_width=skip_inputs.width,
        weights_ptr=conv.weight,
        projection_ptr=None if projection is None or skip is not PROJECTION else projection.weight,
        gain_ptr=network.affine[unit, 0],
        bias_ptr=network.affine[unit, 1],
        epsilon=network.epsilons[unit],
        floor=network.floor(unit),
        first_gain_ptr=network.affine[block.first, 0],
        first_bias_ptr=network.affine[block.first, 1],
        first_epsilon=network.epsilons[block.first],
        first_floor=network.floor(block.first),
        shift_ptr=conv.shift,
        projection_shift_ptr=None if projection is None or skip is not PROJECTION else projection.shift,
        statistics_ptr=statistics[0],
        statistics_width=network.widest,
        first_statistics_ptr=statistics[1],
        moments_ptr=activations.moments,
        bits_ptr=None if saved is None else saved.unit_bits(unit),
        normalized_ptr=None if saved is None or not normalizes else saved.unit_normalized(unit),
        C=inputs.channels,
        OUT_C=outputs.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        SKIP=skip.value,
        SKIP_C=skip_inputs.channels,
        SKIP_STRIDE=1 if skip is NO_SKIP else block.stride,
        BEFORE=block.pad_before if skip is DIRECT else 0,
        ACTIVATED=block.activated and skip is DIRECT,
        RESIDUAL=task.residual or alone,
        EXIT=at_exit,
        BATCH=by_batch,
        SAMPLES=samples,
        PIXELS=pixels,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    if by_batch:
        take_statistics(activations, task, tiles, outputs.channels)
