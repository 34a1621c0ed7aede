"""What the drivers make of their rows: statistics of numbers that are known, and claims that hold and do not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import (
    count,
    deletions,
    effective_run,
    gradient_run,
    highway_rows,
    made_run,
    sizes_of,
    three_ways,
)
from scipy import stats

from pathnet import data, paper, results
from pathnet.experiments import (
    by_size,
    drawn_paths,
    effective_training,
    highway,
    lesion_many,
    lesion_reorder,
    lesion_single,
    lesion_stochastic_depth,
    path_gradients,
    remaining_paths,
    unraveled,
)
from pathnet.experiments.by_size import ErrorBySize
from pathnet.experiments.errors import ErrorCount, Spread, spread
from pathnet.experiments.run import Claim, Plan, Value
from pathnet.figures import style
from pathnet.figures.lesions import band

SIX = {"residual": (6, (2, 4))}


def held(claims: Sequence[Claim]) -> list[bool]:
    assert all(type(claim.held) is bool and "nan" not in claim.bound for claim in claims)
    assert all(claim.paper and claim.where.startswith("section") and claim.measured for claim in claims)
    return [claim.held for claim in claims]


# Means and their intervals


def test_the_interval_of_a_mean_is_that_of_all_resamples() -> None:
    """Of ten values, eight of them 0 and two 1, a resample's mean is binomial; a thousand draws come close to its
    quantiles."""
    values = [0.0] * 8 + [1.0] * 2
    found = spread(values)
    assert found.mean == pytest.approx(0.2) and found.count == 10
    low, high = stats.binom(10, 0.2).ppf((0.025, 0.975)) / 10
    assert found.low == pytest.approx(low, abs=0.1) and found.high == pytest.approx(high, abs=0.1)
    assert spread(values) == found
    normal = np.random.default_rng(0).normal(5, 2, 400)
    half = 1.96 * normal.std() / 20
    assert (spread(normal).low, spread(normal).high) == pytest.approx(
        (normal.mean() - half, normal.mean() + half), abs=0.1 * half
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.25], "25 % (no interval: 1 value)"),
        ([0.1, 0.2], "15 % (no interval: 2 values)"),
        (list(np.linspace(0, 1, 9)), "50 % (no interval: 9 values)"),
        ([0.5] * 3, "50 % (no interval: 3 values)"),
        ([0.9] * 40, "90 % (no interval: 40 equal values)"),
    ],
    ids=lambda own: str(len(own)),
)
def test_few_values_or_equal_ones_have_no_interval_and_the_text_says_so(values: list[float], text: str) -> None:
    found = spread(values)
    assert math.isnan(found.low) and math.isnan(found.high) and str(found) == text


def test_an_interval_is_told_in_per_cent() -> None:
    assert str(Spread(0.123, 0.1, 0.1464, 20)) == "12.3 % (10 to 14.6)"


@pytest.mark.parametrize("batches", [1, 2, 9])
def test_figures_of_few_batches_have_no_band_and_the_legend_says_why(batches: int) -> None:
    _, (axes,) = style.panels("", 1)
    band(axes, np.arange(3), [spread(np.linspace(0.1, 0.9, batches))] * 3)
    ((handle,), (label,)) = axes.get_legend_handles_labels()
    assert label == f"no interval: {batches} value{'s' if batches > 1 else ''}"
    assert not any(np.isfinite(path.vertices).any() for path in handle.get_paths())


# Single deletions


def test_single_deletions_are_summarised_over_seeds(tmp_path: Path) -> None:
    rows = deletions(0.1, [0.12, 0.1, 0.5]) + deletions(0.2, [0.2, 0.2, 0.9], seed=1)
    run = made_run(tmp_path, "lesion-single", {"residual": (3, (2,))}, rows, seeds=2)
    found = lesion_single.summarise(run)["residual"]
    np.testing.assert_allclose(found.increase, [0.01, 0, 0.55])
    np.testing.assert_allclose(found.left, [(0.78 / 0.8 + 1) / 2, 1, (0.4 / 0.8 + 0) / 2])
    assert found.intact.tolist() == [0.1, 0.2] and found.chance == 0.9
    assert found.changes_shape.tolist() == [False, False, True]
    # Wilson's interval of 900 in 1000 and 120 in 1000, from his formula.
    z = 1.959963984540054
    for rate, low, high in [(0.9, found.low[1, 2], found.high[1, 2]), (0.12, found.low[0, 0], found.high[0, 0])]:
        middle = (rate + z * z / 2000) / (1 + z * z / 1000)
        half = z * math.sqrt(rate * (1 - rate) / 1000 + z * z / 4e6) / (1 + z * z / 1000)
        assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize(
    ("intact", "rates", "expected"),
    [
        (0.1, [0.1, 0.12, 0.4, 0.11, 0.3, 0.1], [True, True]),
        (0.1, [0.1, 0.21, 0.4, 0.1, 0.3, 0.1], [False, True]),
        (0.1, [0.1, 0.15, 0.12, 0.15, 0.11, 0.1], [True, False]),
        (0.1, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [True, False]),
        (0.1, [0.1, 0.05, 0.1, 0.05, 0.1, 0.05], [True, False]),
        (0.89, [0.89] * 6, [False, False]),
    ],
    ids=["the paper's", "a block matters", "shapes do not", "nothing does", "deleting helps", "never learned"],
)
def test_claims_of_residual_networks(tmp_path: Path, intact: float, rates: list[float], expected: list[bool]) -> None:
    claims = lesion_single.claims(made_run(tmp_path, "lesion-single", SIX, deletions(intact, rates)))
    assert held(claims) == expected


def test_the_worst_block_is_named_by_its_number_from_1(tmp_path: Path) -> None:
    run = made_run(tmp_path, "lesion-single", SIX, deletions(0.1, [0.1, 0.1, 0.9, 0.15, 0.9, 0.12]))
    assert lesion_single.claims(run)[0].measured == "the worst, block 4, costs 5 points, the median one 1"


@pytest.mark.parametrize(
    ("intact", "rates", "expected"),
    [
        (0.1, [0.9, 0.89, 0.9, 0.92], True),
        (0.1, [0.9, 0.89, 0.81, 0.92], False),
        (0.95, [0.9, 0.9, 0.9, 0.9], False),
        (0.9, [0.9, 0.9, 0.9, 0.9], False),
        (0.88, [0.9, 0.9, 0.9, 0.9], False),
    ],
    ids=["chance", "a tenth and more is left", "worse than chance before", "at chance before", "hardly learned"],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_claims_of_vggs(tmp_path: Path, intact: float, rates: list[float], expected: bool) -> None:
    run = made_run(tmp_path, "lesion-single", {"vgg": (4, (1,))}, deletions(intact, rates, "vgg"))
    assert held(lesion_single.claims(run)) == [expected]


def test_a_vggs_layers_are_counted_from_its_second(tmp_path: Path) -> None:
    run = made_run(tmp_path, "lesion-single", {"vgg": (3, ())}, deletions(0.1, [0.9, 0.5, 0.9], "vgg"))
    assert lesion_single.claims(run)[0].measured == "50 % without layer 3, 0 % in the median"


def test_a_network_whose_blocks_all_change_the_shape_has_no_others(tmp_path: Path) -> None:
    run = made_run(tmp_path, "lesion-single", {"residual": (3, (0, 1, 2))}, deletions(0.1, [0.2] * 3))
    assert lesion_single.claims(run) == []
    run = made_run(tmp_path / "none", "lesion-single", {"residual": (3, ())}, deletions(0.1, [0.1] * 3))
    assert held(lesion_single.claims(run)) == [True]


@pytest.mark.parametrize(
    ("plain", "stochastic", "expected"),
    [
        ((0.1, [0.2, 0.2, 0.4]), (0.1, [0.15, 0.15, 0.2]), [True, True]),
        ((0.1, [0.1, 0.1, 0.4]), (0.1, [0.3, 0.3, 0.2]), [False, True]),
        ((0.1, [0.3, 0.3, 0.2]), (0.1, [0.1, 0.1, 0.4]), [True, False]),
        ((0.1, [0.2, 0.2, 0.4]), (0.1, [0.2, 0.2, 0.4]), [False, False]),
        ((0.1, [0.2, 0.2, 0.4]), (0.9, [0.9, 0.9, 0.9]), [False, False]),
    ],
    ids=["the paper's", "other blocks", "downsampling", "alike", "never learned"],
)
def test_claims_of_stochastic_depth(
    tmp_path: Path,
    plain: tuple[float, list[float]],
    stochastic: tuple[float, list[float]],
    expected: list[bool],
) -> None:
    rows = deletions(*plain) + deletions(*stochastic, network="stochastic depth")
    kinds = {"residual": (3, (2,)), "stochastic depth": (3, (2,))}
    assert (
        held(lesion_stochastic_depth.claims(made_run(tmp_path, "lesion-stochastic-depth", kinds, rows))) == expected
    )


# Lesions by size


def made_sizes(means: Sequence[float], intact: float = 0.0) -> ErrorBySize:
    rates = [np.array([mean]) for mean in means]
    sizes = list(range(1, len(means) + 1))
    tau = [np.array([1 - size / 100]) for size in sizes]
    return ErrorBySize(sizes, rates, tau, [spread(own) for own in rates], intact, 0.9, 50, 1, 1)


@pytest.mark.parametrize(
    ("means", "correlation", "step"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1.0, 0.2),
        ([0.1, 0.2, 0.6, 0.7, 0.8], 1.0, 0.5),
        ([0.5, 0.52, 0.55, 0.58, 0.6], 1.0, 5 / 6),
        ([0.5, 0.4, 0.3, 0.2, 0.1], -1.0, 5.0),
        ([0.1, 0.3, 0.2, 0.4, 0.5], 0.9, 0.4),
        ([0.2, 0.1, 0.4, 0.3, 0.5], 0.8, 0.6),
        ([0.1, 0.1, 0.2], math.sqrt(3) / 2, 0.5),
    ],
    ids=["steps alike", "one big step", "the first", "falling", "two swapped", "four swapped", "a tie"],
)
def test_smoothness_is_rank_correlation_and_largest_step(means: list[float], correlation: float, step: float) -> None:
    assert by_size.smooth(made_sizes(means)) == pytest.approx((correlation, step))
    claim = by_size.smoothness(made_sizes(means), "paper", "section", "at the end")
    assert claim.held == (correlation >= 0.9 and step <= 1 / 3)


@pytest.mark.parametrize("means", [[0.5], [0.0, 0.0, 0.0], [0.2, 0.1, 0.0]], ids=["one size", "no rise", "back"])
@pytest.mark.filterwarnings("error")
def test_where_nothing_rises_there_is_no_smooth_rise(means: list[float]) -> None:
    assert any(math.isnan(value) for value in by_size.smooth(made_sizes(means)))
    assert by_size.smoothness(made_sizes(means), "paper", "section", "").held is False


@pytest.mark.parametrize(
    ("rise", "expected"), [([0.05, 0.1, 0.15, 0.2], True), ([0.0, 0.01, 0.02, 0.8], False)], ids=["even", "at once"]
)
def test_the_claim_of_many_deletions(tmp_path: Path, rise: list[float], expected: bool) -> None:
    own = {size: [0.1 + more, 0.1 + more / 2] for size, more in enumerate(rise, 1)}
    run = made_run(tmp_path, "lesion-many", SIX, sizes_of(0.1, own))
    assert held(lesion_many.claims(run)) == [expected]
    found = by_size.summarise(run)
    assert found.sizes == [1, 2, 3, 4] and (found.draws, found.seeds, found.blocks) == (2, 1, 6)
    assert [mean.mean for mean in found.means] == pytest.approx([0.1 + 0.75 * more for more in rise], abs=1e-3)
    assert found.intact == 0.1 and found.chance == 0.9


def kendall(order: Sequence[int]) -> float:
    """By counting the pairs that are out of order."""
    pairs = list(combinations(order, 2))
    return 1 - 2 * sum(one > other for one, other in pairs) / len(pairs)


def reordered(rate_of_tau: Mapping[str, Any]) -> list[ErrorCount]:
    """All orders of five blocks, their error rate ``intact + slope (1 - tau) / 2``, or a step."""
    orders = list(permutations(range(5)))
    rows = [count(rate_of_tau["intact"])]
    for number, order in enumerate(orders):
        off = (1 - kendall(order)) / 2
        rate = rate_of_tau["intact"] + (0.8 * off if rate_of_tau["even"] else 0.8 * (off > 0))
        rows.append(count(rate, size=1 + number % 3, draw=number, order=order))
    return rows


@pytest.mark.parametrize(("even", "expected"), [(True, True), (False, False)])
def test_kendalls_tau_and_the_claim_of_reordering(tmp_path: Path, even: bool, expected: bool) -> None:
    rows = reordered({"intact": 0.1, "even": even})
    run = made_run(tmp_path, "lesion-reorder", {"residual": (5, ())}, rows)
    found = by_size.summarise(run)
    for size, own in zip(found.sizes, found.tau, strict=True):
        by_hand = [kendall(row.order) for row in sorted(rows, key=lambda row: row.draw) if row.size == size]
        np.testing.assert_allclose(own, by_hand, atol=1e-12)
    assert held(lesion_reorder.claims(run)) == [expected]
    groups = by_size.by_tau(found)
    assert [len(own) for own in groups.rates] == [12] * 10
    assert np.all(np.diff(np.concatenate(groups.tau)) <= 0) and groups.sizes == list(range(1, 11))
    for tau, rates in zip(groups.tau, groups.rates, strict=True):
        expected_rates = 0.1 + (0.4 * (1 - tau) if even else 0.8 * (tau < 0.99))
        np.testing.assert_allclose(rates, expected_rates, atol=1e-3)


def test_fewer_draws_than_groups_are_a_group_each() -> None:
    groups = by_size.by_tau(made_sizes([0.1, 0.2, 0.3]))
    assert [own.tolist() for own in groups.rates] == [[0.1], [0.2], [0.3]] and groups.sizes == [1, 2, 3]


# Training with some modules


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_the_difference_is_welchs(tmp_path: Path) -> None:
    """Against his formula, the interval's and the test's quantiles of t from its closed form for two degrees of
    freedom: with one variance zero and three values, Welch's degrees of freedom are exactly two."""
    run = effective_run(tmp_path, [0.1, 0.1, 0.1], three_ways([0.1, 0.12, 0.17]))
    found = effective_training.summarise(run)
    own = np.array([0.1, 0.12, 0.17])
    error = own.std(ddof=1) / math.sqrt(3)
    t = (own.mean() - 0.1) / error
    quantile = 4.302652729749462  # of t with two degrees of freedom, at 0.975
    assert found.best == "scaled by k/n"
    difference = found.difference["scaled by k/n"]
    assert difference.mean == pytest.approx(own.mean() - 0.1)
    assert (difference.low, difference.high) == pytest.approx(
        (own.mean() - 0.1 - quantile * error, own.mean() - 0.1 + quantile * error)
    )
    assert found.p_worse["scaled by k/n"] == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))


