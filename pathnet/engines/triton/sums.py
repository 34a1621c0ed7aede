"""The two means of BN's backward pass, from the tiles' sums, for all rows of a launch at once.

A program owns BLOCK_N channels of one row, and adds tile after tile in their order: the result does not depend on
what ran when. At 1,024 tiles of 16 channels (stage 1 of a CIFAR network at batch 128) that is 131 KB a row out of L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.configurations import ROWS
from pathnet.engines.triton.launch import launch
from pathnet.engines.triton.state import Gradients
from pathnet.engines.triton.tiles import ROW_FIELDS

__all__ = ["take_means"]


@triton.jit(do_not_specialize=["tiles", "values"], do_not_specialize_on_alignment=["rows_ptr"])
def _means_kernel(
    sums_ptr,
    rows_ptr,
    scales_ptr,
    corrections_ptr,
    corrections_width,
    tiles,
    values,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    path = tl.program_id(0) // CHANNEL_TILES
    channel = tl.program_id(0) % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(rows_ptr + path * ROW_FIELDS + 1)
    if target >= 0:
        known = channel < C
        first = tl.zeros([BLOCK_N], tl.float32)
        second = tl.zeros([BLOCK_N], tl.float32)
        start = 0
        while start < tiles:
            tile = start + tl.arange(0, TILES)
            own = sums_ptr + ((path.to(tl.int64) * tiles + tile) * (2 * C))[:, None] + channel[None, :]
            mask = (tile < tiles)[:, None] & known[None, :]
            first += tl.sum(tl.load(own, mask=mask, other=0.0), 0)
            second += tl.sum(tl.load(own + C, mask=mask, other=0.0), 0)
            start += TILES
        scale = tl.load(scales_ptr + channel, mask=known, other=0.0) / values
        made = corrections_ptr + target.to(tl.int64) * (2 * corrections_width) + channel
        tl.store(made, first * scale, mask=known)
        tl.store(made + corrections_width, second * scale, mask=known)


def take_means(gradients: Gradients, rows: Tensor, tiles: int, scales: Tensor, channels: int, pixels: int) -> None:
    """Puts the means of every row's target into ``gradients.corrections``.

    Args:
        rows: int32 [rows, 5], those of the launch whose programs left ``gradients.sums`` [rows, tiles, 2, channels].
        scales: float32 [channels], BN's factors.
        pixels: of the image.
    """
    launch(
        _means_kernel,
        len(rows) * -(-channels // ROWS.channels),
        ROWS,
        gradients.sums,
        rows,
        scales,
        gradients.corrections,
        gradients.corrections.shape[2],
        tiles,
        gradients.batch * pixels,
        C=channels,
        TILES=ROWS.points,
        BLOCK_N=ROWS.channels,
    )
