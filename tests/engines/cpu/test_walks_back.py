"""Backward passes along routings by every instruction set, and sums by length, against float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from helpers.plan_truths import truth_back
from helpers.plans import (
    BEHIND_RELU,
    IDENTITY,
    PAD,
    PROJECTION,
    SUMS,
    Plan,
    walked,
)
from helpers.walk_cases import (
    FEWEST_VALUES,
    MODES,
    admitted,
    plan,
    plan_of_kind,
    seeds,
    sizes,
    terms_of,
)
from torch import Tensor

from pathnet import native
from pathnet.engines.tables import BlockColumn

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@functools.cache
def judged(seed: int, wide: bool, bn: str, terms: int = 0, behind_relu: bool = False) -> Tensor:
    return truth_back(plan(seed, wide, behind_relu, bn), bn, terms)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_random_plans_walk_back_like_autograd(isa: str, bf16: bool, bn: str, wide: bool) -> None:
    """The norm of the difference judges each (path, sample), so a small one cannot hide behind a large one."""
    kinds, terms = torch.zeros(3), terms_of(isa, bf16)
    for seed in seeds(isa):
        network = plan(seed, wide)
        if bn == "batch" and network.least_values < FEWEST_VALUES:
            continue
        expected = judged(seed, wide, bn)
        grads, norms = walked(network, bn, bf16)
        error = sizes(grads - expected, bn)
        assert (error <= admitted(expected, judged(seed, wide, bn, terms), bn, terms)).all(), f"seed {seed}"
        torch.testing.assert_close(norms, grads.flatten(2).norm(dim=2), rtol=1e-12, atol=0)
        kinds += torch.bincount(network.blocks[:, BlockColumn.SKIP], minlength=3)
    assert kinds.min() >= (1 if isa == "amx" else 5), kinds


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_plans_with_skips_behind_the_relu_walk_back_like_autograd(isa: str, bf16: bool, bn: str, wide: bool) -> None:
    kinds, terms = torch.zeros(5), terms_of(isa, bf16)
    for seed in seeds(isa):
        network = plan(seed, wide, True, bn)
        if bn == "batch" and network.least_values < FEWEST_VALUES:
            continue
        expected, rounded = (judged(seed, wide, bn, count, True) for count in (0, terms))
        grads, _ = walked(network, bn, bf16)
        assert (sizes(grads - expected, bn) <= admitted(expected, rounded, bn, terms)).all(), f"seed {seed}"
        kinds += torch.bincount(network.blocks[:, BlockColumn.SKIP], minlength=5)
    assert kinds[list(BEHIND_RELU)].min() >= (1 if isa == "amx" else 5), kinds


@functools.cache
def judged_sums(seed: int, wide: bool, bn: str, behind_relu: bool, terms: int) -> Tensor:
    """Return float64 [n + 1, B, C, H, W]: for each length the sum over its paths, with the last routing's factors."""
    network = plan(seed, wide, behind_relu, bn)
    codes = torch.tensor(list(itertools.product((0, 1), repeat=len(network.blocks))))
    factors = torch.stack([1 - codes, codes], 2) * network.routing[-1]
    every = truth_back(replace(network, routing=factors), bn, terms)
    lengths = codes.sum(1)
    return torch.stack([every[lengths == k].sum(0) for k in range(len(network.blocks) + 1)])


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_sums_by_length_are_those_of_every_path(isa: str, bf16: bool, bn: str, behind_relu: bool, wide: bool) -> None:
    terms = terms_of(isa, bf16)
    for seed in seeds(isa):
        network = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and network.least_values < FEWEST_VALUES:
            continue
        expected, rounded = (judged_sums(seed, wide, bn, behind_relu, count) for count in (0, terms))
        norms, grad, exponent = SUMS[bn](*network.sums_arguments(bn, bf16))
        grads = torch.ldexp(grad.double(), exponent[:, :, None, None, None])
        # If the paths of a length cancel, rounding is proportional to the paths one by one.
        limit = admitted(expected, rounded, bn, terms) + 1e-6 * sizes(expected.abs().sum(0)[None], bn)
        assert (sizes(grads - expected, bn) <= limit).all(), f"seed {seed}"
        torch.testing.assert_close(norms, grads.flatten(2).norm(dim=2), rtol=1e-12, atol=0)
        alone, none, _ = SUMS[bn](*network.sums_arguments(bn, bf16, gradients=False))
        assert torch.equal(alone, norms) and len(none) == 0