def test_two_samples_of_unequal_variance(tmp_path: Path) -> None:
    """Three and three values whose degrees of freedom are not whole: p by integrating the density of t."""
    full, own = np.array([0.1, 0.14, 0.12]), np.array([0.16, 0.12, 0.26])
    found = effective_training.summarise(effective_run(tmp_path, full.tolist(), three_ways(own.tolist())))
    a, b = full.var(ddof=1) / 3, own.var(ddof=1) / 3
    freedom = (a + b) ** 2 / (a * a / 2 + b * b / 2)
    t = (own.mean() - full.mean()) / math.sqrt(a + b)
    x = np.linspace(t, 2000, 4_000_001)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    density *= math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    assert found.p_worse["scaled by k/n"] == pytest.approx(np.trapezoid(density, x), abs=1e-5)


@pytest.mark.parametrize(
    ("full", "best", "expected"),
    [
        ([0.1, 0.11, 0.12], [0.1, 0.12, 0.11], True),
        ([0.1, 0.11, 0.12], [0.05, 0.06, 0.07], True),
        ([0.1, 0.11, 0.12], [0.15, 0.16, 0.17], False),
        ([0.1, 0.101, 0.102], [0.11, 0.111, 0.112], False),
        ([0.1, 0.2, 0.15], [0.11, 0.21, 0.16], True),
        ([0.1], [0.11], True),
        ([0.1], [0.13], False),
    ],
    ids=["alike", "better", "much worse", "surely worse", "perhaps worse", "one seed", "one seed, worse"],
)
def test_the_claim_of_effective_training(
    tmp_path: Path, full: list[float], best: list[float], expected: bool
) -> None:
    claims = effective_training.claims(effective_run(tmp_path, full, three_ways(best)))
    assert held(claims) == [expected, True] and claims[0].measured.startswith("scaled by k/n: ")
    assert ("no test" in claims[0].measured) == (len(full) == 1)
    assert "Training with 2 of 4 modules" in claims[0].paper and "centred on 1 modules" in claims[1].paper


