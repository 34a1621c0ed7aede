"""The kernels' tiles, and how they were chosen.

None has been timed on a GPU yet. They were chosen by arithmetic: one warp group of four warps multiplies 128 rows at
a time; a tile has as many columns as there are channels, up to 64; two gradients in a tile halve the reads of x_hat
and ReLU bits, while four would leave some groups of gradients that share them half empty. Among their neighbours, the
tiles of `DGRAD` are those for which the compiler emits the fewest instructions for as many rows and channels on an
H100 in BN mode ``batch`` (in float32 26 to 30 % fewer than for 64 points, 32 channels, depth 16 and two gradients).

None spills registers, and a multiprocessor has registers and shared memory for at least two programs, on an H100 and
on an A100. The A100's warps hold operands in registers too, so it has some tiles of its own, for 3 to 4 % more
instructions. All fit the 99 KB of shared memory of consumer GPUs: `tests/engines/triton/test_triton_compile.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pathnet.engines.triton.launch import Tile

__all__ = ["DGRAD", "ELEMENTS", "FLOAT32", "FOLDED", "FORWARD", "ROWS", "STRIDED", "WGRAD", "of_width"]

FLOAT32 = "ieee" if torch.version.hip or torch.version.xpu else "tf32x3"
"""Multiplication of float32 numbers: as three products of TF32 terms, or directly where Triton has no TF32."""

Table = dict[torch.dtype, dict[int, Tile]]
"""Tiles by the type of the operands and a number of channels; the smallest number that holds all channels is used."""

DGRAD: Table = {
    torch.bfloat16: {
        16: Tile(points=128, channels=16, depth=16, paths=2),
        32: Tile(
            points=64,
            channels=32,
            depth=32,
            paths=2,
            by_warp=Tile(points=64, channels=32, depth=16, paths=2),
        ),
        64: Tile(
            points=64,
            channels=64,
            depth=32,
            paths=2,
            by_warp=Tile(points=64, channels=64, depth=16, paths=2, stages=4),
        ),
    },
    torch.float32: {
        16: Tile(points=128, channels=16, depth=16, paths=2),
        32: Tile(points=64, channels=32, depth=32, paths=2),
        64: Tile(points=64, channels=64, depth=32, by_warp=Tile(points=64, channels=32, depth=16, paths=2)),
    },
}

STRIDED: Table = {
    torch.bfloat16: {
        16: Tile(points=128, channels=16, depth=16, paths=2),
        32: Tile(points=64, channels=32, depth=32, paths=2),
        64: Tile(points=64, channels=32, depth=32, paths=2),
    },
    torch.float32: {
        16: Tile(points=64, channels=16, depth=16, paths=2),
        32: Tile(points=64, channels=32, depth=16),
        64: Tile(points=64, channels=32, depth=16),
    },
}
"""Tiles like `DGRAD` for convolutions with a stride, where finding a tap's pixels, and a projection's product, take
registers."""

FORWARD: Table = {
    torch.bfloat16: {
        16: Tile(points=128, channels=16, depth=16),
        32: Tile(points=64, channels=32, depth=32),
        64: Tile(points=64, channels=32, depth=32, by_warp=Tile(points=64, channels=32, depth=16)),
    },
    torch.float32: {
        16: Tile(points=128, channels=16, depth=16),
        32: Tile(points=64, channels=32, depth=16),
        64: Tile(points=64, channels=32, depth=16),
    },
}
"""Tiles of the forward pass, where a record is a single row.

At batch 128 the stages of a CIFAR network have 1,024, 512 and 256 tiles. Each of 132 multiprocessors has room for 3,
4 and 4 float32 programs (146 to 167, 111 to 126 and 118 to 128 registers). Stage 2 is one wave of 528 places, 97 %
full, with 16 warps on each multiprocessor; tiles of 128 points would be 256 programs, 8 warps on each, with a fifth
fewer instructions. Stage 3 has two programs on 124 multiprocessors and one on 8; half as many channels in a tile
would fill the other two places, and normalise each input twice as often.
"""

WGRAD: Table = {
    torch.bfloat16: {
        16: Tile(points=2048, channels=64, depth=64),
        32: Tile(points=2048, channels=64, depth=64),
        64: Tile(points=2048, channels=64, depth=64),
    },
    torch.float32: {
        16: Tile(points=2048, channels=32, depth=32),
        32: Tile(points=2048, channels=32, depth=32),
        64: Tile(points=2048, channels=32, depth=32),
    },
}

FOLDED = Tile(points=1, channels=64, depth=64)
"""Tile of the kernel that folds means into weights; its points are taps."""

ROWS = Tile(points=512, channels=8, depth=1, warps=8)
"""Tile of the kernels that add up the sums of tiles: points are tiles; 8 channels are 32 bytes, a sector of L2."""

ELEMENTS = Tile(points=1024, channels=1, depth=1)
"""Tile of the elementwise kernels."""


def of_width(table: Table, operand: Tensor, channels: int) -> Tile:
    """Return the tile for a result of ``channels`` channels, or the largest tile if there are more.

    Args:
        operand: a tensor of the type that is multiplied, on the device that multiplies.
    """
    tiles = table[operand.dtype]
    tile = tiles[min((width for width in tiles if width >= channels), default=max(tiles))]
    return tile.by_warp if tile.by_warp is not None and multiplies_by_warp(operand.device) else tile


@lru_cache
def multiplies_by_warp(device: torch.device) -> bool:
    """Return whether an NVIDIA GPU multiplies operands in registers, as all but compute capabilities 9 and 10 do."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] not in (9, 10)