@pytest.mark.parametrize("bn", MODES)
def test_a_nan_among_zeros_is_not_taken_for_zero(isa: str, bn: str) -> None:
    network = plan_of_kind(IDENTITY, blocks=2)
    grad, bits = (
        torch.zeros_like(network.grad),
        [None if bit is None else torch.ones_like(bit) for bit in network.bits],
    )
    grad[0, 0, 2, 2] = torch.nan
    network = replace(network, grad=grad, bits=bits, routing=torch.ones_like(network.routing))
    norms, _, _ = SUMS[bn](*network.sums_arguments(bn))
    assert norms[:, 0].isnan().all()


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_path_through_identity_skips_alone_changes_no_bit(isa: str, bf16: bool, bn: str) -> None:
    network = plan_of_kind(IDENTITY, blocks=4)
    network = replace(network, routing=torch.tensor([1.0, 0.0]).expand(1, 4, 2).contiguous())
    exponent = network.exponent if bn == "running" else network.exponent[:1]
    result, _ = walked(network, bn, bf16)
    assert torch.equal(result[0], torch.ldexp(network.grad.double(), exponent[:, None, None, None]))


@functools.cache
def long_plan(kind: int, factor: float) -> Plan:
    """Return 16 blocks whose modules and projections multiply by a factor each."""
    network = plan_of_kind(kind, blocks=16)
    weights = network.weights.clone()
    last = network.blocks[:, BlockColumn.FIRST] + network.blocks[:, BlockColumn.COUNT] - 1
    projections = network.blocks[:, BlockColumn.PROJECTION]
    for u in [*last.tolist(), *projections[projections >= 0].tolist()]:
        weights[network.weights_of(u)] *= factor
    return replace(network, weights=weights, routing=network.routing[[0, 1, 2, 6, 8]].contiguous())


@functools.cache
def judged_long(kind: int, factor: float, bn: str, terms: int = 0) -> Tensor:
    return truth_back(long_plan(kind, factor), bn, terms)


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("factor", [1e-11, 1e11])
@pytest.mark.parametrize("kind", [IDENTITY, PROJECTION, PAD], ids=["identity", "projection", "pad"])
def test_values_keep_their_relative_precision_far_beyond_float32(isa: str, kind: int, factor: float, bn: str) -> None:
    expected, terms = judged_long(kind, factor, bn), terms_of(isa, False)
    length_n = sizes(expected, bn)[1]
    assert (length_n < 1e-160).all() if factor < 1 else (length_n > 1e150).all()
    error = sizes(walked(long_plan(kind, factor), bn)[0] - expected, bn)
    assert (error <= admitted(expected, judged_long(kind, factor, bn, terms), bn, terms)).all()


@pytest.mark.parametrize("bn", MODES)
def test_values_that_leave_float32_are_kept_and_others_pass_through(isa: str, bn: str) -> None:
    network = plan_of_kind(PROJECTION, blocks=2)
    plain, _ = walked(network, bn)
    tiny, _ = walked(replace(network, grad=network.grad * 2.0**-100, exponent=network.exponent - 800), bn)
    torch.testing.assert_close(torch.ldexp(tiny, torch.tensor(900)), plain, rtol=1e-5, atol=1e-6 * plain.abs().max())
    zeros, norms = walked(replace(network, grad=torch.zeros_like(network.grad)), bn)
    assert not zeros.any() and not norms.any()
    network.grad[1, 0, 0, 0] = torch.nan
    spoiled, norms = walked(network, bn)
    assert spoiled[:, 1].isnan().any(-1).any(-1).any(-1)[1:].all() and norms[1:, 1].isnan().all()
    if bn == "running":
        assert torch.equal(spoiled[:, [0, 2]], plain[:, [0, 2]])
