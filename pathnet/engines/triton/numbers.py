"""Write a few numbers from the host by a kernel: a copy would wait for the device, and fail in the capture of a
graph."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.launch import Tile, launch

__all__ = ["write_numbers"]

ARGUMENTS = 16


@triton.jit(do_not_specialize=["first", "count", *(f"x{place}" for place in range(16))])
def _write_kernel(numbers_ptr, first, count, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    place = tl.arange(0, 16)
    number = tl.where(place == 0, x0, x1)
    number = tl.where(place == 2, x2, number)
    number = tl.where(place == 3, x3, number)
    number = tl.where(place == 4, x4, number)
    number = tl.where(place == 5, x5, number)
    number = tl.where(place == 6, x6, number)
    number = tl.where(place == 7, x7, number)
    number = tl.where(place == 8, x8, number)
    number = tl.where(place == 9, x9, number)
    number = tl.where(place == 10, x10, number)
    number = tl.where(place == 11, x11, number)
    number = tl.where(place == 12, x12, number)
    number = tl.where(place == 13, x13, number)
    number = tl.where(place == 14, x14, number)
    number = tl.where(place == 15, x15, number)
    tl.store(numbers_ptr + first + place, number, mask=place < count)


def write_numbers(numbers: Sequence[int], room: Tensor) -> None:
    """Write int32 numbers to the beginning of an int32 tensor, only by launches on the current stream."""
    for first in range(0, len(numbers), ARGUMENTS):
        part = numbers[first : first + ARGUMENTS]
        filled = [*part, *[0] * (ARGUMENTS - len(part))]
        arguments = {f"x{place}": number for place, number in enumerate(filled)}
        tile = Tile(ARGUMENTS, 1, 1, warps=1)
        launch(_write_kernel, 1, tile, numbers_ptr=room, first=first, count=len(part), **arguments)
