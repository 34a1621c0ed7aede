"""When the mean of signed draws is trusted: the tail index, alignment, too few draws; against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import comb

import numpy as np
import pytest
from helpers.oracles import krawtchouk
from numpy.typing import NDArray
from scipy.stats import genpareto, kurtosis

import pathnet
from pathnet.signed import aligned_variances, judge, tail_index

N = 54
SQUARES = np.array([[float(krawtchouk(N, k, m) ** 2) for k in range(N + 1)] for m in range(N + 1)])
"""What draws are where all of 54 modules are the number 1: by the minus signs among them, and by length."""
COUNTS = np.array([float(comb(N, k)) for k in range(N + 1)])


def aligned_draws(count: int, seed: int = 0) -> NDArray[np.float64]:
    """Draws of `Tape.squared_norms_by_length` where all paths' gradients are one number (see test_by_length)."""
    signs = pathnet.paths.signs(N, count, seed).numpy()
    return SQUARES[(signs < 0).sum(1)]


# The closed form


def test_the_variance_of_aligned_draws_is_that_over_all_signs() -> None:
    n = 9
    for k in range(n + 1):
        draws = [krawtchouk(n, k, sum(signs)) ** 2 for signs in product((0, 1), repeat=n)]
        assert np.mean(draws) == comb(n, k)
        assert aligned_variances(n)[k] == pytest.approx(np.var(draws) / comb(n, k) ** 2, rel=1e-12)


def test_of_54_modules_it_is_astronomic() -> None:
    assert aligned_variances(N)[0] == aligned_variances(N)[N] == 0
    assert aligned_variances(N)[5] == pytest.approx(3e3, rel=0.05)
    assert aligned_variances(N)[27] == pytest.approx(4e14, rel=0.1)


# What is trusted


@pytest.mark.parametrize("count", [100, 1000, 3000])
def test_aligned_paths_are_not_trusted_where_draws_that_were_never_seen_hold_the_mean(count: int) -> None:
    """At length 27 the draws look harmless, and their mean is three times too small; the exact sums tell."""
    draws = aligned_draws(count)
    found = judge(draws, COUNTS**2)
    assert found.mean[27] < 0.6 * COUNTS[27] and found.tail[27] < found.threshold
    assert not found.trusted[5:50].any() and not judge(draws).trusted[5:50].any()
    assert found.aligned[27] > 1, "below the least that the sum of squares can be"
    for k in (0, 1, N - 1, N):
        assert found.trusted[k] and found.mean[k] == pytest.approx(COUNTS[k], rel=0.2)


def test_whatever_is_trusted_is_near_the_expectation() -> None:
    """Over lengths and draws that the closed form knows: some means are trusted, and none that is far off."""
    off = []
    for seed in range(20):
        found = judge(aligned_draws(200, seed), COUNTS**2)
        off += list(np.abs(found.mean / COUNTS - 1)[found.trusted])
    assert len(off) >= 4 * 20 and max(off) < 0.7


def independent(count: int, n: int = 12, size: int = 40) -> tuple[NDArray[np.float64], ...]:
    """Path gradients of random directions: draws [count, n + 1], and by length [n + 1] what they estimate, and the
    squared norms of the exact sums."""
    rng = np.random.default_rng(0)
    codes = pathnet.paths.enumerate_all(n).numpy().astype(np.int64)
    gradients, length = rng.normal(size=(len(codes), size)), codes.sum(1)
    minus = rng.integers(0, 2, (count, n))
    signs = np.concatenate([np.where(minus @ codes.T % 2, -1.0, 1.0), np.ones((1, len(codes)))])
    sums = np.stack([(signs * (length == k)) @ gradients for k in range(n + 1)], 1)
    squares = np.bincount(length, (gradients**2).sum(1))
    return (sums[:-1] ** 2).sum(2), squares, (sums[-1] ** 2).sum(1)


def test_paths_of_random_directions_are_trusted() -> None:
    draws, expected, sums = independent(200)
    found = judge(draws, sums)
    assert found.trusted.all()
    assert (np.abs(found.mean / expected - 1) <= 4 * found.error + 1e-9).all() and found.error.max() < 0.05
    pairs = sums / expected / [comb(12, k) for k in range(13)]
    np.testing.assert_allclose(found.aligned, pairs, rtol=0.2)
    alone = judge(draws)
    assert not alone.trusted[6] and np.isnan(alone.aligned).all(), "without exact sums they may all be aligned"


@pytest.mark.parametrize(("count", "trusted"), [(1, False), (20, False), (21, False), (200, True)])
def test_few_draws_are_not_trusted(count: int, trusted: bool) -> None:
    """Whatever they are, unless they are all the same."""
    draws = np.stack([np.full(count, 3.0), np.random.default_rng(1).uniform(1, 2, count)], 1)
    found = judge(draws, np.array([9.0, 0.0]))
    assert found.trusted.tolist() == [count > 1, trusted] and found.draws == count
    assert found.threshold == (pytest.approx(1 - 1 / np.log10(count)) if count > 1 else -np.inf)


