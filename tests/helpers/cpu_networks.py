"""Tapes of the cpu engine on each instruction set, and tolerances of their batches' norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import pathnet
from helpers.judging import TOLERANCES
from helpers.walk_cases import INSTRUCTION_SETS
from pathnet import scaling
from pathnet.models import ResidualNet

SEEDS = 23


EMULATED_SEEDS = 4
"""Number of seeds for AMX, which may run in software."""


def each_seed(count: int = SEEDS) -> list[Any]:
    """Return pairs of an instruction set and a seed."""
    return [(isa, seed) for isa in INSTRUCTION_SETS for seed in range(EMULATED_SEEDS if isa == "amx" else count)]


def recorded(net: ResidualNet, images: Tensor, labels: Tensor, bn: str, precision: str) -> pathnet.Tape:
    return pathnet.record(net, images, labels, bn=bn, engine="cpu", precision=precision)  # type: ignore[arg-type]


def random_paths(n: int, seed: int) -> Tensor:
    """Return float64 [6, n, 2]: lengths 0 and n, one of them twice, and random lengths."""
    codes = np.random.default_rng(seed).integers(0, 2, (6, n))
    codes[0], codes[1], codes[2] = 0, 1, 0
    return torch.from_numpy(np.stack([1 - codes, codes], 2)).double()


def check_batches(norms: Tensor, expected: Tensor, precision: str) -> None:
    torch.testing.assert_close(
        scaling.combine(norms), scaling.combine(expected), rtol=TOLERANCES[precision][0], atol=0
    )