def test_paths_of_another_distribution_fail_their_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = drawn_paths.drawn_modules
    # One module more than was asked for.
    monkeypatch.setattr(
        drawn_paths,
        "drawn_modules",
        lambda net, recipe, step: original(net, dataclasses.replace(recipe, modules=recipe.modules + 1), step),
    )
    run = effective_run(tmp_path, [0.1], three_ways([0.1]))
    assert held(effective_training.claims(run)) == [True, False]


# Paths that training draws


@pytest.mark.parametrize(("n", "modules"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_lengths_of_paths_through_exactly_some_modules(n: int, modules: int) -> None:
    """Each set of modules is as likely as another, and so is each path through it."""
    lengths = [sum(path) for _ in combinations(range(n), modules) for path in product((0, 1), repeat=modules)]
    exact = np.bincount(lengths, minlength=n + 1) / len(lengths)
    found = drawn_paths.drawn_paths([1.0] * n, modules)
    np.testing.assert_allclose(found.expected, exact, atol=1e-14)
    assert found.drawn.sum() == drawn_paths.STEPS and found.p_value > 1e-3
    assert found.mean == pytest.approx(modules / 2, abs=4 * math.sqrt(modules / 4 / drawn_paths.STEPS))


@pytest.mark.parametrize("survival", [[0.5], [1.0, 0.25, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5]])
def test_lengths_of_paths_through_modules_that_survive(survival: list[float]) -> None:
    n, exact = len(survival), np.zeros(len(survival) + 1)
    for kept in product((0, 1), repeat=n):
        chance = math.prod(p if own else 1 - p for own, p in zip(kept, survival, strict=True))
        for path in product((0, 1), repeat=sum(kept)):
            exact[sum(path)] += chance / 2 ** sum(kept)
    found = drawn_paths.drawn_paths(survival, seed=3)
    np.testing.assert_allclose(found.expected, exact, atol=1e-14)
    assert found.p_value > 1e-3
    # As many steps of the plain network's paths, or of another survival, do not pass for them.
    other = drawn_paths.drawn_paths([min(1.0, p + 0.2) for p in survival[:-1]] + [0.9], seed=3)
    assert dataclasses.replace(found, drawn=other.drawn).p_value < 1e-6


def test_the_draw_of_paths_is_a_function_of_the_seed() -> None:
    one, same, other = (drawn_paths.drawn_paths([1.0] * 6, 3, seed).drawn.tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_p_values_are_uniform_where_the_distribution_is_right() -> None:
    rng = np.random.default_rng(0)
    expected = np.array([math.comb(8, k) / 256 for k in range(9)])
    p = [drawn_paths.DrawnPaths(rng.multinomial(2000, expected), expected).p_value for _ in range(300)]
    assert 0.4 < np.mean(p) < 0.6 and 2 < np.sum(np.array(p) < 0.05) < 30


def test_lengths_that_cannot_be_are_never_drawn_at_random() -> None:
    expected = np.array([0.5, 0.5, 0.0])
    assert drawn_paths.DrawnPaths(np.array([1000, 1000, 0]), expected).p_value > 0.9
    assert drawn_paths.DrawnPaths(np.array([900, 900, 200]), expected).p_value < 1e-6


# Remaining paths


@pytest.fixture(scope="module")
def remaining(tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    return remaining_paths.measure({}, data.digits(), Plan(), tmp_path_factory.mktemp("run") / "remaining-paths")


def test_the_papers_54_blocks(remaining: results.Run) -> None:
    found = remaining_paths.summarise(remaining)
    assert found.blocks == 54 and set(found.share) == {1, 10, 20}
    assert held(remaining_paths.claims(remaining)) == [True, True]
    again = remaining_paths.measure({}, data.digits(), Plan(), remaining.folder)
    assert again.rows(Value) == remaining.rows(Value) and len(remaining.rows(Value)) == 3 * 55
    for deleted, drawn in found.drawn.items():
        assert drawn[0] == 1 and (drawn[54 - deleted + 1 :] == 0).all()
        np.testing.assert_allclose(drawn, found.share[deleted], atol=0.06)


def test_the_share_that_is_left_is_that_of_all_deletions_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, deletions_of = 6, (1, 3)
    monkeypatch.setattr(remaining_paths, "BLOCKS", n)
    monkeypatch.setattr(remaining_paths, "DELETED", deletions_of)
    found = remaining_paths.summarise(remaining_paths.measure({}, data.digits(), Plan(plan_seed=2), tmp_path))
    for deleted in deletions_of:
        left, whole = Counter[int](), Counter[int]()
        for gone in combinations(range(n), deleted):
            for path in product((0, 1), repeat=n):
                whole[sum(path)] += 1
                left[sum(path)] += not any(path[i] for i in gone)
        exact = [left[k] / whole[k] for k in range(n + 1)]
        np.testing.assert_allclose(found.share[deleted], exact, atol=1e-14)
        np.testing.assert_allclose(found.drawn[deleted], exact, atol=0.05)


def test_paths_that_avoid_other_blocks_than_deleted_fail_their_claim(
    remaining: results.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = remaining_paths.paths.remaining_fraction
    monkeypatch.setattr(remaining_paths.paths, "remaining_fraction", lambda n, deleted: share(n, deleted + 1))
    assert held(remaining_paths.claims(remaining)) == [False, True]


# Equations 4 to 6, gradients, gates


@pytest.mark.parametrize(
    ("three", "worst", "expected"),
    [(1e-16, 1e-12, [True, True]), (1e-9, 1e-12, [False, True]), (0, 1e-3, [True, False])],
)
def test_claims_of_the_unraveled_view(tmp_path: Path, three: float, worst: float, expected: list[bool]) -> None:
    rows = [Value("", 0, 0, unraveled.NESTED, n, three if n == 3 else 1.0) for n in range(1, 7)]
    rows += [Value("", 0, 0, unraveled.PATHS, n, worst if n == 5 else 0.0) for n in range(1, 7)]
    assert held(unraveled.claims(made_run(tmp_path, "unraveled", {}, rows))) == expected


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        (0.3 ** np.arange(1.0, 13), [True, True]),
        (0.99 ** np.arange(1.0, 13), [True, False]),
        (1.5 ** np.arange(1.0, 13), [False, False]),
        (np.where(np.arange(12) < 2, 1.0, 1e-9), [False, True]),
    ],
    ids=["exponential", "slow", "growing", "a step"],
)
def test_claims_of_path_gradients(tmp_path: Path, norms: np.ndarray[Any, Any], expected: list[bool]) -> None:
    claims = path_gradients.claims(gradient_run(tmp_path, np.tile(norms, (5, 1))))
    assert held(claims) == expected and "of 12 blocks" in claims[1].measured


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True]),
        ({"half_off": 1e-6}, [False, True, True]),
        ({"parts_off": 1e-3}, [True, False, True]),
        ({"openness": 0.6}, [True, True, False]),
    ],
    ids=["the paper's", "not halved", "a part is missing", "open gates"],
)
def test_claims_of_highway_networks(tmp_path: Path, changed: dict[str, float], expected: list[bool]) -> None:
    rows = [*highway_rows(**changed), *(row for s in range(2) for row in deletions(0.1, [0.2] * 3, "highway", s))]
    run = made_run(tmp_path, "highway", {"highway": (3, ())}, rows, seeds=2)
    assert held(highway.claims(run)) == expected
    found = highway.summarise(run)
    assert found.bias.tolist() == [[-1, -2, -3], [-11, -12, -13]]
    np.testing.assert_allclose([own.mean for own in found.path_norms], [2, 1, 0.5])
    assert {part: own.tolist() for part, own in found.shares.items()} == {
        "skip": pytest.approx([0.5] * 3),
        "residual": pytest.approx([0.3] * 3),
        "gate": pytest.approx([0.2] * 3),
    }
    assert found.openness[0].mean == pytest.approx(changed.get("openness", 0.2) + 0.005)
    assert found.deletions.increase.tolist() == pytest.approx([0.1] * 3)


# Runs that are not complete


@pytest.mark.parametrize("name", [name for name in paper.EXPERIMENTS if name != "path-gradients"])
def test_a_run_that_was_never_finished_says_so(tmp_path: Path, name: str) -> None:
    needed = paper.EXPERIMENTS[name].networks
    kinds = {kind: (3, (1,)) for kind in needed}
    rows = [row for kind in needed[:1] for row in deletions(0.1, [0.2, 0.3], kind)]
    run = made_run(tmp_path, name, kinds, rows, seeds=2, modules=2, blocks=54)
    with pytest.raises(ValueError, match=rf"run: .*{tmp_path.name} is not complete; start its command again"):
        paper.claims(run)


def test_an_experiment_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is of 'alchemy'; expected one of unraveled, lesion-single, lesion-many"):
        paper.claims(made_run(tmp_path, "alchemy", {}, []))
