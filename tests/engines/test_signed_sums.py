"""Squared norms of sums by length with a random sign for each module, and how the sums compare."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
import torch
from helpers.cases import SMALL, Case
from helpers.length_sums import (
    ENGINES,
    JOBS,
    PLACES,
    added_up,
    codes,
    every_path,
    recorded,
    scalars,
    ten_blocks,
    tolerance,
    total,
    tree,
)
from helpers.oracles import krawtchouk
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet import gradients


def all_signs(n: int) -> Tensor:
    """Return int8 [2^n, n, 1], all signs of n modules, one in each block."""
    return (codes(n).to(torch.int8) * 2 - 1)[..., None]


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[4]], ids=lambda case: case.id)
@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_the_mean_over_all_signs_is_the_sum_of_squares(engine: str, case: Case, bn: str, at: str) -> None:
    tape = recorded(engine, case.net(), *case.images(), bn, at)
    draws = gradients.squared_norms_by_length(tape._record, all_signs(tape.n), tape._place)
    expected = every_path(case, bn, at)[1]
    torch.testing.assert_close(draws.mean(0), expected, rtol=tolerance(engine), atol=0)
    assert draws.shape == (2**tape.n, tape.n + 1) and (draws[:, 1:-1].std(0) > 1e-3 * expected[1:-1]).all()


def test_so_is_it_of_eight_numbers() -> None:
    """Scalar modules, whose paths' gradients are products of weights."""
    weights = torch.linspace(-1.5, 2, 8, dtype=torch.float64)
    net, images, target = scalars(weights.tolist(), batch=1)
    tape = pathnet.record(net, images, target, engine="reference", precision="float64", loss=total)
    draws = gradients.squared_norms_by_length(tape._record, all_signs(8), tape._place)
    along = torch.where(codes(8) > 0, weights, 1.0).prod(1)
    expected = torch.zeros(9, dtype=torch.float64).index_add(0, codes(8).sum(1), along.square())
    torch.testing.assert_close(draws.mean(0), expected, rtol=EXACT_WALK, atol=0)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_and_of_ten_blocks_where_an_engine_is_quick(engine: str) -> None:
    net, images, labels = ten_blocks()
    tape = recorded(engine, net, images, labels)
    draws = gradients.squared_norms_by_length(tape._record, all_signs(10), tape._place)
    expected = added_up(10, tree(net, images, labels, "running"))[1]
    torch.testing.assert_close(draws.mean(0), expected, rtol=tolerance(engine), atol=0)


def test_draws_on_scalars_follow_the_krawtchouk_polynomials() -> None:
    n, weight, batch = 54, 0.75, 2
    net, images, target = scalars([weight] * n, batch)
    tape = pathnet.record(net, images, target, engine="reference", precision="float64", loss=total)
    drawn = tape.squared_norms_by_length(6, seed=2)
    for measured, signs in zip(drawn.tolist(), pathnet.paths.signs(n, 6, seed=2), strict=True):
        minus = int((signs < 0).sum())
        exact = [batch * float(krawtchouk(n, k, minus) ** 2 * Fraction(weight) ** (2 * k)) for k in range(n + 1)]
        # Of the size of what is summed up, since half of the polynomials are zero in the middle.
        sizes = [batch * comb(n, k) * weight ** (2 * k) for k in range(n + 1)]
        for value, expected, size in zip(measured, exact, sizes, strict=True):
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-12 * size)


def test_draw_j_is_a_function_of_seed_and_j() -> None:
    tape = recorded("reference", SMALL[0].net(), *SMALL[0].images())
    drawn = tape.squared_norms_by_length(5, seed=1)
    assert torch.equal(tape.squared_norms_by_length(2, seed=1, first=3), drawn[3:])
    assert not torch.equal(tape.squared_norms_by_length(5, seed=2), drawn)
    with pytest.raises(ValueError, match="draws: expected an integer of at least 1, got 0"):
        tape.squared_norms_by_length(0)


@pytest.mark.parametrize("engine", ENGINES)
def test_comparisons_are_those_of_the_sums(engine: str) -> None:
    tape = recorded(engine, SMALL[1].net(), *SMALL[1].images())
    sums, compared = tape.gradient_by_length().flatten(1), tape.compare_lengths()
    full = sums.sum(0)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(compared.norm, sums.norm(dim=1), **close)
    assert compared.full_norm == pytest.approx(full.norm().item(), rel=1e-12)
    cosines = nn.functional.cosine_similarity
    torch.testing.assert_close(compared.next_cosine, cosines(sums[:-1], sums[1:], eps=0.0), **close)
    torch.testing.assert_close(compared.full_cosine, cosines(sums, full[None], eps=0.0), **close)
    torch.testing.assert_close(compared.share, sums @ full / full.dot(full), **close)
    torch.testing.assert_close(compared.left, (full - sums.cumsum(0)).norm(dim=1) / full.norm(), **close)
    assert compared.share.sum() == pytest.approx(1) and compared.explained[-1] == pytest.approx(1)


def test_a_length_that_vanishes_has_no_direction() -> None:
    net, images, target = scalars([0.0, 0.5, 0.25])
    compared = pathnet.record(
        net, images, target, engine="reference", precision="float64", loss=total
    ).compare_lengths()
    torch.testing.assert_close(compared.norm, 3**0.5 * torch.tensor([1, 0.75, 0.125, 0], dtype=torch.float64))
    assert compared.next_cosine.isnan().tolist() == compared.full_cosine.isnan()[1:].tolist() == [False, False, True]
    assert compared.share.tolist() == pytest.approx([1 / 1.875, 0.75 / 1.875, 0.125 / 1.875, 0])
    assert compared.left.tolist() == pytest.approx([0.875 / 1.875, 0.125 / 1.875, 0, 0])


def test_of_no_gradient_no_length_explains_a_share() -> None:
    net, images, _ = scalars([0.5, 0.25])
    nothing = pathnet.record(net, images, torch.zeros(3), engine="reference", loss=lambda output, _: 0 * output.sum())
    compared = nothing.compare_lengths()
    assert compared.full_norm == 0 and compared.norm.tolist() == [0] * 3
    assert compared.share.isnan().all() and compared.full_cosine.isnan().all() and not compared.left.isfinite().any()
