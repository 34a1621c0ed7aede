"""Launches: the tile that a kernel's programs own, and the one place where kernels are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

__all__ = ["Tile", "elements", "launch", "launching", "not_launching", "power_of_two_from", "programs_for"]

PROGRAMS = 12
"""Most programs a multiprocessor, for kernels whose programs take one tile after the other. However many of them run
side by side, 2, 3, 4, 6 or 12, they come in whole waves; and where there is nothing to do, 1,584 of them are through
in 2 us (reckoned: four waves on 132 multiprocessors)."""


@dataclass(frozen=True)
class Tile:
    """What one program owns, and with how many threads.

    Attributes:
        points: of the batch's pixels.
        channels: of the result.
        depth: channels (in `wgrad` pixels) that are multiplied at a time.
        paths: gradients.
        warps: of 32 threads.
        stages: of loads under way at a time.
        by_warp: the tile in its place where each warp multiplies what its registers hold; None where it is the same.
    """

    points: int
    channels: int
    depth: int
    paths: int = 1
    warps: int = 4
    stages: int = 3
    by_warp: Tile | None = None

    def split(self, pixels: int) -> tuple[int, int]:
        """Of images of so many pixels: how many samples the points are of, and how many pixels each."""
        own = min(self.points, power_of_two_from(pixels))
        return self.points // own, own

    def point_tiles(self, batch: int, pixels: int) -> int:
        """How many tiles hold all pixels of a batch."""
        samples, own = self.split(pixels)
        return -(-batch // samples) * -(-pixels // own)


def elements(tile: Tile, channels: int) -> tuple[int, int]:
    """Pixels and channels that a program takes at a time where it goes through a tile's elements one by one."""
    own = min(64, power_of_two_from(channels))
    return tile.points // own, own


def power_of_two_from(size: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (size - 1).bit_length()


def programs_for(tiles: int, device: torch.device) -> int:
    """How many programs share out the tiles of a launch whose number of rows is known on the device alone.

    Args:
        tiles: most that there can be.
    """
    return min(tiles, PROGRAMS * _multiprocessors(device))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        count: int = torch.xpu.get_device_properties(device).gpu_subslice_count
        return count
    return 1


_launching = ContextVar("launching", default=True)


def launching() -> bool:
    """Whether kernels that are launched are run."""
    return _launching.get()


@contextmanager
def not_launching() -> Iterator[None]:
    """Have kernels that are launched got ready for that, and not run."""
    token = _launching.set(False)
    try:
        yield
    finally:
        _launching.reset(token)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel on the current device and stream, its arguments by name."""
    if programs > 0:
        if launching():
            kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)
        else:
            kernel.warmup(grid=(programs,), **arguments, num_warps=tile.warps, num_stages=tile.stages)
