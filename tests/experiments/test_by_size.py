"""Errors of random lesions by size, and the claims of Figure 5."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.claims import HELD, NOT, OPEN, verdicts
from helpers.runs import (
    error_count,
    sizes_of,
    write_run,
)

from pathnet.experiments import (
    by_size,
    lesion_many,
    lesion_reorder,
)
from pathnet.experiments.by_size import ErrorBySize
from pathnet.experiments.claims import Verdict
from pathnet.experiments.errors import ErrorCount, spread
from pathnet.lesion import Lesion

SIX = {"residual": (6, (2, 4))}


def made_sizes(means: Sequence[float], intact: float = 0.0, draws: int = 1) -> ErrorBySize:
    rates = [np.full(draws, mean) for mean in means]
    sizes = list(range(1, len(means) + 1))
    tau = [np.full(draws, 1 - size / 100) for size in sizes]
    return ErrorBySize(sizes, rates, tau, [spread(of_size) for of_size in rates], intact, 0.9, 50, draws, 1)


@pytest.mark.parametrize(
    ("means", "correlation", "rise", "fall", "verdict"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1.0, 0.2, 0, HELD),
        ([0.1, 0.2, 0.6, 0.7, 0.8], 1.0, 0.5, 0, NOT),
        ([0.5, 0.52, 0.55, 0.58, 0.6], 1.0, 5 / 6, 0, NOT),
        ([0.5, 0.4, 0.3, 0.2, 0.1], -1.0, 5.0, 1.0, NOT),
        ([0.1, 0.25, 0.22, 0.37, 0.5], 0.9, 0.3, 0.06, HELD),
        ([0.15, 0.29, 0.23, 0.36, 0.5], 0.9, 0.3, 0.12, NOT),
        ([0.1, 0.11, 0.15, 0.2, 0.3], 1.0, 1 / 3, 0, OPEN),
    ],
    ids=["steps alike", "one big step", "the first", "falling", "a small fall", "a larger one", "at the bound"],
)
def test_smoothness_is_the_largest_step_up_and_down(
    means: list[float], correlation: float, rise: float, fall: float, verdict: Verdict
) -> None:
    errors = made_sizes(means, draws=20)
    rng = np.random.default_rng(0)
    noise = [1e-3 * (noise - noise.mean()) for noise in rng.normal(size=(len(means), 20))]
    rates = [of_size + off for of_size, off in zip(errors.rates, noise, strict=True)]
    errors = dataclasses.replace(errors, rates=rates, means=list(map(spread, rates)))
    how = by_size.smooth(errors)
    assert how.correlation == pytest.approx(correlation)
    assert (how.rise[0], how.fall[0]) == pytest.approx((rise, fall), abs=1e-9)
    assert how.rise[1] < rise < how.rise[2] and how.fall[1] <= fall + 1e-9 and how.fall[1] <= how.fall[2]
    assert by_size.smoothness(errors, "paper", "section", "at the end").verdict == verdict
    few = dataclasses.replace(errors, rates=[of_size[:9] for of_size in rates])
    assert by_size.smoothness(few, "paper", "section", "at the end").verdict != HELD
    assert np.isnan([by_size.smooth(few).rise[1:], by_size.smooth(few).fall[1:]]).all()


@pytest.mark.parametrize("means", [[0.5], [0.0, 0.0, 0.0], [0.2, 0.1, 0.0]], ids=["one size", "no rise", "back"])
@pytest.mark.filterwarnings("error")
def test_where_nothing_rises_there_is_no_smooth_rise(means: list[float]) -> None:
    errors = made_sizes(means, draws=10)
    how = by_size.smooth(errors)
    assert np.isnan([*how.rise, *how.fall]).all()
    assert by_size.smoothness(errors, "paper", "section", "").verdict == OPEN


def test_a_collapse_to_chance_by_every_draw_is_a_rise() -> None:
    """Draws that are all equal have no interval of their own."""
    errors = made_sizes([0.1, 0.2, 0.3, 0.4], draws=10)
    assert math.isnan(errors.means[-1].low)
    assert by_size.smooth(errors).total == pytest.approx((0.4, 0.4, 0.4))
    assert by_size.smoothness(errors, "paper", "section", "").verdict == HELD


def test_a_curve_whose_draws_vary_too_much_is_open() -> None:
    rng = np.random.default_rng(0)
    errors = made_sizes([0.1, 0.2, 0.3, 0.4, 0.5], draws=20)
    rates = [of_size + rng.normal(0, 0.25, 20) for of_size in errors.rates]
    noisy = dataclasses.replace(errors, rates=rates, means=list(map(spread, rates)))
    assert by_size.smoothness(noisy, "paper", "section", "").verdict == OPEN


def test_the_ends_are_quantiles_over_resampled_draws() -> None:
    """Compare with the normal law: of two sizes, the larger step is one less the mean of the first."""
    rng = np.random.default_rng(1)
    rates = [rng.uniform(0.1, 0.3, 40), np.ones(40)]
    errors = dataclasses.replace(made_sizes([0.2, 1.0]), rates=rates, means=list(map(spread, rates)))
    step, low, high = by_size.smooth(errors).rise
    error = rates[0].std() / math.sqrt(40)
    assert step == pytest.approx(1 - rates[0].mean())
    assert (low, high) == pytest.approx((step - 1.96 * error, step + 1.96 * error), abs=0.15 * error)


def test_the_interval_of_the_largest_step_covers_it() -> None:
    """Simulate a curve that saturates, as measured ones do: noise on the plateau makes no large step."""
    rng = np.random.default_rng(2)
    means = 0.9 * (1 - np.exp(-np.arange(1, 13) / 4))
    truth, covered = means[0] / means[-1], 0
    for _ in range(200):
        rates = [rng.normal(mean, 0.15, 60) for mean in means]
        errors = dataclasses.replace(made_sizes(means.tolist()), rates=rates, means=list(map(spread, rates)))
        _, low, high = by_size.smooth(errors).rise
        covered += low <= truth <= high
    assert covered >= 0.93 * 200


@pytest.mark.parametrize(
    ("rise", "expected"), [([0.05, 0.1, 0.15, 0.2], HELD), ([0.0, 0.01, 0.02, 0.8], NOT)], ids=["even", "at once"]
)
def test_the_claim_of_many_deletions(tmp_path: Path, rise: list[float], expected: Verdict) -> None:
    rates = {size: [0.1 + 0.8 * more, 0.1 + 0.7 * more] * 10 for size, more in enumerate(rise, 1)}
    run = write_run(tmp_path, "lesion-many", SIX, sizes_of(0.1, rates))
    assert verdicts(lesion_many.claims(run)) == [expected]
    errors = by_size.summarise(run)
    assert errors.sizes == [1, 2, 3, 4] and (errors.draws, errors.seeds, errors.blocks) == (20, 1, 6)
    assert [mean.mean for mean in errors.means] == pytest.approx([0.1 + 0.75 * more for more in rise], abs=1e-3)
    assert errors.intact == 0.1 and errors.chance == 0.9


def kendall(order: Sequence[int]) -> float:
    """Return Kendall's tau by counting the pairs that are out of order."""
    pairs = list(combinations(order, 2))
    return 1 - 2 * sum(first > second for first, second in pairs) / len(pairs)


