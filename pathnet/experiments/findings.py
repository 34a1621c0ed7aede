"""The results of exact sums and signed draws, in sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathnet.experiments.comparison import Comparison, Cost, Exact, Signed, path_counts
from pathnet.experiments.summary import MOST, percent
from pathnet.intervals import no_interval

__all__ = ["Cancelled", "cancelled", "findings_of"]


@dataclass(frozen=True)
class Cancelled:
    """Cancellation between effective paths of one length: the sum of their norms over the norm of their sum.

    Attributes:
        first, last: range of lengths of the effective paths.
        least, most: smallest and largest ratio in that range.
    """

    first: int
    last: int
    least: float
    most: float


def cancelled(comparison: Comparison) -> Cancelled | None:
    """Return how much cancels between effective paths of one length, or None if that was not measured."""
    if comparison.cancelling is None or comparison.sampled is None:
        return None
    effective = comparison.sampled.effective
    left = comparison.cancelling.mean[effective.first - 1 : effective.last]
    left = left[left > 0]
    return Cancelled(effective.first, effective.last, 1 / left.max(), 1 / left.min()) if len(left) else None


def findings_of(comparison: Comparison) -> list[str]:
    """Return the results of exact sums and signed draws in sentences, which are printed below their tables."""
    return [
        *(_findings_of_exact(comparison, comparison.exact) if comparison.exact else []),
        *(_findings_of_signed(comparison, comparison.signed) if comparison.signed else []),
    ]


def _findings_of_exact(comparison: Comparison, exact: Exact) -> list[str]:
    n, cosine = comparison.n, exact.next_cosine.mean
    cosine = cosine[np.isfinite(cosine)]
    most, times = exact.first_to_explain(MOST), exact.norm.mean.sum() / exact.full_norm
    held = path_counts(n)[: most + 1].sum() / 2**n
    lines = [
        f"exact sums over all 2^{n} paths, on {exact.batches} batches: lengths up to {most} explain "
        f"{percent(exact.explained.mean[most])} of {comparison.gradient} and leave "
        f"{percent(exact.left.mean[most])} of its norm; they are {percent(held)} of all paths",
        f"lengths cancel one another: the norms of their sums add up to {times:.3g} times that of "
        f"{comparison.gradient}"
        + (
            f"; the cosine between neighbouring lengths is {cosine.min():.2g} to {cosine.max():.2g}"
            if len(cosine)
            else ""
        ),
    ]
    if not np.isfinite(exact.norm.low).any():
        lines[0] += f" ({no_interval(exact.batches, 'batch')})"
    if comparison.gates:
        lines.append("no path contains the part of the gradient that flows through the gates themselves")
    if (ratios := cancelled(comparison)) is not None:
        lines.append(
            f"paths of one length cancel one another: their norms add up to {ratios.least:.3g} to {ratios.most:.3g} "
            f"times the norm of their sum, at lengths {ratios.first} to {ratios.last}"
        )
    return lines


def _findings_of_signed(comparison: Comparison, signed: Signed) -> list[str]:
    judgement = signed.judgement
    wrong = np.flatnonzero(~judgement.trusted)
    few = "" if np.isfinite(judgement.error).any() else ", too few for a standard error"
    lines = [f"{judgement.draws} signed draws on {signed.batches} batches{few}"]
    if len(wrong):
        lines[0] += f"; not to be trusted at {_lengths(wrong)}"
        heavy = np.flatnonzero(~(judgement.tail < judgement.threshold))
        aligned = np.setdiff1d(wrong, heavy)
        if len(heavy):
            lines.append(
                f"{_lengths(heavy)}: the tail is heavy or there are too few draws (k-hat must be below "
                f"{judgement.threshold:.2g})"
            )
        if len(aligned):
            known = np.isfinite(judgement.aligned[aligned]).all()
            why = (
                "the paths are so aligned"
                if known
                else "without exact sums, it cannot be ruled out that the paths are so aligned"
            )
            lines.append(f"{_lengths(aligned)}: {why} that rare, unseen draws may hold much of the mean")
    if comparison.cost is not None:
        lines += _findings_of_cost(comparison.cost)
    return lines


def _findings_of_cost(cost: Cost) -> list[str]:
    better = np.flatnonzero(cost.settled & (cost.signed < cost.sampled)) + 1
    worse = np.flatnonzero(cost.settled & (cost.signed >= cost.sampled)) + 1
    undecided = np.flatnonzero(~cost.settled) + 1
    lines = []
    for outcome, lengths in (("varies less than", better), ("varies as much as, or more than,", worse)):
        if len(lengths):
            lines.append(
                f"at equal cost, one signed draw {outcome} one sampled path at {_lengths(lengths)} "
                f"({cost.batches} batches)"
            )
    if len(undecided):
        lines.append(
            f"at {_lengths(undecided)}, these measurements do not decide: the estimate that varied less has a heavy "
            "tail"
        )
    return lines


def _lengths(numbers: NDArray[np.int64]) -> str:
    """Return lengths in words, such as "lengths 1, 3 to 7"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    words = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"length{'s' if len(numbers) > 1 else ''} {', '.join(words)}"
