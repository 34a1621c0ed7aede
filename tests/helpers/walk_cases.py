"""The plans that every instruction set runs, and the tolerances of passes."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from torch import Tensor

from helpers.plans import (
    BEFORE_RELU,
    BEHIND_RELU,
    Plan,
)
from helpers.random_plans import make_plan, random_plan
from helpers.tolerances import FLOAT32_WALK, ROUNDED_WALK
from pathnet import native

INSTRUCTION_SETS = native.build_facts()["instruction_sets"] if native.LOADED else []
MODES = ["running", "batch"]
SEEDS = 30
EMULATED_SEEDS = 6
"""Fewer, since AMX may run in software."""


FEWEST_VALUES = 8
"""Minimum number of values per channel for batch statistics; mean and variance of two leave only rounding errors."""


def seeds(isa: str) -> range:
    return range(EMULATED_SEEDS if isa == "amx" else SEEDS)


@functools.cache
def plan(seed: int, wide: bool, behind_relu: bool = False, bn: str = "running") -> Plan:
    """Return a random plan. Skips after the ReLU are those of closed blocks in BN mode ``batch``."""
    kinds = BEHIND_RELU if behind_relu else BEFORE_RELU
    return random_plan(seed, wide, kinds, closed=behind_relu and bn == "batch")


def plan_of_kind(kind: int, blocks: int, seed: int = 0) -> Plan:
    """Return a plan with one kind of skips, at whose BNs each channel has values enough for statistics."""
    for attempt in itertools.count():
        network = make_plan(np.random.default_rng([seed, attempt]), 3, (5, 9, 10), blocks, kinds=[kind])
        if network.least_values >= 4 * FEWEST_VALUES:
            return network
    raise AssertionError


def sizes(gradients: Tensor, bn: str) -> Tensor:
    """Return the norms [P, B] of every sample's gradient, or [P, 1] of the batch's, which statistics tie together."""
    flat = gradients.flatten(2) if bn == "running" else gradients.flatten(1)[:, None]
    # Squares of 1e-160 would leave float64.
    largest = flat.abs().amax(2, keepdim=True).clamp_min(1e-300)
    return (flat / largest).norm(dim=2) * largest[..., 0]


def terms_of(isa: str, bf16: bool) -> int:
    """Return the number of bfloat16 terms of a number in products; 0 if it is not rounded."""
    if bf16 and isa in ("avx512bf16", "amx"):
        return 1
    return 2 if isa == "amx" else 0


def admitted(expected: Tensor, rounded: Tensor, bn: str, terms: int) -> Tensor:
    """Return float64 [P, B] or [P, 1], the largest errors that a pass may have; ``rounded`` is the float64 pass with
    that many terms."""
    floor = (2.0**-7 if terms == 1 else FLOAT32_WALK) * sizes(expected, bn)
    return floor if terms == 0 else floor + ROUNDED_WALK * sizes(rounded - expected, bn)