def reordered(rate_of_tau: Mapping[str, Any]) -> list[ErrorCount]:
    """Return all orders of five blocks, with the error rate ``intact + slope (1 - tau) / 2``, or a step."""
    orders = list(permutations(range(5)))
    rows = [error_count(rate_of_tau["intact"])]
    for number, order in enumerate(orders):
        off = (1 - kendall(order)) / 2
        rate = rate_of_tau["intact"] + (0.8 * off if rate_of_tau["even"] else 0.8 * (off > 0))
        rows.append(error_count(rate, size=1 + number % 3, draw=number, lesion=Lesion(order=order)))
    return rows


@pytest.mark.parametrize(("even", "expected"), [(True, HELD), (False, NOT)])
def test_kendalls_tau_and_the_claim_of_reordering(tmp_path: Path, even: bool, expected: Verdict) -> None:
    rows = reordered({"intact": 0.1, "even": even})
    run = write_run(tmp_path, "lesion-reorder", {"residual": (5, ())}, rows)
    errors = by_size.summarise(run)
    for size, tau in zip(errors.sizes, errors.tau, strict=True):
        by_hand = [kendall(row.order) for row in sorted(rows, key=lambda row: row.draw) if row.size == size]
        np.testing.assert_allclose(tau, by_hand, atol=1e-12)
    assert verdicts(lesion_reorder.claims(run)) == [expected]
    groups = by_size.by_tau(errors)
    assert [len(rates) for rates in groups.rates] == [12] * 10
    assert np.all(np.diff(np.concatenate(groups.tau)) <= 0) and groups.sizes == list(range(1, 11))
    for tau, rates in zip(groups.tau, groups.rates, strict=True):
        expected_rates = 0.1 + (0.4 * (1 - tau) if even else 0.8 * (tau < 0.99))
        np.testing.assert_allclose(rates, expected_rates, atol=1e-3)


def test_fewer_draws_than_groups_are_a_group_each() -> None:
    groups = by_size.by_tau(made_sizes([0.1, 0.2, 0.3]))
    assert [rates.tolist() for rates in groups.rates] == [[0.1], [0.2], [0.3]] and groups.sizes == [1, 2, 3]
