"""The tiles that kernels are launched with, apart from the kernels, and how each was found.

None has been timed on a GPU yet. They were chosen by arithmetic (128 rows a product are what one warp group of four
warps multiplies at a time; as many columns as there are channels, up to 64; two gradients a tile halve the reads of
x_hat and ReLU bits, four leave some groups of gradients that share them half empty), those of `DGRAD` among its
neighbours by what the compiler makes of them for an H100: the fewest instructions for as many rows and channels, in
BN mode ``batch`` (in float32 26 to 30 % fewer than 64 points, 32 channels, depth 16 and two gradients take). All
spill nothing, and a multiprocessor has registers and shared memory for two programs at least, on an H100 and on an
A100, whose warps hold operands in registers too and so have some tiles of their own, for 3 to 4 % more instructions;
99 KB of shared memory, which GPUs for consumers have, hold each: `tests/engines/triton/test_triton_compile.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pathnet.engines.triton.launch import Tile

__all__ = ["DGRAD", "ELEMENTS", "FLOAT32", "FOLDED", "FORWARD", "ROWS", "STRIDED", "WGRAD", "of_width"]

FLOAT32 = "ieee" if torch.version.hip or torch.version.xpu else "tf32x3"
"""How float32 numbers are multiplied: as three products of TF32 terms, or as they are where that is not to be had."""

Table = dict[torch.dtype, dict[int, Tile]]
"""Tiles by the type of the operands and the channels of the result: the smallest number that holds them all."""

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
"""As `DGRAD`, through convolutions with a stride: what finds a tap's pixels, and a projection's product beside it,
take registers."""

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
"""A record is a single row. At batch 128 the stages of a CIFAR network have 1,024, 512 and 256 tiles; of 132
multiprocessors each has room for 3, 4 and 4 programs of float32 (146 to 167, 111 to 126 and 118 to 128 registers).
Stage 2 is one wave of 528 places, 97 % full, with 16 warps a multiprocessor; tiles of 128 points would be 256
programs, 8 warps a multiprocessor, for a fifth fewer instructions. Stage 3 has two programs on 124 multiprocessors
and one on 8; half as many channels a tile would fill the other two places, and normalise each input twice as often.
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
"""Of the kernel that folds means into weights; its points are taps."""

ROWS = Tile(points=512, channels=8, depth=1, warps=8)
"""Of the kernels that add up sums of tiles: so many tiles at a time, so many channels (32 bytes, a sector of L2)."""

ELEMENTS = Tile(points=1024, channels=1, depth=1)
"""Of the kernels that go through gradients element by element."""


def of_width(table: Table, operand: Tensor, channels: int) -> Tile:
    """The tile for a result of so many channels, that of the most where there are more.

    Args:
        operand: of the type that is multiplied, on the device that multiplies.
    """
    tiles = table[operand.dtype]
    tile = tiles[min((width for width in tiles if width >= channels), default=max(tiles))]
    return tile.by_warp if tile.by_warp is not None and multiplies_by_warp(operand.device) else tile


@lru_cache
def multiplies_by_warp(device: torch.device) -> bool:
    """Whether an NVIDIA GPU multiplies what registers hold: those of all compute capabilities but 9 and 10."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] not in (9, 10)
