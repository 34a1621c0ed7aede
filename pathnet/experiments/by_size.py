"""Errors of random lesions by their size: what Figures 5 (a) and 5 (b) show (sections 4.2 and 4.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import results
from pathnet.experiments.errors import ErrorCounts, Spread, spread
from pathnet.experiments.run import Claim, unfinished

__all__ = ["ErrorBySize", "by_tau", "smooth", "smoothness", "summarise"]

RANK_CORRELATION = 0.9
LARGEST_STEP = 1 / 3
TENTHS = 10


@dataclass(frozen=True)
class ErrorBySize:
    """The error rates of random lesions, by their size.

    Attributes:
        sizes: how many blocks are deleted, or pairs swapped, or the number of the group: 1, 2, ...
        rates: for each size, of all draws and seeds, float64 [draws * seeds].
        tau: for each size, Kendall's correlation of the order of the blocks with that of training, of the same.
        means: for each size, with a 95 % interval over draws and seeds.
        intact: the error of the networks as they are, the mean over seeds.
        chance: the error of guessing.
        blocks: n.
        draws: for each size and network.
        seeds: networks.
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
    """Of the networks of one kind.

    Raises:
        ValueError: a network has no lesion measured yet.
    """
    counts = ErrorCounts(run)
    facts = run.fact("networks", kind)
    blocks = facts[0]["blocks"]
    lesioned = [row for row in counts.of(kind) if row.size > 0]
    sizes = sorted({row.size for row in lesioned})
    if len({row.seed for row in lesioned}) < len(facts):
        raise unfinished(run)
    by_size = [[row for row in lesioned if row.size == size] for size in sizes]
    rates = [np.array([row.rate for row in own]) for own in by_size]
    unmoved = tuple(range(blocks))
    return ErrorBySize(
        sizes,
        rates,
        [
            np.array([scipy.stats.kendalltau(unmoved, row.order or unmoved).statistic for row in own])
            for own in by_size
        ],
        list(map(spread, rates)),
        float(counts.intact(kind).mean()),
        counts.chance,
        blocks,
        len({row.draw for row in lesioned}),
        len(facts),
    )


def by_tau(found: ErrorBySize) -> ErrorBySize:
    """The same draws in ten groups of about equal number by Kendall's tau, from the order of training on."""
    tau, rates = np.concatenate(found.tau), np.concatenate(found.rates)
    groups = [own for own in np.array_split(np.argsort(-tau, kind="stable"), TENTHS) if len(own)]
    return replace(
        found,
        sizes=list(range(1, len(groups) + 1)),
        rates=[rates[own] for own in groups],
        tau=[tau[own] for own in groups],
        means=[spread(rates[own]) for own in groups],
    )


def smooth(found: ErrorBySize) -> tuple[float, float]:
    """Spearman's rank correlation of mean error and size; the largest rise from one size to the next, as a share of
    the whole rise from the intact network. NaN where there is a single size, or no rise."""
    means = np.array([mean.mean for mean in found.means])
    steps = np.diff([found.intact, *means])
    rise = means[-1] - found.intact
    correlation = float(scipy.stats.spearmanr(found.sizes, means).statistic) if len(set(means)) > 1 else np.nan
    return correlation, float(steps.max() / rise) if rise > 0 else np.nan


def smoothness(found: ErrorBySize, paper: str, where: str, end: str) -> Claim:
    """That error rises with the size of a lesion, and by no large step.

    Args:
        end: what the last size is, in words.
    """
    correlation, step = smooth(found)
    return Claim(
        paper,
        where,
        f"rank correlation with the mean error at least {RANK_CORRELATION:g}, and no step from one box of the figure "
        f"to the next more than {LARGEST_STEP:.0%} of the whole rise",
        f"correlation {correlation:.3g}, largest step {100 * step:.2g} %; from {100 * found.intact:.3g} % of error "
        f"to {found.means[-1]} {end}",
        bool(correlation >= RANK_CORRELATION and step <= LARGEST_STEP),
    )
