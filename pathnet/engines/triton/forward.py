"""One BN-ReLU-convolution unit forward, with routing; what a walk back needs is written on the way.

A tile is points * channels of the output of one routing; a program takes one tile after the other, a grid apart, for
the number of rows is known on the device alone. It is an implicit matrix product with the points as rows and, for
every tap, BLOCK_K channels of the normalised, rectified input at a time, which is made from the raw input as it is
loaded. So the raw output alone is written, and in BN mode ``batch`` its share of the next BN's statistics beside
it: count, mean and sum of squared deviations of each tile and channel, which `statistics` merges without
cancellation.

When recording, the programs also write what they see of the input: ReLU bits, eight channels a byte, and, where the
walk back needs it, x_hat in the walk's type; the channels of the input are dealt out among the programs that share
their points.

Limits on an H100: ResNet-110 on 128 CIFAR images is 65 GFLOP; float32 accuracy takes three products of TF32 terms, at
some 150 TFLOP/s 1.3 ms; activations are read and written once, 1.1 GB, 0.35 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import FLOAT32, FORWARD, of_width
from pathnet.engines.triton.launch import Tile, launch, programs_for
from pathnet.engines.triton.network import Convolution, FusedBlock, TritonNetwork
from pathnet.engines.triton.plan import Launch
from pathnet.engines.triton.state import Activations, Kept
from pathnet.engines.triton.statistics import take_statistics
from pathnet.engines.triton.tiles import (
    DIRECT,
    NO_SKIP,
    PROJECTION,
    ROW_FIELDS,
    STATE_FIELDS,
    batch_norm,
    cut_off,
    points_of,
)

__all__ = ["forward_tile", "forward_unit", "passed"]


@triton.jit
def _rectified(x, mean, scale, shift, floor):
    return cut_off((x - mean[None, :]) * scale[None, :] + shift[None, :], floor)


@triton.jit
def _add_products(
    acc,
    activations,
    weights_ptr,
    gain_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    epsilon,
    floor,
    sample,
    row,
    column,
    inside,
    channel,
    height,
    width,
    C: tl.constexpr,
    OUT_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` and the convolution of relu(bn(x)), x [height, width, C]; weights [KERNEL**2, C, OUT_C]."""
    PADDING: tl.constexpr = KERNEL // 2
    first_row, first_column = row * STRIDE, column * STRIDE
    pixel = (sample * height + first_row) * width + first_column
    for depth in range((C + BLOCK_K - 1) // BLOCK_K):
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        known = deep < C
        mean, _, scale, shift = batch_norm(gain_ptr, bias_ptr, mean_ptr, variance_ptr, epsilon, deep, known)
        for tap in range(KERNEL * KERNEL):
            rows, columns = tap // KERNEL - PADDING, tap % KERNEL - PADDING
            hit = inside & (first_row >= -rows) & (first_row < height - rows)
            hit = hit & (first_column >= -columns) & (first_column < width - columns)
            mask = hit[:, None] & known[None, :]
            x = tl.load(
                activations + ((pixel + (rows * width + columns)) * C)[:, None] + deep[None, :],
                mask=mask,
                other=0.0,
            ).to(tl.float32)
            x = tl.where(mask, _rectified(x, mean, scale, shift, floor), 0.0).to(weights_ptr.dtype.element_ty)
            weights = tl.load(
                weights_ptr + (tap * C + deep)[:, None] * OUT_C + channel[None, :],
                mask=known[:, None] & (channel < OUT_C)[None, :],
                other=0.0,
            )
            acc = tl.dot(x, weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _keep(
    activations,
    bits_ptr,
    normalized_ptr,
    gain_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    epsilon,
    floor,
    sample,
    row,
    column,
    inside,
    part,
    height,
    width,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes ReLU bits, and x_hat, of input pixels that belong to output points; every PARTS-th block of channels."""
    BYTES: tl.constexpr = (C + 7) // 8
    PHASES: tl.constexpr = STRIDE * STRIDE
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for step in range((BLOCKS + PARTS - 1) // PARTS * PHASES):
        depth, phase = step // PHASES * PARTS + part, step % PHASES
        deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
        own_row, own_column = row * STRIDE + phase // STRIDE, column * STRIDE + phase % STRIDE
        seen = inside & (own_row < height) & (own_column < width)
        known = deep < C
        mask = seen[:, None] & known[None, :]
        pixel = (sample * height + own_row) * width + own_column
        x = tl.load(activations + (pixel * C)[:, None] + deep[None, :], mask=mask, other=0.0).to(tl.float32)
        mean, deviation, scale, shift = batch_norm(gain_ptr, bias_ptr, mean_ptr, variance_ptr, epsilon, deep, known)
        positive = (_rectified(x, mean, scale, shift, floor) > floor) & known[None, :]
        eights = tl.reshape(positive.to(tl.int32), [x.shape[0], BLOCK_K // 8, 8])
        packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
        byte = depth * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        tl.store(
            bits_ptr + (pixel * BYTES)[:, None] + byte[None, :],
            packed.to(tl.uint8),
            mask=seen[:, None] & (byte < BYTES)[None, :],
        )
        if NORMALIZED:
            x_hat = (x - mean[None, :]) * deviation[None, :]
            tl.store(
                normalized_ptr + (pixel * C)[:, None] + deep[None, :],
                x_hat.to(normalized_ptr.dtype.element_ty),
                mask=mask,
            )


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
    added_ptr,
    projection_added_ptr,
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
    ACTIVATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ADDED: tl.constexpr,
    EXIT: tl.constexpr,
    BATCH: tl.constexpr,
    BITS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SAMPLES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    POINTS: tl.constexpr = SAMPLES * PIXELS
    CHANNEL_TILES: tl.constexpr = (OUT_C + BLOCK_N - 1) // BLOCK_N
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)
    slot_size = slot_size.to(tl.int64)

    for program in tl.range(
        tl.program_id(0), rows * CHANNEL_TILES * point_tiles, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        path = program % rows
        channel_tile = program // rows % CHANNEL_TILES
        point_tile = program // rows // CHANNEL_TILES
        sample, row, column, inside = points_of(
            point_tile, batch, out_height, out_width, inverse_out_width, pixel_tiles, SAMPLES, PIXELS
        )
        channel = channel_tile * BLOCK_N + tl.arange(0, BLOCK_N)

        fields = rows_ptr + path * ROW_FIELDS
        source, target, block = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        given = activations_ptr + tl.load(states_ptr + tl.maximum(source, 0) * STATE_FIELDS) * slot_size
        entered = activations_ptr + tl.load(states_ptr + block * STATE_FIELDS) * slot_size
        made = activations_ptr + tl.load(states_ptr + target * STATE_FIELDS) * slot_size
        mean_ptr, first_mean_ptr = statistics_ptr, first_statistics_ptr
        if BATCH:
            mean_ptr = statistics_ptr + source.to(tl.int64) * (2 * statistics_width)
            first_mean_ptr = first_statistics_ptr + block.to(tl.int64) * (2 * statistics_width)
        variance_ptr, first_variance_ptr = mean_ptr + statistics_width, first_mean_ptr + statistics_width

        value = tl.zeros([POINTS, BLOCK_N], tl.float32)
        if RESIDUAL:
            value = _add_products(
                value,
                given,
                weights_ptr,
                gain_ptr,
                bias_ptr,
                mean_ptr,
                variance_ptr,
                epsilon,
                floor,
                sample,
                row,
                column,
                inside,
                channel,
                height,
                width,
                C,
                OUT_C,
                KERNEL,
                STRIDE,
                BLOCK_K,
                PRECISION,
            )
            if ADDED:
                value += tl.load(added_ptr + channel, mask=channel < OUT_C, other=0.0)[None, :]
            if EXIT:
                value *= tl.load(fields + 4).to(tl.float32, bitcast=True)
        within = inside[:, None] & (channel < OUT_C)[None, :]
        if SKIP != NO_SKIP:
            a = tl.load(fields + 3).to(tl.float32, bitcast=True)
        if SKIP == PROJECTION:
            skipped = _add_products(
                tl.zeros([POINTS, BLOCK_N], tl.float32),
                entered,
                projection_ptr,
                first_gain_ptr,
                first_bias_ptr,
                first_mean_ptr,
                first_variance_ptr,
                first_epsilon,
                first_floor,
                sample,
                row,
                column,
                inside,
                channel,
                skip_height,
                skip_width,
                SKIP_C,
                OUT_C,
                1,
                SKIP_STRIDE,
                BLOCK_K,
                PRECISION,
            )
            if ADDED:
                skipped += tl.load(projection_added_ptr + channel, mask=channel < OUT_C, other=0.0)[None, :]
            value += a * skipped
        if SKIP == DIRECT:
            at = ((sample * skip_height + row * SKIP_STRIDE) * skip_width + column * SKIP_STRIDE) * SKIP_C
            skipped = tl.load(
                entered + at[:, None] + channel[None, :],
                mask=inside[:, None] & (channel < SKIP_C)[None, :],
                other=0.0,
            ).to(tl.float32)
            if ACTIVATED:
                skipped = cut_off(skipped, first_floor)
            value += a * skipped
        at = ((sample * out_height + row) * out_width + column) * OUT_C
        value = value.to(activations_ptr.dtype.element_ty)
        tl.store(made + at[:, None] + channel[None, :], value, mask=within)

        if BATCH:
            count = tl.sum(inside.to(tl.float32), 0)
            seen = tl.where(within, value.to(tl.float32), 0.0)
            mean = tl.sum(seen, 0) / count
            deviation = tl.where(within, seen - mean[None, :], 0.0)
            own = moments_ptr + (path.to(tl.int64) * point_tiles + point_tile) * (3 * OUT_C) + channel
            tl.store(own, tl.zeros([BLOCK_N], tl.float32) + count, mask=channel < OUT_C)
            tl.store(own + OUT_C, mean, mask=channel < OUT_C)
            tl.store(own + 2 * OUT_C, tl.sum(deviation * deviation, 0), mask=channel < OUT_C)

        if BITS:
            _keep(
                given,
                bits_ptr,
                normalized_ptr,
                gain_ptr,
                bias_ptr,
                mean_ptr,
                variance_ptr,
                epsilon,
                floor,
                sample,
                row,
                column,
                inside,
                channel_tile,
                height,
                width,
                CHANNEL_TILES,
                C,
                STRIDE,
                NORMALIZED,
                BLOCK_K,
            )


def forward_tile(conv: Convolution) -> Tile:
    """The tile for a convolution's output, in the type of its weights."""
    return of_width(FORWARD, conv.weight, conv.made.channels)


def passed(block: FusedBlock, task: Launch) -> Convolution:
    """The convolution that a launch goes through; where its output has a BN of its own, the projection is one."""
    if task.skip and block.ends and block.projection is not None:
        return block.projection
    return block.convolutions[task.unit]


def forward_unit(network: TritonNetwork, activations: Activations, task: Launch, kept: Kept | None = None) -> None:
    """Takes the states of a launch's rows through one unit of a block, and at the block's exit adds its skip.

    In BN mode ``batch`` the statistics of what was made are in ``activations.statistics`` afterwards.

    Args:
        kept: where the ReLU bits of the unit's input go, and the normalised input if there is room for it.
    """
    block = network.blocks[task.block]
    conv, projection, unit = passed(block, task), block.projection, block.first + task.unit
    alone = conv is projection
    if alone:
        # It reads the first unit's activation, which is kept once.
        kept = None
    given, made, tile = conv.given, conv.made, forward_tile(conv)
    at_exit = task.unit == len(block.convolutions) - 1 and not block.ends
    skip, skip_given = NO_SKIP, given
    if at_exit and task.skip:
        skip, skip_given = (PROJECTION if projection is not None else DIRECT), block.given
    by_batch = network.bn == "batch"
    statistics = (
        [activations.statistics] * 2 if by_batch else [network.statistics[own] for own in (unit, block.first)]
    )
    samples, pixels = tile.split(made.pixels)
    tiles = tile.point_tiles(activations.batch, made.pixels)
    launch(
        _forward_kernel,
        programs_for(task.count * -(-made.channels // tile.channels) * tiles, activations.values.device),
        tile,
        activations.values,
        activations.values.shape[1],
        activations.rows,
        activations.launches[task.index],
        activations.states,
        activations.batch,
        tiles,
        -(-made.pixels // pixels),
        given.height,
        given.width,
        made.height,
        made.width,
        1 / made.width,
        skip_given.height,
        skip_given.width,
        conv.weight,
        conv.weight if projection is None else projection.weight,
        network.affine[unit, 0],
        network.affine[unit, 1],
        network.epsilons[unit],
        network.floor(unit),
        network.affine[block.first, 0],
        network.affine[block.first, 1],
        network.epsilons[block.first],
        network.floor(block.first),
        conv.weight if conv.added is None else conv.added,
        conv.weight if projection is None or projection.added is None else projection.added,
        statistics[0],
        network.widest,
        statistics[1],
        activations.moments,
        conv.weight if kept is None else kept.unit_bits(unit),
        conv.weight if kept is None else kept.unit_normalized(unit),
        C=given.channels,
        OUT_C=made.channels,
        KERNEL=conv.kernel,
        STRIDE=conv.stride,
        SKIP=skip.value,
        SKIP_C=skip_given.channels,
        SKIP_STRIDE=1 if skip is NO_SKIP else block.stride,
        ACTIVATED=block.activated and skip is DIRECT,
        RESIDUAL=task.residual or alone,
        ADDED=conv.added is not None,
        EXIT=at_exit,
        BATCH=by_batch,
        BITS=kept is not None,
        NORMALIZED=kept is not None and kept.normalized.numel() > 0 and network.normalized[unit] is not None,
        SAMPLES=samples,
        PIXELS=pixels,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        PRECISION=FLOAT32,
    )
    if by_batch:
        take_statistics(activations, task, tiles, made.channels)
