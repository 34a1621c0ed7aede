"""Outputs and records of every instruction set, against float64."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from helpers.oracles import relative_error
from helpers.plan_truths import Recorded, truth_forward
from helpers.plans import (
    FORWARD,
    IDENTITY,
    Plan,
    by_pixel,
)
from helpers.tolerances import FLOAT32_WALK, ROUNDED_WALK
from helpers.walk_cases import (
    FEWEST_VALUES,
    MODES,
    plan,
    plan_of_kind,
    seeds,
    sizes,
)
from torch import Tensor

from pathnet import native
from pathnet.engines.tables import UnitColumn

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@functools.cache
def judged_forward(seed: int, wide: bool, bn: str, behind_relu: bool) -> Recorded:
    network = plan(seed, wide, behind_relu, bn)
    return truth_forward(network, bn, torch.ones(network.routing.shape[1:]))


@functools.cache
def judged_outputs(seed: int, wide: bool, bn: str, behind_relu: bool, dtype: torch.dtype) -> Tensor:
    """Return float64 [P, B, C, H, W], the outputs under all of the plan's routings."""
    network = plan(seed, wide, behind_relu, bn)
    return torch.stack([truth_forward(network, bn, routing, dtype).output.double() for routing in network.routing])


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
def test_random_plans_walk_forward_like_pytorch(isa: str, bn: str, behind_relu: bool, wide: bool) -> None:
    for seed in seeds(isa):
        network = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and network.least_values < FEWEST_VALUES:
            continue
        # Where coefficients cancel, the result is as far off as float32 is.
        expected, rounded = (judged_outputs(seed, wide, bn, behind_relu, d) for d in (torch.float64, torch.float32))
        outputs = FORWARD[bn](*network.forward_arguments(bn))[0].double()
        limit = FLOAT32_WALK * sizes(expected, bn) + ROUNDED_WALK * sizes(rounded - expected, bn)
        assert (sizes(outputs - expected, bn) <= limit).all(), f"seed {seed}"


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
def test_random_plans_are_recorded_like_pytorch(isa: str, bn: str, behind_relu: bool, wide: bool) -> None:
    for seed in seeds(isa):
        network = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and network.least_values < FEWEST_VALUES:
            continue
        expected = judged_forward(seed, wide, bn, behind_relu)
        output, relu_bits, *statistics = FORWARD[bn](*network.forward_arguments(bn, record=True))
        assert relative_error(output[0], expected.output) <= FLOAT32_WALK, f"seed {seed}"
        # Bits of values so small that rounding may change their sign are not judged.
        positive, sure = (
            replace(
                network,
                bits=[None if row[UnitColumn.BITS] < 0 else judge(expected.values[u]) for u, row in rows(network)],
            )
            for judge in (lambda x: x > 0, lambda x: x.abs() > 1e-4 * x.abs().mean())
        )
        assert not ((positive.relu_bits() ^ relu_bits) & sure.relu_bits()).any(), f"seed {seed}"
        if bn == "batch":
            units = sorted(expected.normalized)
            normalized = torch.cat([by_pixel(expected.normalized[u]).flatten() for u in units])
            assert relative_error(statistics[0], normalized) <= FLOAT32_WALK, f"seed {seed}"
            scales = torch.cat([expected.scales[u] for u in units])
            torch.testing.assert_close(statistics[1].double(), scales, rtol=FLOAT32_WALK, atol=0)


def rows(network: Plan) -> list[tuple[int, list[int]]]:
    return [*enumerate(network.units.tolist())]


def test_bits_beyond_the_channels_are_zero(isa: str) -> None:
    network = plan_of_kind(IDENTITY, blocks=2)
    full = replace(network, bits=[None if bits is None else torch.ones_like(bits) for bits in network.bits])
    for bn in MODES:
        relu_bits = FORWARD[bn](*network.forward_arguments(bn, record=True))[1]
        assert relu_bits.any() and not (relu_bits & ~full.relu_bits()).any()
