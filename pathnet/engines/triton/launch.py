"""Launches: the tiles of programs, and the only calls of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

__all__ = [
    "Tile",
    "elements",
    "launch",
    "launching",
    "not_launching",
    "on_device",
    "power_of_two_from",
    "programs_for",
]

PROGRAMS = 12
"""Maximum number of programs per multiprocessor, if a program processes one tile after the other. 12 is a multiple of
2, 3, 4, 6 and 12, so with any of these occupancies the last wave is full. Programs without work exit at once: 1,584
of them in 2 us (computed, not measured: four waves on 132 multiprocessors)."""


@dataclass(frozen=True)
class Tile:
    """The part of a result that one program computes, and the program's resources.

    Attributes:
        points: number of the batch's pixels.
        channels: number of the result's channels.
        depth: number of channels (in `wgrad` pixels) that are multiplied at a time.
        paths: number of gradients.
        warps: number of warps, 32 threads each.
        stages: number of stages in the software pipeline of loads.
        by_warp: the tile for GPUs whose warps multiply operands in registers; None where it is the same.
    """

    points: int
    channels: int
    depth: int
    paths: int = 1
    warps: int = 4
    stages: int = 3
    by_warp: Tile | None = None

    def split(self, pixels: int) -> tuple[int, int]:
        """Return the numbers of samples in a tile, and of pixels of each, for images of ``pixels`` pixels."""
        pixels_each = min(self.points, power_of_two_from(pixels))
        return self.points // pixels_each, pixels_each

    def point_tiles(self, batch: int, pixels: int) -> int:
        """Return the number of tiles that hold all pixels of a batch."""
        samples, pixels_each = self.split(pixels)
        return -(-batch // samples) * -(-pixels // pixels_each)


def elements(tile: Tile, channels: int) -> tuple[int, int]:
    """Return the pixels and channels that a program of an elementwise kernel processes at a time."""
    channels_each = min(64, power_of_two_from(channels))
    return tile.points // channels_each, channels_each


def power_of_two_from(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def programs_for(tiles: int, device: torch.device) -> int:
    """Return the number of programs that share the tiles of a launch; the device alone knows its number of rows.

    Args:
        tiles: maximum number of tiles.
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
    """Return whether launched kernels run."""
    return _launching.get()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a tensors' device the current one, which launches go to."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@contextmanager
def not_launching() -> Iterator[None]:
    """Prepare launched kernels in this context, and do not run them."""
    token = _launching.set(False)
    try:
        yield
    finally:
        _launching.reset(token)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel on the current device and stream, its arguments by name."""
    if programs > 0:
        # What kernel[(programs,)](...) and kernel.warmup(...) call, without another copy of the arguments.
        kernel.run(
            grid=(programs,),
            warmup=not launching(),
            **arguments,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
