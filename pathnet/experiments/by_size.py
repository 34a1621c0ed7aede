"""Errors of random lesions by the size of the lesion: the numbers of Figures 5 (a) and 5 (b) (sections 4.2, 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import results
from pathnet.experiments.claims import Claim, all_of, at_least, at_most
from pathnet.experiments.errors import ErrorCounts, Spread, spread
from pathnet.experiments.run import unfinished
from pathnet.intervals import BOOTSTRAP_DRAWS, FEWEST
from pathnet.streams import stream

__all__ = ["ErrorBySize", "by_tau", "smooth", "smooth_ends", "smoothness", "summarise"]

RANK_CORRELATION = 0.9
LARGEST_STEP = 1 / 3
TENTHS = 10


@dataclass(frozen=True)
class ErrorBySize:
    """Error rates of random lesions, by the size of the lesion.

    Attributes:
        sizes: numbers of deleted blocks or of swapped pairs, or the number of the group: 1, 2, ...
        rates: for each size, the error rates of all draws and seeds, float64 [draws * seeds].
        tau: for each size, Kendall's tau between the order of the blocks and that of training, float64
            [draws * seeds].
        means: for each size, the mean error rate with its 95 % interval over draws and seeds.
        intact: error rate of the intact networks, the mean over seeds.
        chance: error rate of guessing.
        blocks: number n of blocks.
        draws: number of draws for each size and network.
        seeds: number of networks.
    """

    sizes: list[int]
    rates: list[NDArray[np.float64]]
    tau: list[NDArray[np.float64]]
    means: list[Spread]
    intact: float
    chance: float
    blocks: int
    draws: int
    seeds: int


def summarise(run: results.Run, kind: str = "residual") -> ErrorBySize:
    """Return the error rates of the networks of one kind, by the size of the lesion.

    Raises:
        ValueError: no lesion of some network is measured yet.
    """
    counts = ErrorCounts(run)
    facts = run.fact("networks", kind)
    blocks = facts[0]["blocks"]
    lesioned = [row for row in counts.of(kind) if row.size > 0]
    sizes = sorted({row.size for row in lesioned})
    if len({row.seed for row in lesioned}) < len(facts):
        raise unfinished(run)
    by_size = [[row for row in lesioned if row.size == size] for size in sizes]
    rates = [np.array([row.rate for row in rows]) for rows in by_size]
    unchanged = tuple(range(blocks))
    return ErrorBySize(
        sizes,
        rates,
        [
            np.array([scipy.stats.kendalltau(unchanged, row.order or unchanged).statistic for row in rows])
            for rows in by_size
        ],
        list(map(spread, rates)),
        float(counts.intact(kind).mean()),
        counts.chance,
        blocks,
        len({row.draw for row in lesioned}),
        len(facts),
    )


def by_tau(errors: ErrorBySize) -> ErrorBySize:
    """Regroup the draws by Kendall's tau into ten groups of about equal number; tau falls from group to group."""
    tau, rates = np.concatenate(errors.tau), np.concatenate(errors.rates)
    groups = [draws for draws in np.array_split(np.argsort(-tau, kind="stable"), TENTHS) if len(draws)]
    return replace(
        errors,
        sizes=list(range(1, len(groups) + 1)),
        rates=[rates[draws] for draws in groups],
        tau=[tau[draws] for draws in groups],
        means=[spread(rates[draws]) for draws in groups],
    )


def smooth(errors: ErrorBySize) -> tuple[float, float]:
    """Return how smoothly the mean error rises with the size of the lesion.

    Returns:
        Spearman's rank correlation of mean error and size, and the largest rise from one size to the next, as a
        share of the whole rise from the intact network. NaN if there is a single size, or no rise.
    """
    means = np.array([mean.mean for mean in errors.means])
    steps = np.diff([errors.intact, *means])
    rise = means[-1] - errors.intact
    correlation = float(scipy.stats.spearmanr(errors.sizes, means).statistic) if len(set(means)) > 1 else np.nan
    return correlation, float(steps.max() / rise) if rise > 0 else np.nan


def smooth_ends(errors: ErrorBySize) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ends of the 95 % intervals of both numbers of `smooth`, by a bootstrap over the draws of each size.

    A resample whose mean errors are all equal has the correlation 0, and one that does not rise has an infinite
    largest step. The ends are NaN for fewer than ten draws of some size.
    """
    if min(map(len, errors.rates)) < FEWEST:
        return (math.nan, math.nan), (math.nan, math.nan)
    rng = stream(0, "smooth")
    means = np.stack(
        [rates[rng.integers(0, len(rates), (BOOTSTRAP_DRAWS, len(rates)))].mean(1) for rates in errors.rates], 1
    )
    steps = np.diff(means, axis=1, prepend=errors.intact)
    rise = means[:, -1] - errors.intact
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.where(rise > 0, steps.max(1) / rise, np.inf)
        ranks = scipy.stats.rankdata(means, axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        sizes = scipy.stats.rankdata(errors.sizes) - (len(errors.sizes) + 1) / 2
        correlation = np.nan_to_num((ranks @ sizes) / np.sqrt((ranks**2).sum(1) * (sizes**2).sum()))
    ends = [np.quantile(column, (0.025, 0.975), method="nearest") for column in (correlation, largest)]
    return tuple(ends[0].tolist()), tuple(ends[1].tolist())


def smoothness(errors: ErrorBySize, paper: str, where: str, end: str) -> Claim:
    """Test the claim that error rises smoothly with the size of the lesion.

    Args:
        errors: error rates by size.
        paper, where: see `Claim`.
        end: the last size, in words.
    """
    correlation, step = smooth(errors)
    (least, most), (smallest, largest) = smooth_ends(errors)
    return Claim(
        paper,
        where,
        f"rank correlation with the mean error of at least {RANK_CORRELATION:g}, and no step from one box of the "
        f"figure to the next larger than {LARGEST_STEP:.0%} of the whole rise",
        f"correlation {correlation:.3g}{_between(least, most)}, largest step {100 * step:.2g} %"
        f"{_between(100 * smallest, 100 * largest)}; the error rises from {100 * errors.intact:.3g} % to "
        f"{errors.means[-1]} {end}",
        all_of(at_least(least, most, RANK_CORRELATION), at_most(smallest, largest, LARGEST_STEP)),
    )


def _between(low: float, high: float) -> str:
    return f" ({low:.3g} to {high:.3g})" if np.isfinite(low) else ""
