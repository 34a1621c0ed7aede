"""BN behind a block's last convolution and its projection, with statistics of the batch: post-activation blocks in BN
mode ``batch``, seen from sum to sum.

Going forward one kernel makes the sum of what those BNs make of two convolutions, or of one and the block's input; a
record keeps what they normalised. Going back another one takes a sum's gradient to what waits for a BN's means, as
`dgrad` leaves it behind the BN that begins a unit: ``scale * g``, and the program's share of the two sums. The sum's
gradient itself waits for nothing, since the other branch reads it too.

A tile is POINTS pixels of the batch and BLOCK_N channels of one row; a program takes one after the other. Nothing is
computed that memory would wait for: a gradient is read and written once more a branch than in pre-activation blocks,
and so is an activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import ELEMENTS
from pathnet.engines.triton.launch import elements, launch, programs_for
from pathnet.engines.triton.network import FusedBlock, TritonNetwork
from pathnet.engines.triton.plan import Launch
from pathnet.engines.triton.state import Activations, Gradients, Kept
from pathnet.engines.triton.sums import take_means
from pathnet.engines.triton.tiles import (
    DIRECT,
    NO_SKIP,
    PROJECTION,
    ROW_FIELDS,
    STATE_FIELDS,
    batch_norm,
    cut_off,
    power_of_two,
    shift_of,
)

__all__ = ["ending_backward", "ending_point_tiles", "joined"]


@triton.jit
def _behind_norm(
    given,
    at,
    within,
    gain_ptr,
    bias_ptr,
    mean_ptr,
    statistics_width,
    epsilon,
    channel,
    known,
    normalized_ptr,
    NORMALIZED: tl.constexpr,
):
    """What a BN makes of a convolution's output, and what it normalised where that is kept."""
    mean, deviation, scale, shift = batch_norm(
        gain_ptr, bias_ptr, mean_ptr, mean_ptr + statistics_width, epsilon, channel, known
    )
    centred = tl.load(given + at, mask=within, other=0.0).to(tl.float32) - mean[None, :]
    if NORMALIZED:
        x_hat = centred * deviation[None, :]
        tl.store(normalized_ptr + at, x_hat.to(normalized_ptr.dtype.element_ty), mask=within)
    return centred * scale[None, :] + shift[None, :]


