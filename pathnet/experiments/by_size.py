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

__all__ = ["ErrorBySize", "Smooth", "by_tau", "smooth", "smoothness", "summarise"]

LARGEST_RISE = 1 / 3
LARGEST_FALL = 0.1
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


@dataclass(frozen=True)
class Smooth:
    """Smoothness of the rise of the mean error with the size of the lesion.

    Steps lead from one size to the next, the first one from the intact network. Numbers are NaN if there is a single
    size, or no rise.

    Attributes:
        correlation: Spearman's rank correlation of mean error and size.
        total: the whole rise, from the intact network to the last size, with its 95 % interval.
        rise: largest step up, as a share of the whole rise from the intact network, with its 95 % interval.
        fall: largest step down, likewise; 0 if there is none.
    """

    correlation: float
    total: tuple[float, float, float]
    rise: tuple[float, float, float]
    fall: tuple[float, float, float]


def smooth(errors: ErrorBySize) -> Smooth:
    """Return how smoothly the mean error rises.

    The ends are the largest of the ends of all steps, each by a percentile bootstrap over the draws of each size,
    for these networks and images. (An interval of the largest step itself would be biased: noise adds to a maximum.)
    There are none for fewer than ten draws of some size.
    """
    means = np.array([mean.mean for mean in errors.means])
    correlation = float(scipy.stats.spearmanr(errors.sizes, means).statistic) if len(set(means)) > 1 else math.nan
    steps = _steps(means, errors.intact)
    low = high = np.full_like(steps, math.nan)
    least = most = math.nan
    if min(map(len, errors.rates)) >= FEWEST:
        rng = stream(0, "smooth")
        draws = [rates[rng.integers(0, len(rates), (BOOTSTRAP_DRAWS, len(rates)))].mean(1) for rates in errors.rates]
        low, high = np.quantile(_steps(np.stack(draws, 1), errors.intact), (0.025, 0.975), axis=0)
        least, most = np.quantile(draws[-1], (0.025, 0.975)) - errors.intact
    total = (float(means[-1] - errors.intact), float(least), float(most))
    rise = (float(steps.max()), float(low.max()), float(high.max()))
    fall = tuple(np.maximum(0, [-steps.min(), -high.min(), -low.min()]).tolist())
    return Smooth(correlation, total, rise, fall)


def _steps(means: NDArray[np.float64], intact: float) -> NDArray[np.float64]:
    """Return the steps to each of the means [..., sizes] as shares of the whole rise: [..., sizes]."""
    rise = means[..., -1:] - intact
    shares = np.diff(means, axis=-1, prepend=intact) / np.where(rise > 0, rise, math.nan)
    return shares if means.shape[-1] > 1 else np.full_like(shares, math.nan)


def smoothness(errors: ErrorBySize, paper: str, where: str, end: str) -> Claim:
    """Test the claim that error rises smoothly with the size of the lesion.

    Args:
        errors: error rates by size.
        paper, where: see `Claim`.
        end: the last size, in words.
    """
    how, last = smooth(errors), errors.means[-1]
    return Claim(
        paper,
        where,
        "the error rises, no step up from one box of the figure to the next is larger than "
        f"{LARGEST_RISE:.0%} of the rise, and none down larger than {LARGEST_FALL:.0%}",
        f"largest step up {_share(*how.rise)}, down {_share(*how.fall)} of the rise; rank correlation "
        f"{how.correlation:.3g}; the error rises from {100 * errors.intact:.3g} % to {last} {end}",
        all_of(
            at_least(*how.total[1:], 0.0),
            at_most(*how.rise[1:], LARGEST_RISE),
            at_most(*how.fall[1:], LARGEST_FALL),
        ),
    )


def _share(share: float, low: float, high: float) -> str:
    """Return a share with its interval, if it has one, in words."""
    ends = f" ({100 * low:.3g} to {100 * high:.3g})" if np.isfinite(low) else ""
    return f"{100 * share:.3g} %{ends}"
