"""Statistics of sampled path gradients by length: closed forms, intervals of whole batches, and degenerate cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.gradient_runs import measurements_of
from numpy.typing import NDArray

from pathnet.experiments import path_gradients
from pathnet.experiments.summary import findings, percent, summarise
from pathnet.intervals import bootstrap_means


@pytest.mark.parametrize("n", [3, 12, 54])
@pytest.mark.parametrize("rate", [0.3, 1e-3])
def test_exponential_norms_give_the_exact_rate_and_product(n: int, rate: float) -> None:
    """Frequency times magnitude is then binomial too, with probability rate / (1 + rate)."""
    length = np.arange(1, n + 1)
    summary = summarise(measurements_of(np.tile(7 * rate**length, (5, 1))), n)
    assert summary.decay[0] == pytest.approx(rate, rel=1e-12) and np.isnan(summary.decay[1:]).all()
    assert math.exp(summary.log_intercept) == pytest.approx(7, rel=1e-9)
    p = rate / (1 + rate)
    binomial = np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in length])
    np.testing.assert_allclose(summary.product, binomial / binomial.sum(), rtol=1e-9)
    np.testing.assert_allclose(summary.mean, 7 * rate**length, rtol=1e-14)
    assert np.isnan(summary.low).all() and np.isnan(summary.high).all()
    assert (summary.std <= 1e-14 * summary.mean).all()


def test_norms_far_below_the_range_of_float64_squares() -> None:
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=(40, 6))
    plain, tiny = (summarise(measurements_of(norms * scale), 6) for scale in (1.0, 1e-200))
    for name in ("mean", "std", "quantile_05", "quantile_50", "quantile_95", "low", "high"):
        np.testing.assert_allclose(getattr(tiny, name), 1e-200 * getattr(plain, name), rtol=1e-12)
    np.testing.assert_allclose(tiny.product, plain.product, rtol=1e-9)
    assert tiny.decay == pytest.approx(plain.decay, rel=1e-9)
    assert (tiny.effective.first, tiny.effective.last) == (plain.effective.first, plain.effective.last)
    steep = summarise(measurements_of(np.tile(10.0 ** -(5.0 * np.arange(1, 61)), (3, 1))), 60)
    assert steep.decay[0] == pytest.approx(1e-5, rel=1e-9) and steep.effective.first == steep.effective.last == 1


def test_moments_and_quantiles_of_each_length() -> None:
    norms = np.random.default_rng(1).lognormal(size=(30, 4))
    summary = summarise(measurements_of(norms), 4)
    np.testing.assert_allclose(summary.mean, norms.mean(0))
    np.testing.assert_allclose(summary.std, norms.std(0, ddof=1))
    np.testing.assert_allclose(summary.quantile_95, np.quantile(norms, 0.95, axis=0))
    np.testing.assert_allclose(summary.quantile_50, np.median(norms, axis=0))
    assert summary.count.tolist() == [30] * 4 and summary.measurements == 120 and summary.batches == 30
    np.testing.assert_allclose(summary.share, [4 / 16, 6 / 16, 4 / 16, 1 / 16])


def test_the_interval_is_that_of_whole_batches() -> None:
    """The interval of a mean is 2 x 1.96 standard errors wide. If all lengths of a batch share one factor, it cancels
    in the rate; resampling single measurements would give the rate an interval of several percent."""
    rng = np.random.default_rng(2)
    factor = rng.lognormal(sigma=0.5, size=(400, 1))
    summary = summarise(measurements_of(factor * 0.5 ** np.arange(1, 9)), 8)
    expected = 2 * 1.96 * factor.std() / 20 * 0.5 ** np.arange(1, 9)
    np.testing.assert_allclose(summary.high - summary.low, expected, rtol=0.15)
    assert np.isnan(summary.decay[1:]).all(), "an interval of no width is none"
    apart = summarise(measurements_of(rng.lognormal(sigma=0.5, size=(400, 8)) * 0.5 ** np.arange(1, 9)), 8)
    assert 1e-3 < apart.decay[2] - apart.decay[1] < 5e-2


def test_the_bootstrap_is_the_same_each_time() -> None:
    measurements = measurements_of(np.random.default_rng(3).lognormal(size=(20, 5)))
    assert summarise(measurements, 5).as_json() == summarise(measurements, 5).as_json()


def brute_force_run(shares: NDArray[np.float64], most: float) -> int:
    """Return the number of lengths of the shortest run that holds ``most``."""
    n = len(shares)
    runs = [(last - first, first, last) for first in range(n) for last in range(first + 1, n + 1)]
    return min(width for width, first, last in runs if math.fsum(shares[first:last]) >= most - 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_effective_range_is_the_shortest_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    summary = summarise(measurements_of(rng.lognormal(sigma=3, size=(2, n))), n)
    effective = summary.effective
    product = summary.product[effective.first - 1 : effective.last]
    assert product.sum() >= 0.95 - 1e-12 and effective.gradient == pytest.approx(product.sum())
    assert len(product) == brute_force_run(summary.product, 0.95)
    lengths = range(effective.first, effective.last + 1)
    assert effective.paths == pytest.approx(sum(math.comb(n, k) for k in lengths) / 2**n)


def test_the_papers_network_of_54_blocks() -> None:
    summary = summarise(measurements_of(np.tile(0.3 ** np.arange(1.0, 55), (2, 1))), 54)
    assert (summary.central.first, summary.central.last) == (20, 34) and summary.central.paths > 0.95
    lines = findings(summary)
    assert "lengths 19 to 35 hold 98 % of all paths" in lines[-1]
    assert "5 to 17 hold 0.45 % (paper: 0.45 %)" in lines[-1]
    assert not any("paper" in line for line in findings(summarise(measurements_of(np.ones((2, 53))), 53)))


def test_zero_norms_count_in_the_mean_and_are_told() -> None:
    norms = np.tile(0.5 ** np.arange(1.0, 6), (4, 1))
    norms[:2, 1] = 0
    norms[:, 4] = 0
    summary = summarise(measurements_of(norms), 5)
    assert summary.zeros == 6 and summary.mean[1] == 0.125 and summary.mean[4] == 0 and summary.product[4] == 0
    # The line is fitted where the logarithm exists: lengths 1, 2, 3, 4 with means 1/2, 1/8, 1/8, 1/16.
    assert math.log2(summary.decay[0]) == pytest.approx(-0.9)
    assert "6 norms are exactly 0" in findings(summary)[-1]


def test_lengths_and_batches_that_are_not_measured() -> None:
    norms = np.tile(0.5 ** np.arange(1.0, 7), (3, 1))
    norms[:, 2] = np.nan
    norms[0, 3] = np.nan
    summary = summarise(measurements_of(norms), 6)
    assert summary.count.tolist() == [3, 3, 0, 2, 3, 3] and math.isnan(summary.mean[2]) and summary.product[2] == 0
    assert summary.decay[0] == pytest.approx(0.5)
    assert json.loads(json.dumps(summary.as_json(), allow_nan=False))["mean"][2] is None


@pytest.mark.parametrize("batches", [1, 2, 9])
def test_few_batches_have_no_interval_and_the_text_says_how_many(batches: int) -> None:
    """A bootstrap of two batches would give one: in a quarter of its resamples, each end is one batch twice."""
    norms = np.random.default_rng(0).lognormal(size=(batches, 8)) * 0.5 ** np.arange(1, 9)
    summary = summarise(measurements_of(norms), 8)
    assert np.isnan(summary.low).all() and np.isnan(summary.high).all() and np.isnan(summary.decay[1:]).all()
    words = f"no interval: {batches} batch{'es' if batches > 1 else ''}"
    assert any(words in line for line in findings(summary))
    (decay, _) = path_gradients._claims_of_sampled(summary)
    assert words in decay.measured and "nan" not in decay.measured
    enough = summarise(measurements_of(np.random.default_rng(0).lognormal(size=(10, 8)) * 0.5 ** np.arange(1, 9)), 8)
    assert (enough.low < enough.mean).all() and enough.decay[1] < enough.decay[0] < enough.decay[2]
    assert not any("no interval" in line for line in findings(enough))


def test_one_batch_has_no_interval_and_one_block_no_rate() -> None:
    one = summarise(measurements_of(0.5 ** np.arange(1.0, 5)[None]), 4)
    assert math.isnan(one.low[0]) and math.isnan(one.decay[1]) and one.decay[0] == pytest.approx(0.5)
    assert not any("nan" in line for line in findings(one))
    alone = summarise(measurements_of(np.ones((3, 1))), 1)
    assert math.isnan(alone.decay[0]) and (alone.effective.first, alone.effective.last) == (1, 1)
    assert not any("nan" in line for line in findings(alone))


def test_nothing_to_summarise_is_an_error() -> None:
    with pytest.raises(ValueError, match="measurements: expected some norms above zero, got none among 0"):
        summarise(measurements_of(np.empty((0, 4))), 4)
    with pytest.raises(ValueError, match="got none among 8"):
        summarise(measurements_of(np.zeros((2, 4))), 4)


def test_percentages() -> None:
    assert [percent(share) for share in (0.98017, 0.0045366, 0.5, 1e-14)] == ["98 %", "0.45 %", "50 %", "1e-12 %"]


# Intervals by resampled batches


def shortest_range(product: NDArray[np.float64]) -> tuple[int, int]:
    """Return the first of the shortest ranges of lengths that hold 95 %, or the fullest of them, by trying all."""
    n = len(product)
    ranges = [
        (last - first, -product[first : last + 1].sum(), first) for first in range(n) for last in range(first, n)
    ]
    width, _, first = min(each for each in ranges if -each[1] >= 0.95)
    return first + 1, first + width + 1


def test_intervals_are_quantiles_over_resampled_batches() -> None:
    rng = np.random.default_rng(2)
    n, length = 7, np.arange(1, 8)
    norms = 0.6**length * rng.lognormal(0, 2, (12, n))
    summary = summarise(measurements_of(norms), n)
    counts = np.array([math.comb(n, k) for k in length])
    straight, means, ranges, shares = [], [], [], []
    for resampled in bootstrap_means(norms, np.ones(norms.shape, np.bool_)):
        straight.append(np.corrcoef(length, np.log(resampled))[0, 1] ** 2)
        product = counts * resampled / (counts * resampled).sum()
        means.append((length * product).sum())
        ranges.append(shortest_range(product))
        first, last = ranges[-1]
        shares.append(counts[first - 1 : last].sum() / 2**n)
    measured, low, high = summary.straightness
    reflected = 2 * measured - np.quantile(straight, (0.975, 0.025))
    assert (low, high) == pytest.approx((reflected[0], min(1, reflected[1])))
    assert summary.mean_length[1:] == pytest.approx(np.quantile(means, (0.025, 0.975)))
    ends = np.quantile(ranges, (0.025, 0.975), axis=0, method="nearest")
    resampled = summary.resampled
    assert resampled is not None
    assert (resampled.first, resampled.last) == (tuple(ends[:, 0]), tuple(ends[:, 1]))
    assert resampled.paths == pytest.approx(tuple(np.quantile(shares, (0.025, 0.975), method="nearest")))
    product = counts * norms.mean(0) / (counts * norms.mean(0)).sum()
    assert summary.mean_length[0] == pytest.approx((length * product).sum())
    assert summary.straightness[0] == pytest.approx(np.corrcoef(length, np.log(norms.mean(0)))[0, 1] ** 2)
    assert resampled.first[0] < resampled.first[1] or resampled.last[0] < resampled.last[1]
    (line,) = (line for line in findings(summary) if line.startswith("effective paths"))
    assert "(95 % intervals: first 1" in line and json.loads(json.dumps(summary.as_json()))["resampled"]["first"]


def test_few_batches_have_no_intervals() -> None:
    summary = summarise(measurements_of(np.random.default_rng(3).lognormal(size=(9, 4))), 4)
    assert summary.resampled is None and np.isnan([*summary.straightness[1:], *summary.mean_length[1:]]).all()
    assert not any("95 % intervals" in line for line in findings(summary))