@triton.jit(
    do_not_specialize=["points", "height", "width", "skip_height", "skip_width"],
    do_not_specialize_on_alignment=["launch_ptr"],
)
def _joined_kernel(
    activations_ptr,
    slot_size,
    rows_ptr,
    launch_ptr,
    states_ptr,
    points,
    height,
    width,
    skip_height,
    skip_width,
    gain_ptr,
    bias_ptr,
    epsilon,
    skip_gain_ptr,
    skip_bias_ptr,
    skip_epsilon,
    floor,
    statistics_ptr,
    statistics_width,
    normalized_ptr,
    skip_normalized_ptr,
    C: tl.constexpr,
    SKIP: tl.constexpr,
    SKIP_C: tl.constexpr,
    SKIP_STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORMALIZED: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    point_tiles = tl.cdiv(points, POINTS)
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)
    slot_size = slot_size.to(tl.int64)

    for program in tl.range(
        tl.program_id(0), rows * CHANNEL_TILES * point_tiles, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        channel = program % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        point = program // CHANNEL_TILES % point_tiles * POINTS + tl.arange(0, POINTS)
        fields = rows_ptr + program // CHANNEL_TILES // point_tiles * ROW_FIELDS
        source, target, skip = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        known = channel < C
        within = (point < points)[:, None] & known[None, :]
        at = (point * C)[:, None] + channel[None, :]
        value = tl.zeros([POINTS, BLOCK_N], tl.float32)
        if RESIDUAL:
            given = activations_ptr + tl.load(states_ptr + source * STATE_FIELDS) * slot_size
            own = statistics_ptr + source.to(tl.int64) * (2 * statistics_width)
            value += tl.load(fields + 4).to(tl.float32, bitcast=True) * _behind_norm(
                given,
                at,
                within,
                gain_ptr,
                bias_ptr,
                own,
                statistics_width,
                epsilon,
                channel,
                known,
                normalized_ptr,
                NORMALIZED,
            )
        if SKIP != NO_SKIP:
            a = tl.load(fields + 3).to(tl.float32, bitcast=True)
            entered = activations_ptr + tl.load(states_ptr + skip * STATE_FIELDS) * slot_size
        if SKIP == PROJECTION:
            own = statistics_ptr + skip.to(tl.int64) * (2 * statistics_width)
            value += a * _behind_norm(
                entered,
                at,
                within,
                skip_gain_ptr,
                skip_bias_ptr,
                own,
                statistics_width,
                skip_epsilon,
                channel,
                known,
                skip_normalized_ptr,
                NORMALIZED,
            )
        if SKIP == DIRECT:
            sample, row, column = point // (height * width), point // width % height, point % width
            from_pixel = (sample * skip_height + row * SKIP_STRIDE) * skip_width + column * SKIP_STRIDE
            skipped = tl.load(
                entered + (from_pixel * SKIP_C)[:, None] + channel[None, :],
                mask=within & (channel < SKIP_C)[None, :],
                other=0.0,
            )
            value += a * cut_off(skipped.to(tl.float32), floor)
        made = activations_ptr + tl.load(states_ptr + target * STATE_FIELDS) * slot_size
        tl.store(made + at, value.to(activations_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["points"], do_not_specialize_on_alignment=["launch_ptr"])
def _ending_backward_kernel(
    gradients_ptr,
    slot_size,
    rows_ptr,
    launch_ptr,
    states_ptr,
    points,
    scales_ptr,
    normalized_ptr,
    sums_ptr,
    largest_ptr,
    exponents_ptr,
    C: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    point_tiles = tl.cdiv(points, POINTS)
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)
    slot_size = slot_size.to(tl.int64)

    for program in tl.range(
        tl.program_id(0), rows * CHANNEL_TILES * point_tiles, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        channel = program % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        point_tile = program // CHANNEL_TILES % point_tiles
        point = point_tile * POINTS + tl.arange(0, POINTS)
        path = program // CHANNEL_TILES // point_tiles
        source, target = tl.load(rows_ptr + path * ROW_FIELDS), tl.load(rows_ptr + path * ROW_FIELDS + 1)
        known = channel < C
        within = (point < points)[:, None] & known[None, :]
        at = (point * C)[:, None] + channel[None, :]

        # From here on the gradient has its power of two aside: what reads it, the projection too, takes it as it is.
        shift = shift_of(tl.load(largest_ptr + source))
        tl.store(exponents_ptr + target, tl.load(exponents_ptr + source) + shift)
        given = gradients_ptr + tl.load(states_ptr + source * STATE_FIELDS) * slot_size
        value = tl.load(given + at, mask=within, other=0.0).to(tl.float32) * power_of_two(-shift)
        x_hat = tl.load(normalized_ptr + at, mask=within, other=0.0).to(tl.float32)
        own = sums_ptr + (path.to(tl.int64) * point_tiles + point_tile) * (2 * C) + channel
        tl.store(own, tl.sum(value, 0), mask=known)
        tl.store(own + C, tl.sum(value * x_hat, 0), mask=known)
        value *= tl.load(scales_ptr + channel, mask=known, other=0.0)[None, :]
        made = gradients_ptr + tl.load(states_ptr + target * STATE_FIELDS) * slot_size
        tl.store(made + at, value.to(gradients_ptr.dtype.element_ty), mask=within)


def joined(network: TritonNetwork, activations: Activations, task: Launch, kept: Kept | None = None) -> None:
    """Makes the sums of a launch's rows.

    Args:
        kept: where what the BNs normalised goes.
    """
    block = network.blocks[task.block]
    made, projects = block.made, block.projection is not None
    unit, skip_unit = block.ends[0], block.ends[-1]
    skip = NO_SKIP if not task.skip else PROJECTION if projects else DIRECT
    points, channels = elements(ELEMENTS, made.channels)
    total = activations.batch * made.pixels
    launch(
        _joined_kernel,
        programs_for(task.count * -(-total // points) * -(-made.channels // channels), activations.values.device),
        ELEMENTS,
        activations.values,
        activations.values.shape[1],
        activations.rows,
        activations.launches[task.index],
        activations.states,
        total,
        made.height,
        made.width,
        block.given.height,
        block.given.width,
        network.affine[unit, 0],
        network.affine[unit, 1],
        network.epsilons[unit],
        network.affine[skip_unit, 0],
        network.affine[skip_unit, 1],
        network.epsilons[skip_unit],
        network.floor(block.first),
        activations.statistics,
        network.widest,
        network.affine if kept is None else kept.unit_normalized(unit),
        network.affine if kept is None else kept.unit_normalized(skip_unit),
        C=made.channels,
        SKIP=skip.value,
        SKIP_C=block.given.channels,
        SKIP_STRIDE=block.stride,
        RESIDUAL=task.residual,
        NORMALIZED=kept is not None,
        POINTS=points,
        BLOCK_N=channels,
    )


def ending_point_tiles(block: FusedBlock, batch: int) -> int:
    """How many tiles hold all pixels of a block's output."""
    return -(-batch * block.made.pixels // elements(ELEMENTS, block.made.channels)[0])


def ending_backward(gradients: Gradients, kept: Kept, block: FusedBlock, task: Launch) -> None:
    """Takes gradients of sums through the BN behind the last convolution, or through that behind the projection."""
    unit, made = block.ends[0] if task.residual else block.ends[1], block.made
    points, channels = elements(ELEMENTS, made.channels)
    tiles = ending_point_tiles(block, gradients.batch)
    launch(
        _ending_backward_kernel,
        programs_for(task.count * tiles * -(-made.channels // channels), gradients.values.device),
        ELEMENTS,
        gradients.values,
        gradients.values.shape[1],
        gradients.rows,
        gradients.launches[task.index],
        gradients.states,
        gradients.batch * made.pixels,
        kept.scales[unit],
        kept.unit_normalized(unit),
        gradients.sums,
        gradients.largest,
        gradients.exponents,
        C=made.channels,
        POINTS=points,
        BLOCK_N=channels,
    )
    take_means(gradients, task, tiles, kept.scales[unit], made.channels, made.pixels)
