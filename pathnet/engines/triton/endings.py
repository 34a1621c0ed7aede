"""Batch-mode BN after the last convolution and the projection of post-activation blocks.

Forward, one kernel adds the outputs of those two BNs, or of one and the block's skip; a record saves x_hat of both.
Backward, another kernel computes the part of one BN's backward pass that does not need the means, as `dgrad` does for
the BN that begins a unit: ``scale * g``, and the program's share of the two sums. The gradient at the block's
addition needs no means, since the other branch reads it too.

A tile is POINTS pixels of the batch and BLOCK_N channels of one row; a program processes one after the other.
Memory is the bound: per branch, a gradient is read and written once more than in pre-activation blocks, and so is an
activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import ELEMENTS
from pathnet.engines.triton.launch import elements, launch, programs_for
from pathnet.engines.triton.network import FusedBlock, TritonNetwork
from pathnet.engines.triton.schedule import Launch
from pathnet.engines.triton.state import ActivationStates, GradientStates, Saved
from pathnet.engines.triton.sums import take_means
from pathnet.engines.triton.tiles import (
    DIRECT,
    NO_SKIP,
    PROJECTION,
    ROW_FIELDS,
    STATE_FIELDS,
    NormPointers,
    behind_zeros,
    clamp,
    load_coefficient,
    load_normalization,
    power_of_two,
    shift_of,
)

__all__ = ["ending_backward", "ending_point_tiles", "ending_forward"]


@triton.jit
def _normalized_branch(x_ptr, places, within, channel, known, norm, normalized_ptr):
    """Return a convolution's output after its BN; store x_hat if there is a record to save it in."""
    normalization = load_normalization(norm, channel, known)
    centred = tl.load(x_ptr + places, mask=within, other=0.0).to(tl.float32) - normalization.mean[None, :]
    if normalized_ptr is not None:
        x_hat = centred * normalization.inverse_deviation[None, :]
        tl.store(normalized_ptr + places, x_hat.to(normalized_ptr.dtype.element_ty), mask=within)
    return centred * normalization.scale[None, :] + normalization.bias[None, :]


@triton.jit(
    do_not_specialize=["points", "height", "width", "skip_height", "skip_width"],
    do_not_specialize_on_alignment=["launch_ptr"],
)
def _ending_forward_kernel(
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
    BEFORE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    point_tiles = tl.cdiv(points, POINTS)
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)
    slot_size = slot_size.to(tl.int64)

    tiles = rows * CHANNEL_TILES * point_tiles
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        channel = program % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        point = program // CHANNEL_TILES % point_tiles * POINTS + tl.arange(0, POINTS)
        fields = rows_ptr + program // CHANNEL_TILES // point_tiles * ROW_FIELDS
        source, target, entered = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        known = channel < C
        within = (point < points)[:, None] & known[None, :]
        places = (point * C)[:, None] + channel[None, :]
        value = tl.zeros([POINTS, BLOCK_N], tl.float32)
        if RESIDUAL:
            x_ptr = activations_ptr + tl.load(states_ptr + source * STATE_FIELDS) * slot_size
            mean_ptr = statistics_ptr + source.to(tl.int64) * (2 * statistics_width)
            norm = NormPointers(gain_ptr, bias_ptr, mean_ptr, mean_ptr + statistics_width, epsilon, floor)
            branch = _normalized_branch(x_ptr, places, within, channel, known, norm, normalized_ptr)
            value += load_coefficient(fields + 4) * branch
        if SKIP != NO_SKIP:
            a = load_coefficient(fields + 3)
            entered_ptr = activations_ptr + tl.load(states_ptr + entered * STATE_FIELDS) * slot_size
        if SKIP == PROJECTION:
            mean_ptr = statistics_ptr + entered.to(tl.int64) * (2 * statistics_width)
            norm = NormPointers(
                skip_gain_ptr, skip_bias_ptr, mean_ptr, mean_ptr + statistics_width, skip_epsilon, floor
            )
            value += a * _normalized_branch(entered_ptr, places, within, channel, known, norm, skip_normalized_ptr)
        if SKIP == DIRECT:
            sample, row, column = point // (height * width), point // width % height, point % width
            pixel = (sample * skip_height + row * SKIP_STRIDE) * skip_width + column * SKIP_STRIDE
            input_channel, has_channel = behind_zeros(channel, SKIP_C, BEFORE)
            skipped = tl.load(
                entered_ptr + (pixel * SKIP_C)[:, None] + input_channel[None, :],
                mask=within & has_channel[None, :],
                other=0.0,
            )
            value += a * clamp(skipped.to(tl.float32), floor)
        y_ptr = activations_ptr + tl.load(states_ptr + target * STATE_FIELDS) * slot_size
        tl.store(y_ptr + places, value.to(activations_ptr.dtype.element_ty), mask=within)


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

    tiles = rows * CHANNEL_TILES * point_tiles
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        channel = program % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        point_tile = program // CHANNEL_TILES % point_tiles
        point = point_tile * POINTS + tl.arange(0, POINTS)
        path = program // CHANNEL_TILES // point_tiles
        source, target = tl.load(rows_ptr + path * ROW_FIELDS), tl.load(rows_ptr + path * ROW_FIELDS + 1)
        known = channel < C
        within = (point < points)[:, None] & known[None, :]
        places = (point * C)[:, None] + channel[None, :]

        # From here on the gradient is rescaled: its readers, the projection among them, take it as it is.
        shift = shift_of(tl.load(largest_ptr + source))
        tl.store(exponents_ptr + target, tl.load(exponents_ptr + source) + shift)
        source_ptr = gradients_ptr + tl.load(states_ptr + source * STATE_FIELDS) * slot_size
        value = tl.load(source_ptr + places, mask=within, other=0.0).to(tl.float32) * power_of_two(-shift)
        x_hat = tl.load(normalized_ptr + places, mask=within, other=0.0).to(tl.float32)
        tile_sums_ptr = sums_ptr + (path.to(tl.int64) * point_tiles + point_tile) * (2 * C) + channel
        tl.store(tile_sums_ptr, tl.sum(value, 0), mask=known)
        tl.store(tile_sums_ptr + C, tl.sum(value * x_hat, 0), mask=known)
        value *= tl.load(scales_ptr + channel, mask=known, other=0.0)[None, :]
        target_ptr = gradients_ptr + tl.load(states_ptr + target * STATE_FIELDS) * slot_size
        tl.store(target_ptr + places, value.to(gradients_ptr.dtype.element_ty), mask=within)


