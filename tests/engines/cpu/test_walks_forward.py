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
    own = plan(seed, wide, behind_relu, bn)
    return truth_forward(own, bn, torch.ones(own.routing.shape[1:]))


@functools.cache
def judged_outputs(seed: int, wide: bool, bn: str, behind_relu: bool, dtype: torch.dtype) -> Tensor:
    """float64 [P, B, C, H, W], under all of the plan's routings."""
    own = plan(seed, wide, behind_relu, bn)
    return torch.stack([truth_forward(own, bn, routing, dtype).output.double() for routing in own.routing])


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
def test_random_plans_walk_forward_like_pytorch(isa: str, bn: str, behind_relu: bool, wide: bool) -> None:
    for seed in seeds(isa):
        given = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        # What of the coefficients cancels is as far off as float32 is.
        expected, rounded = (judged_outputs(seed, wide, bn, behind_relu, d) for d in (torch.float64, torch.float32))
        outputs = FORWARD[bn](*given.forward_arguments(bn))[0].double()
        limit = FLOAT32_WALK * sizes(expected, bn) + ROUNDED_WALK * sizes(rounded - expected, bn)
        assert (sizes(outputs - expected, bn) <= limit).all(), f"seed {seed}"


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
def test_random_plans_are_recorded_like_pytorch(isa: str, bn: str, behind_relu: bool, wide: bool) -> None:
    for seed in seeds(isa):
        given = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        expected = judged_forward(seed, wide, bn, behind_relu)
        output, relu_bits, *statistics = FORWARD[bn](*given.forward_arguments(bn, record=True))
        assert relative_error(output[0], expected.output) <= FLOAT32_WALK, f"seed {seed}"
        # Bits of values that rounding may take across zero are not judged.
        own, sure = (
            replace(
                given,
                bits=[None if row[UnitColumn.BITS] < 0 else judge(expected.values[u]) for u, row in rows(given)],
            )
            for judge in (lambda x: x > 0, lambda x: x.abs() > 1e-4 * x.abs().mean())
        )
        assert not ((own.relu_bits() ^ relu_bits) & sure.relu_bits()).any(), f"seed {seed}"
        if bn == "batch":
            units = sorted(expected.normalized)
            normalized = torch.cat([by_pixel(expected.normalized[u]).flatten() for u in units])
            assert relative_error(statistics[0], normalized) <= FLOAT32_WALK, f"seed {seed}"
            scales = torch.cat([expected.scales[u] for u in units])
            torch.testing.assert_close(statistics[1].double(), scales, rtol=FLOAT32_WALK, atol=0)


def rows(given: Plan) -> list[tuple[int, list[int]]]:
    return [*enumerate(given.units.tolist())]


def test_bits_beyond_the_channels_are_zero(isa: str) -> None:
    given = plan_of_kind(IDENTITY, blocks=2)
    full = replace(given, bits=[None if own is None else torch.ones_like(own) for own in given.bits])
    for bn in MODES:
        relu_bits = FORWARD[bn](*given.forward_arguments(bn, record=True))[1]
        assert relu_bits.any() and not (relu_bits & ~full.relu_bits()).any()
