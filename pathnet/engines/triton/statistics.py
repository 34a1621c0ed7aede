"""Mean and variance of each channel of a batch, from those of the tiles, for all rows of a launch at once.

A program takes BLOCK_N channels of one row at a time. It loads count, mean and sum of squared deviations of TILES
tiles at once and merges them on two levels, both in a fixed order (Chan, Golub, LeVeque 1979): TILES tiles in
registers, first their mean, then the deviations from it; then these groups one after the other. Unlike a sum of
squares, this loses no digits where the mean is large compared with the deviation, and each number is read once.

In stage 1 of a CIFAR network at batch 128, 1,024 tiles of 16 channels are 197 KB: two programs take 512 tiles twice
each, 2 us (computed: 1 us for the bytes out of L2 at 64 per clock, 0.5 us for a load and its trees). The launch alone
of a second kernel for the upper level would cost as much, 36 times in a record of ResNet-110.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import ROWS
from pathnet.engines.triton.launch import launch, programs_for
from pathnet.engines.triton.schedule import Launch
from pathnet.engines.triton.state import ActivationStates
from pathnet.engines.triton.tiles import ROW_FIELDS

__all__ = ["take_statistics"]


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["launch_ptr"])
def _statistics_kernel(
    moments_ptr,
    rows_ptr,
    launch_ptr,
    statistics_ptr,
    statistics_width,
    tiles,
    C,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    channel_tiles = tl.cdiv(C, BLOCK_N)
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)

    for program in tl.range(
        tl.program_id(0), rows * channel_tiles, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        path = program // channel_tiles
        channel = program % channel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        known = channel < C
        moments = moments_ptr + path.to(tl.int64) * tiles * (3 * C) + channel
        count = tl.zeros([BLOCK_N], tl.float32)
        mean = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        start = 0
        while start < tiles:
            tile = start + tl.arange(0, TILES)
            places = moments[None, :] + (tile.to(tl.int64) * (3 * C))[:, None]
            mask = (tile < tiles)[:, None] & known[None, :]
            counts = tl.load(places, mask=mask, other=0.0)
            means = tl.load(places + C, mask=mask, other=0.0)
            deviations = tl.load(places + 2 * C, mask=mask, other=0.0)
            group_count = tl.maximum(tl.sum(counts, 0), 1.0)
            group_mean = tl.sum(counts * means, 0) / group_count
            difference = means - group_mean[None, :]
            squares += tl.sum(deviations + counts * difference * difference, 0)
            distance = group_mean - mean
            total = count + group_count
            squares += distance * distance * (count * (group_count / total))
            mean += distance * (group_count / total)
            count = total
            start += TILES
        target = tl.load(rows_ptr + path * ROW_FIELDS + 1).to(tl.int64)
        target_ptr = statistics_ptr + target * (2 * statistics_width) + channel
        tl.store(target_ptr, mean, mask=known)
        tl.store(target_ptr + statistics_width, squares / tl.maximum(count, 1.0), mask=known)


def take_statistics(activations: ActivationStates, task: Launch, tiles: int, channels: int) -> None:
    """Store mean and variance of every row's target in ``activations.statistics``.

    Args:
        task: the launch whose programs stored ``activations.moments`` [rows, tiles, 3, channels].
    """
    launch(
        _statistics_kernel,
        programs_for(task.count * -(-channels // ROWS.channels), activations.moments.device),
        ROWS,
        moments_ptr=activations.moments,
        rows_ptr=activations.rows,
        launch_ptr=activations.launches[task.index],
        statistics_ptr=activations.statistics,
        statistics_width=activations.statistics.shape[2],
        tiles=tiles,
        C=channels,
        TILES=ROWS.points,
        BLOCK_N=ROWS.channels,
    )