def ending_forward(
    network: TritonNetwork, activations: ActivationStates, task: Launch, saved: Saved | None = None
) -> None:
    """Compute the sums of a launch's rows.

    Args:
        saved: memory for x_hat of both BNs.
    """
    block = network.blocks[task.block]
    outputs, projects = block.output, block.projection is not None
    unit, skip_unit = block.ends[0], block.ends[-1]
    skip = NO_SKIP if not task.skip else PROJECTION if projects else DIRECT
    points, channels = elements(ELEMENTS, outputs.channels)
    total = activations.batch * outputs.pixels
    launch(
        _ending_forward_kernel,
        programs_for(task.count * -(-total // points) * -(-outputs.channels // channels), activations.values.device),
        ELEMENTS,
        activations_ptr=activations.values,
        slot_size=activations.values.shape[1],
        rows_ptr=activations.rows,
        launch_ptr=activations.launches[task.index],
        states_ptr=activations.states,
        points=total,
        height=outputs.height,
        width=outputs.width,
        skip_height=block.input.height,
        skip_width=block.input.width,
        gain_ptr=network.affine[unit, 0],
        bias_ptr=network.affine[unit, 1],
        epsilon=network.epsilons[unit],
        skip_gain_ptr=network.affine[skip_unit, 0],
        skip_bias_ptr=network.affine[skip_unit, 1],
        skip_epsilon=network.epsilons[skip_unit],
        floor=network.floor(block.first),
        statistics_ptr=activations.statistics,
        statistics_width=network.widest,
        normalized_ptr=None if saved is None else saved.unit_normalized(unit),
        skip_normalized_ptr=None if saved is None else saved.unit_normalized(skip_unit),
        C=outputs.channels,
        SKIP=skip.value,
        SKIP_C=block.input.channels,
        SKIP_STRIDE=block.stride,
        BEFORE=block.pad_before if skip is DIRECT else 0,
        RESIDUAL=task.residual,
        POINTS=points,
        BLOCK_N=channels,
    )


def ending_point_tiles(block: FusedBlock, batch: int) -> int:
    """Return the number of tiles that hold all pixels of a block's output."""
    return -(-batch * block.output.pixels // elements(ELEMENTS, block.output.channels)[0])


def ending_backward(gradients: GradientStates, saved: Saved, block: FusedBlock, task: Launch) -> None:
    """Take the gradients at a block's addition back through the BN after the last convolution or the projection."""
    unit, outputs = block.ends[0] if task.residual else block.ends[1], block.output
    points, channels = elements(ELEMENTS, outputs.channels)
    tiles = ending_point_tiles(block, gradients.batch)
    launch(
        _ending_backward_kernel,
        programs_for(task.count * tiles * -(-outputs.channels // channels), gradients.values.device),
        ELEMENTS,
        gradients_ptr=gradients.values,
        slot_size=gradients.values.shape[1],
        rows_ptr=gradients.rows,
        launch_ptr=gradients.launches[task.index],
        states_ptr=gradients.states,
        points=gradients.batch * outputs.pixels,
        scales_ptr=saved.scales[unit],
        normalized_ptr=saved.unit_normalized(unit),
        sums_ptr=gradients.sums,
        largest_ptr=gradients.largest,
        exponents_ptr=gradients.exponents,
        C=outputs.channels,
        POINTS=points,
        BLOCK_N=channels,
    )
    take_means(gradients, task, tiles, saved.scales[unit], outputs.channels, outputs.pixels)
