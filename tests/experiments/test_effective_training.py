"""Training with k of n modules: Welch's test, the drawn paths, and the claims."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from helpers.claims import HELD, NOT, OPEN, verdicts
from helpers.runs import (
    effective_run,
    three_ways,
)

from pathnet.experiments import (
    drawn_paths,
    effective_training,
)
from pathnet.experiments.claims import Verdict


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_the_difference_is_welchs(tmp_path: Path) -> None:
    """Compare with Welch's formula. The quantiles of t have a closed form for two degrees of freedom, and with one
    variance zero and three values, Welch's degrees of freedom are exactly two."""
    run = effective_run(tmp_path, [0.1, 0.1, 0.1], three_ways([0.1, 0.12, 0.17]))
    training = effective_training.summarise(run)
    rates = np.array([0.1, 0.12, 0.17])
    error = rates.std(ddof=1) / math.sqrt(3)
    t = (rates.mean() - 0.1) / error
    quantile = 4.302652729749462  # of t with two degrees of freedom, at 0.975
    assert training.best == "scaled by k/n"
    difference = training.difference["scaled by k/n"]
    assert difference.mean == pytest.approx(rates.mean() - 0.1)
    assert (difference.low, difference.high) == pytest.approx(
        (rates.mean() - 0.1 - quantile * error, rates.mean() - 0.1 + quantile * error)
    )
    assert training.p_worse["scaled by k/n"] == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))


def test_two_samples_of_unequal_variance(tmp_path: Path) -> None:
    """Test three values against three whose degrees of freedom are not an integer: p by integrating the density."""
    full, best = np.array([0.1, 0.14, 0.12]), np.array([0.16, 0.12, 0.26])
    training = effective_training.summarise(effective_run(tmp_path, full.tolist(), three_ways(best.tolist())))
    a, b = full.var(ddof=1) / 3, best.var(ddof=1) / 3
    freedom = (a + b) ** 2 / (a * a / 2 + b * b / 2)
    t = (best.mean() - full.mean()) / math.sqrt(a + b)
    x = np.linspace(t, 2000, 4_000_001)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    density *= math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    assert training.p_worse["scaled by k/n"] == pytest.approx(np.trapezoid(density, x), abs=1e-5)


@pytest.mark.parametrize(
    ("full", "best", "expected"),
    [
        ([0.1, 0.102, 0.101], [0.1, 0.101, 0.102], HELD),
        ([0.1, 0.11, 0.12], [0.05, 0.06, 0.07], HELD),
        ([0.1, 0.11, 0.12], [0.15, 0.16, 0.17], NOT),
        ([0.1, 0.101, 0.102], [0.11, 0.111, 0.112], NOT),
        ([0.1, 0.2, 0.15], [0.11, 0.21, 0.16], OPEN),
        ([0.1], [0.11], OPEN),
        ([0.1], [0.5], OPEN),
    ],
    ids=["alike", "better", "much worse", "surely worse", "perhaps worse", "one seed", "one seed, worse"],
)
def test_the_claim_of_effective_training(
    tmp_path: Path, full: list[float], best: list[float], expected: Verdict
) -> None:
    claims = effective_training.claims(effective_run(tmp_path, full, three_ways(best)))
    assert verdicts(claims) == [expected, HELD] and claims[0].measured.startswith("scaled by k/n: ")
    assert ("no test" in claims[0].measured) == (len(full) == 1)
    assert "Training with 2 of 4 modules" in claims[0].paper and "centred on 1 modules" in claims[1].paper


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_equal_errors_decide_nothing(tmp_path: Path) -> None:
    """Three equal values would give an interval of no width."""
    (claim, _) = effective_training.claims(effective_run(tmp_path, [0.1] * 3, three_ways([0.11] * 3)))
    assert claim.verdict == OPEN and "no test" in claim.measured


def test_paths_of_another_distribution_fail_their_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = drawn_paths.drawn_modules
    # One module more than planned.
    monkeypatch.setattr(
        drawn_paths,
        "drawn_modules",
        lambda net, recipe, step: original(net, dataclasses.replace(recipe, modules=recipe.modules + 1), step),
    )
    run = effective_run(tmp_path, [0.1], three_ways([0.1]))
    assert verdicts(effective_training.claims(run)) == [OPEN, NOT]


# Paths that training draws


@pytest.mark.parametrize(("n", "modules"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_lengths_of_paths_through_exactly_some_modules(n: int, modules: int) -> None:
    """All sets of modules are equally likely, and so are all paths through a set."""
    lengths = [sum(path) for _ in combinations(range(n), modules) for path in product((0, 1), repeat=modules)]
    exact = np.bincount(lengths, minlength=n + 1) / len(lengths)
    drawn = drawn_paths.drawn_paths([1.0] * n, modules)
    np.testing.assert_allclose(drawn.expected, exact, atol=1e-14)
    assert drawn.drawn.sum() == drawn_paths.STEPS and drawn.p_value > 1e-3
    assert drawn.mean == pytest.approx(modules / 2, abs=4 * math.sqrt(modules / 4 / drawn_paths.STEPS))


@pytest.mark.parametrize("survival", [[0.5], [1.0, 0.25, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5]])
def test_lengths_of_paths_through_modules_that_survive(survival: list[float]) -> None:
    n, exact = len(survival), np.zeros(len(survival) + 1)
    for kept in product((0, 1), repeat=n):
        chance = math.prod(p if kept_module else 1 - p for kept_module, p in zip(kept, survival, strict=True))
        for path in product((0, 1), repeat=sum(kept)):
            exact[sum(path)] += chance / 2 ** sum(kept)
    drawn = drawn_paths.drawn_paths(survival, seed=3)
    np.testing.assert_allclose(drawn.expected, exact, atol=1e-14)
    assert drawn.p_value > 1e-3
    # As many steps of the plain network's paths, or of another survival, do not pass for them.
    other = drawn_paths.drawn_paths([min(1.0, p + 0.2) for p in survival[:-1]] + [0.9], seed=3)
    assert dataclasses.replace(drawn, drawn=other.drawn).p_value < 1e-6


def test_the_draw_of_paths_is_a_function_of_the_seed() -> None:
    first, same, other = (drawn_paths.drawn_paths([1.0] * 6, 3, seed).drawn.tolist() for seed in (0, 0, 1))
    assert first == same != other


def test_p_values_are_uniform_where_the_distribution_is_right() -> None:
    rng = np.random.default_rng(0)
    expected = np.array([math.comb(8, k) / 256 for k in range(9)])
    p = [drawn_paths.DrawnPaths(rng.multinomial(2000, expected), expected).p_value for _ in range(300)]
    assert 0.4 < np.mean(p) < 0.6 and 2 < np.sum(np.array(p) < 0.05) < 30


def test_lengths_that_cannot_be_are_never_drawn_at_random() -> None:
    expected = np.array([0.5, 0.5, 0.0])
    assert drawn_paths.DrawnPaths(np.array([1000, 1000, 0]), expected).p_value > 0.9
    assert drawn_paths.DrawnPaths(np.array([900, 900, 200]), expected).p_value < 1e-6
