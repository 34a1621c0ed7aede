"""The tiles that kernels are launched with, apart from the kernels, and how each was found.

None has been timed on a GPU yet. They were chosen by arithmetic (128 rows a product are what one warp group of four
warps multiplies at a time; as many columns as there are channels, up to 64; two gradients a tile halve the reads of
x_hat and ReLU bits, four leave some groups of gradients that share them half empty), those of `DGRAD` among its
neighbours by what the compiler makes of them for an H100: the fewest instructions for as many rows and channels, in
BN mode ``batch`` (in float32 26 to 30 % fewer than 64 points, 32 channels, depth 16 and two gradients take). All
spill nothing, and a multiprocessor has registers and shared memory for two programs at least:
`tests/test_triton_compile.py`.
"""

from __future__ import annotations

import torch

from pathnet.engines.triton.launch import Tile

__all__ = ["DGRAD", "ELEMENTS", "FLOAT32", "FOLDED", "FORWARD", "ROWS", "STRIDED", "WGRAD", "of_width"]

FLOAT32 = "ieee" if torch.version.hip or torch.version.xpu else "tf32x3"
"""How float32 numbers are multiplied: as three products of TF32 terms, or as they are where that is not to be had."""

Table = dict[torch.dtype, dict[int, Tile]]
"""Tiles by the type of the operands and the channels of the result: the smallest number that holds them all."""

DGRAD: Table = {
    torch.bfloat16: {
        16: Tile(points=128, channels=16, depth=16, paths=2),
        32: Tile(points=64, channels=32, depth=32, paths=2),
        64: Tile(points=64, channels=64, depth=32, paths=2),
    },
    torch.float32: {
        16: Tile(points=128, channels=16, depth=16, paths=2),
        32: Tile(points=64, channels=32, depth=32, paths=2),
        64: Tile(points=64, channels=64, depth=32),
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
"""As `DGRAD`, through convolutions with a stride: what finds a tap's pixels, and a projection's product beside it,
take registers."""

FORWARD: Table = {
    torch.bfloat16: {
        16: Tile(points=128, channels=16, depth=16),
        32: Tile(points=128, channels=32, depth=32),
        64: Tile(points=128, channels=64, depth=32),
    },
    torch.float32: {
        16: Tile(points=128, channels=16, depth=16),
        32: Tile(points=128, channels=32, depth=16),
        64: Tile(points=64, channels=32, depth=16),
    },
}

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
"""Of the kernel that folds means into weights; its points are taps."""

ROWS = Tile(points=512, channels=8, depth=1, warps=8)
"""Of the kernels that add up sums of tiles: so many tiles at a time, so many channels (32 bytes, a sector of L2)."""

ELEMENTS = Tile(points=1024, channels=1, depth=1)
"""Of the kernels that go through gradients element by element."""


def of_width(table: Table, dtype: torch.dtype, channels: int) -> Tile:
    """The tile for a result of so many channels, that of the most where there are more."""
    tiles = table[dtype]
    return tiles[min((width for width in tiles if width >= channels), default=max(tiles))]
