"""A network of one block with its states, for single launches of the triton engine's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pathnet.engines.triton.dgrad import dgrad_point_tiles
from pathnet.engines.triton.endings import ending_point_tiles
from pathnet.engines.triton.folding import constants_size, folded_size
from pathnet.engines.triton.forward import forward_tile
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.packing import network_of
from pathnet.engines.triton.schedule import NOTHING
from pathnet.engines.triton.state import ActivationStates, GradientStates, Saved
from pathnet.models import PostactBlock, PreactBlock, ResidualNet

__all__ = [
    "BATCH",
    "CAPACITY",
    "STATES",
    "activations_of",
    "gradients_of",
    "network_of_a_block",
    "random_numbers",
    "row_table",
    "saved_of",
]

BATCH, CAPACITY, STATES, FIRST = 3, 8, 12, 3
"""Images, maximum number of rows of a launch, states, and rows of another launch before them."""

GARBAGE = 1 << 28
"""Stands in rows that no kernel may read."""


def network_of_a_block(kind: type[PreactBlock | PostactBlock], shape: Sequence[int] = (4, 5, 6)) -> TritonNetwork:
    torch.manual_seed(0)
    channels = shape[0]
    block = kind(channels, (3, 3), (channels, channels), 1, "projection")
    return network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), "batch", "float32", shape)


def random_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def row_table(rows: Sequence[tuple[int, int, int, float, float]], count: int) -> tuple[Tensor, Tensor]:
    """Return rows between those of another launch and garbage, and the launch's first row and number of rows."""
    table = np.full((FIRST + CAPACITY, 5), GARBAGE, dtype=np.int32)
    for place, row in enumerate(rows, FIRST):
        table[place] = [*row[:3], *np.array(row[3:], dtype=np.float32).view(np.int32)]
    return torch.from_numpy(table), torch.tensor([[FIRST, count]], dtype=torch.int32)


def saved_of(network: TritonNetwork) -> Saved:
    begin = network.normalized_starts(BATCH)
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 256, network.bits_starts(BATCH)[-1], dtype=np.uint8))
    scales = random_numbers(len(network.affine), network.widest)
    starts = torch.tensor(begin[:-1])
    return Saved(bits, network.bits_starts(BATCH), random_numbers(begin[-1]), begin, starts, scales)


def gradients_of(network: TritonNetwork, rows: Tensor, launch: Tensor, waiting: int) -> GradientStates:
    """Return states in the slots of their own number; the first six await the means of the unit ``waiting``."""
    block = network.blocks[0]
    tiles = [dgrad_point_tiles(conv, BATCH) for conv in block.convolutions]
    most = max(*tiles, ending_point_tiles(block, BATCH))
    conv = block.convolutions[0]
    states = torch.tensor([[state, waiting if state < 6 else NOTHING] for state in range(STATES)], dtype=torch.int32)
    magnitudes = random_numbers(STATES, 1).abs().view(torch.int32)
    return GradientStates(
        random_numbers(STATES, -(-BATCH * network.largest // 16) * 16),
        rows,
        launch,
        states,
        torch.where(torch.arange(STATES)[:, None] < 6, magnitudes, 0),
        torch.arange(STATES, dtype=torch.int32)[:, None].contiguous(),
        random_numbers(STATES, 2, network.widest),
        torch.full([CAPACITY * most * 2 * network.widest], torch.nan),
        torch.full([CAPACITY * folded_size(conv)], torch.nan),
        torch.full([CAPACITY * constants_size(conv)], torch.nan),
        BATCH,
        True,
    )


def activations_of(network: TritonNetwork, rows: Tensor, launch: Tensor) -> ActivationStates:
    block = network.blocks[0]
    tiles = max(forward_tile(conv).point_tiles(BATCH, conv.output.pixels) for conv in block.convolutions)
    states = torch.tensor([[state, NOTHING] for state in range(STATES)], dtype=torch.int32)
    return ActivationStates(
        random_numbers(STATES, -(-BATCH * network.largest // 16) * 16),
        rows,
        launch,
        states,
        random_numbers(STATES, 2, network.widest).abs(),
        torch.full([CAPACITY * tiles * 3 * network.widest], torch.nan),
        BATCH,
    )
