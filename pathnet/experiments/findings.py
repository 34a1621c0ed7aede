"""What exact sums and signed draws of a run of path gradients came to, in sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathnet.experiments.comparison import Cost, Exact, Found, Signed, path_counts
from pathnet.experiments.summary import MOST, percent
from pathnet.intervals import no_interval

__all__ = ["Cancelled", "cancelled", "findings_of"]


@dataclass(frozen=True)
class Cancelled:
    """Among the lengths of the effective paths, ``first`` to ``last``: the least and the most times that the norms of
    the paths of a length add up to the norm of their sum."""

    first: int
    last: int
    least: float
    most: float


def cancelled(result: Found) -> Cancelled | None:
    """How much cancels between effective paths of one length; None where that was not measured."""
    if result.cancelling is None or result.sampled is None:
        return None
    effective = result.sampled.effective
    left = result.cancelling.mean[effective.first - 1 : effective.last]
    left = left[left > 0]
    return Cancelled(effective.first, effective.last, 1 / left.max(), 1 / left.min()) if len(left) else None


def findings_of(result: Found) -> list[str]:
    """The exact sums and the signed draws in sentences, for the foot of their tables."""
    return [
        *(_of_exact(result, result.exact) if result.exact else []),
        *(_of_signed(result, result.signed) if result.signed else []),
    ]


def _of_exact(result: Found, exact: Exact) -> list[str]:
    n, cosine = result.n, exact.next_cosine.mean
    cosine = cosine[np.isfinite(cosine)]
    most, times = exact.first_to_explain(MOST), exact.norm.mean.sum() / exact.full_norm
    held = path_counts(n)[: most + 1].sum() / 2**n
    lines = [
        f"exact sums over all 2^{n} paths, on {exact.batches} batches: lengths up to {most} explain "
        f"{percent(exact.explained.mean[most])} of {result.gradient} and leave {percent(exact.left.mean[most])} of "
        f"its norm; they are {percent(held)} of all paths",
        f"the lengths cancel each other: the norms of their sums add up to {times:.3g} times that of "
        f"{result.gradient}"
        + (f"; the cosine of neighbours is {cosine.min():.2g} to {cosine.max():.2g}" if len(cosine) else ""),
    ]
    if not np.isfinite(exact.norm.low).any():
        lines[0] += f" ({no_interval(exact.batches, 'batch')})"
    if result.gates:
        lines.append("what flows through the gates themselves is a part of the gradient that no path has")
    if (among := cancelled(result)) is not None:
        lines.append(
            f"the paths of a length cancel each other: their norms add up to {among.least:.3g} to {among.most:.3g} "
            f"times the norm of their sum, at the lengths {among.first} to {among.last}"
        )
    return lines


def _of_signed(result: Found, signed: Signed) -> list[str]:
    judgement = signed.judgement
    wrong = np.flatnonzero(~judgement.trusted)
    few = "" if np.isfinite(judgement.error).any() else ", too few for a standard error"
    lines = [f"{judgement.draws} signed draws on {signed.batches} batches{few}"]
    if len(wrong):
        lines[0] += f"; not to be trusted at the {_lengths(wrong)}"
        heavy = np.flatnonzero(~(judgement.tail < judgement.threshold))
        aligned = np.setdiff1d(wrong, heavy)
        if len(heavy):
            lines.append(
                f"{_lengths(heavy)}: the tail is heavy or the draws are too few (k-hat is to be below "
                f"{judgement.threshold:.2g})"
            )
        if len(aligned):
            known = np.isfinite(judgement.aligned[aligned]).all()
            why = (
                "the paths are so aligned"
                if known
                else "for all that is known without exact sums, paths are so aligned"
            )
            lines.append(f"{_lengths(aligned)}: {why} that draws too rare to be seen may hold much of the mean")
    if result.cost is not None:
        lines += _of_cost(result.cost)
    return lines


def _of_cost(cost: Cost) -> list[str]:
    better = np.flatnonzero(cost.settled & (cost.signed < cost.sampled)) + 1
    worse = np.flatnonzero(cost.settled & (cost.signed >= cost.sampled)) + 1
    open_ = np.flatnonzero(~cost.settled) + 1
    lines = []
    for which, own in (("varies less than", better), ("varies as much as, or more than,", worse)):
        if len(own):
            lines.append(
                f"at equal cost, one signed draw {which} one sampled path at the {_lengths(own)} "
                f"({cost.batches} batches)"
            )
    if len(open_):
        lines.append(f"at the {_lengths(open_)} these measurements do not tell: what varied less has a heavy tail")
    return lines


def _lengths(numbers: NDArray[np.int64]) -> str:
    """Such as "lengths 1, 3 to 7"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    said = [f"{own[0]} to {own[-1]}" if len(own) > 1 else str(own[0]) for own in runs]
    return f"length{'s' if len(numbers) > 1 else ''} {', '.join(said)}"
