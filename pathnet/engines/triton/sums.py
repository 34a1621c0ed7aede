"""The two means of BN's backward pass, from the tiles' sums, for all rows of a launch at once.

A program takes BLOCK_N channels of one row at a time. It loads the sums of TILES tiles at once, adds them up in a
tree, and adds these totals in their order, so the result depends neither on timing nor on the number of
programs. In stage 1 of a CIFAR network at batch 128 a row has 1,024 tiles of 16 channels, 131 KB: two programs load
512 tiles twice each, under 2 us (computed: 0.6 us for the bytes out of L2 at 64 per clock, 0.5 us for a load and its
tree). A second kernel that merges ranges would spread the bytes over more multiprocessors, but its launch would cost
as much.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.configurations import ROWS
from pathnet.engines.triton.launch import launch, programs_for
from pathnet.engines.triton.schedule import Launch
from pathnet.engines.triton.state import GradientStates
from pathnet.engines.triton.tiles import ROW_FIELDS

__all__ = ["take_means"]


@triton.jit(do_not_specialize=["tiles", "values"], do_not_specialize_on_alignment=["launch_ptr"])
def _means_kernel(
    sums_ptr,
    rows_ptr,
    launch_ptr,
    scales_ptr,
    corrections_ptr,
    corrections_width,
    tiles,
    values,
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
        target = tl.load(rows_ptr + path * ROW_FIELDS + 1)
        known = (channel < C) & (target >= 0)
        sums = sums_ptr + path.to(tl.int64) * tiles * (2 * C) + channel
        first = tl.zeros([BLOCK_N], tl.float32)
        second = tl.zeros([BLOCK_N], tl.float32)
        start = 0
        while start < tiles:
            tile = start + tl.arange(0, TILES)
            places = sums[None, :] + (tile.to(tl.int64) * (2 * C))[:, None]
            mask = (tile < tiles)[:, None] & known[None, :]
            first += tl.sum(tl.load(places, mask=mask, other=0.0), 0)
            second += tl.sum(tl.load(places + C, mask=mask, other=0.0), 0)
            start += TILES
        scale = tl.load(scales_ptr + channel, mask=known, other=0.0) / values
        means = corrections_ptr + tl.maximum(target, 0).to(tl.int64) * (2 * corrections_width) + channel
        tl.store(means, first * scale, mask=known)
        tl.store(means + corrections_width, second * scale, mask=known)


def take_means(
    gradients: GradientStates, task: Launch, tiles: int, scales: Tensor, channels: int, pixels: int
) -> None:
    """Store the means of every row's target in ``gradients.corrections``.

    Args:
        task: the launch whose programs stored ``gradients.sums`` [rows, tiles, 2, channels].
        scales: float32 [channels], BN's factors.
        pixels: number of pixels of an image.
    """
    launch(
        _means_kernel,
        programs_for(task.count * -(-channels // ROWS.channels), scales.device),
        ROWS,
        sums_ptr=gradients.sums,
        rows_ptr=gradients.rows,
        launch_ptr=gradients.launches[task.index],
        scales_ptr=scales,
        corrections_ptr=gradients.corrections,
        corrections_width=gradients.corrections.shape[2],
        tiles=tiles,
        values=gradients.batch * pixels,
        C=channels,
        TILES=ROWS.points,
        BLOCK_N=ROWS.channels,
    )
