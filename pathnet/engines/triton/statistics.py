"""Mean and variance of each channel of a batch, from the tiles' own, for all rows of a launch at once.

A program owns BLOCK_N channels of one row. It merges count, mean and sum of squared deviations of tile after tile in
their order (Chan, Golub, LeVeque 1979), twice through them: first the mean, then what tiles deviate from it. Nothing
is lost where the mean is large beside the deviation, as it is when squares are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.configurations import ROWS
from pathnet.engines.triton.launch import launch
from pathnet.engines.triton.state import Activations
from pathnet.engines.triton.tiles import ROW_FIELDS

__all__ = ["take_statistics"]


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["rows_ptr"])
def _statistics_kernel(
    moments_ptr,
    rows_ptr,
    statistics_ptr,
    statistics_width,
    tiles,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    path = tl.program_id(0) // CHANNEL_TILES
    channel = tl.program_id(0) % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    known = channel < C
    target = tl.load(rows_ptr + path * ROW_FIELDS + 1).to(tl.int64)
    moments = moments_ptr + path.to(tl.int64) * tiles * (3 * C)
    count = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, TILES)
        own = moments + (tile * (3 * C))[:, None] + channel[None, :]
        mask = (tile < tiles)[:, None] & known[None, :]
        values = tl.load(own, mask=mask, other=0.0)
        count += tl.sum(values, 0)
        total += tl.sum(values * tl.load(own + C, mask=mask, other=0.0), 0)
        start += TILES
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK_N], tl.float32)
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, TILES)
        own = moments + (tile * (3 * C))[:, None] + channel[None, :]
        mask = (tile < tiles)[:, None] & known[None, :]
        values = tl.load(own, mask=mask, other=0.0)
        deviation = tl.load(own + C, mask=mask, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(own + 2 * C, mask=mask, other=0.0) + values * deviation * deviation, 0)
        start += TILES
    made = statistics_ptr + target * (2 * statistics_width) + channel
    tl.store(made, mean, mask=known)
    tl.store(made + statistics_width, squares / tl.maximum(count, 1.0), mask=known)


def take_statistics(activations: Activations, rows: Tensor, tiles: int, channels: int) -> None:
    """Puts mean and variance of every row's target into ``activations.statistics``.

    Args:
        rows: int32 [rows, 5], those of the launch whose programs left ``activations.moments`` [rows, tiles, 3,
            channels].
    """
    launch(
        _statistics_kernel,
        len(rows) * -(-channels // ROWS.channels),
        ROWS,
        activations.moments,
        rows,
        activations.statistics,
        activations.statistics.shape[2],
        tiles,
        C=channels,
        TILES=ROWS.points,
        BLOCK_N=ROWS.channels,
    )
