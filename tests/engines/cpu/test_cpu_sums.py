"""The cpu engine's sums by length."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.cases import Case, measured_net
from helpers.cpu_networks import SEEDS, each_seed, recorded
from helpers.judging import TOLERANCES, check_sums, random_routings, truth_sums
from helpers.walk_cases import INSTRUCTION_SETS, MODES

from pathnet import native, scaling
from pathnet.scaling import ScaledGradient

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(("isa", "seed"), each_seed(SEEDS // 2))
def test_sums_by_length_are_those_of_every_path(
    isa: str, seed: int, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = measured_net(seed, small=True)
    tape = recorded(net, images, labels, bn, precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS[:2])
def test_sums_by_length_of_54_blocks(isa: str, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge norms of the batch, in bfloat16 for the lengths up to 45.

    Where products are those of bfloat16 numbers, or of two terms of them, the batch's norm averages few roundings
    along 54 modules on small images, and the tolerance is a sample's.
    """
    monkeypatch.setenv("PATHNET_ISA", isa)
    case = Case("deep", 110, width=8, side=16, batch=4)
    tape = recorded(case.net(), *case.images(), bn, precision)
    norms = scaling.combine(tape._record.walk.sums_by_length_norms(tape._record.start, torch.ones(tape.n, 2)))
    expected = scaling.combine(scaling.norms(*deep_sums(bn)))
    rounds = precision == "bfloat16" or isa == "amx"
    judged = slice(46 if precision == "bfloat16" else 55)
    torch.testing.assert_close(norms[judged], expected[judged], rtol=TOLERANCES[precision][int(rounds)], atol=0)


@functools.cache
def deep_sums(bn: str) -> ScaledGradient:
    """Return the truth on the bits of the float32 forward pass, which instruction sets change by rounding alone."""
    case = Case("deep", 110, width=8, side=16, batch=4)
    return truth_sums(recorded(case.net(), *case.images(), bn, "float32"), torch.ones(54, 2))