def test_the_threshold_ends_at_0_7() -> None:
    assert judge(np.ones((10_000, 1))).threshold == 0.7


def test_the_standard_error_is_that_of_whole_batches() -> None:
    """Draws that repeat what their batch is tell no more than one of each."""
    rng = np.random.default_rng(2)
    batches = rng.lognormal(size=(50, 3))
    own = judge(batches)
    np.testing.assert_allclose(own.error, batches.std(0, ddof=1) / 50**0.5 / batches.mean(0))
    again = judge(np.repeat(batches, 8, axis=0), batch=np.repeat(np.arange(50), 8))
    np.testing.assert_allclose(again.error, own.error)
    one = judge(batches, batch=np.zeros(50, np.int64))
    np.testing.assert_allclose(one.error, own.error)
    few = judge(batches[:18], batch=np.repeat(np.arange(9), 2))
    assert np.isnan(few.error).all() and np.isnan(judge(batches[:9]).error).all()


def test_exact_sums_of_some_batches_are_compared_on_those() -> None:
    """The draws of the others are a thousand times as large."""
    draws = np.random.default_rng(3).uniform(0.9, 1.1, (400, 3)) * np.repeat([1.0, 1000.0], 200)[:, None]
    sums = np.where(np.arange(400)[:, None] < 200, [[0.5, 1.0, 0.5]], np.nan)
    np.testing.assert_allclose(judge(draws, sums).aligned, [0.5, 0.5, 0.5], rtol=0.02)


@pytest.mark.parametrize("scale", [1e-140, 1.0, 1e140])
def test_scale_does_not_matter(scale: float) -> None:
    draws = np.random.default_rng(4).lognormal(size=(300, 4))
    plain, other = judge(draws, np.ones(4)), judge(scale * draws, scale * np.ones(4))
    for name in ("error", "tail", "aligned", "needed"):
        np.testing.assert_allclose(getattr(other, name), getattr(plain, name), rtol=1e-9)
    np.testing.assert_allclose(other.mean, scale * plain.mean, rtol=1e-12)


@pytest.mark.parametrize(
    ("draws", "sums", "message"),
    [
        (np.ones(3), None, r"squared_norms: expected shape \[draws, n \+ 1\] .* got \(3,\)"),
        (np.ones((0, 3)), None, "squared_norms: expected shape .* at least one draw"),
        (np.array([[1.0, np.nan]]), None, "squared_norms: expected finite squares"),
        (np.array([[1.0, -1.0]]), None, "squared_norms: expected finite squares"),
        (np.ones((2, 3)), np.ones(2), r"sums: expected shape \[3\] .* got \(2,\)"),
    ],
)
def test_bad_draws_are_named(draws: NDArray[np.float64], sums: NDArray[np.float64] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(draws, sums)


# The tail index


@pytest.mark.parametrize("index", [0.1, 0.3, 0.5, 0.7, 1.0, 1.5])
def test_it_is_the_index_of_a_generalised_pareto_distribution(index: float) -> None:
    """Drawn towards 1/2 with the weight of ten among the 190 that are fitted."""
    found = []
    for seed in range(40):
        rng = np.random.default_rng([seed, int(10 * index)])
        found.append(tail_index(genpareto.rvs(index, size=4000, random_state=rng)))
    assert np.mean(found) == pytest.approx((190 * index + 5) / 200, abs=0.07)


def test_it_is_that_of_maximum_likelihood_where_values_are_many() -> None:
    values = np.sort(genpareto.rvs(0.4, size=100_000, random_state=np.random.default_rng(5)))
    largest = values[-int(np.ceil(3 * 100_000**0.5)) - 1 :]
    likelihood, _, _ = genpareto.fit(largest[1:] - largest[0], floc=0)
    assert tail_index(values) == pytest.approx(likelihood, abs=0.05)


def tails(values: Sequence[float]) -> float:
    return tail_index(np.array(values))


def test_light_and_degenerate_tails() -> None:
    rng = np.random.default_rng(6)
    assert tail_index(rng.uniform(size=2000)) < 0 and abs(tail_index(rng.exponential(size=20_000))) < 0.15
    assert tails([1.0] * 30) == tails([0.0] * 30) == tails([2.0]) == -np.inf
    assert tails([1.0, 1.00001] * 15) == -np.inf, "rounding"
    assert tails([0.0] * 96 + [1.0] * 4) == np.inf, "fewer than five above the others"
    assert np.isfinite(tails([0.0] * 60 + [1.0, 2.0] * 20))
    assert kurtosis(aligned_draws(2000)[:, 3]) > 10 and tail_index(aligned_draws(2000)[:, 3]) > 0.3
