"""The paper's claims, and the verdicts of measurements on them.

A verdict compares a 95 % interval with a bound, so a number that a repetition could put on the other side of its
bound decides nothing. Intervals are for the networks that were measured: over test images, draws or batches. Only
where several trainings are compared, they are over trainings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Claim", "Verdict", "all_of", "at_least", "at_most", "exactly", "in_words"]

Verdict = Literal["held", "did not hold", "open"]
"""``open``: the interval contains the bound, or there is none; or the networks do not meet the claim's condition."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and the measurement that tests it.

    Attributes:
        paper: the statement, in short.
        where: section and figure of the paper.
        bound: the condition under which the claim holds, in words and numbers.
        measured: the measured values, in words and numbers, with their 95 % intervals.
        verdict: ``held`` or ``did not hold`` where the interval lies on one side of the bound, else ``open``.
    """

    paper: str
    where: str
    bound: str
    measured: str
    verdict: Verdict


def exactly(held: bool) -> Verdict:
    """Return the verdict of a check that needs no interval: of an identity, or of a test with a p-value."""
    return "held" if held else "did not hold"


def at_most(low: float, high: float, bound: float) -> Verdict:
    """Return the verdict on a number that should be at most ``bound``.

    Args:
        low, high: the ends of the number's 95 % interval; NaN if there is none.
        bound: the largest number for which the claim holds.
    """
    if high <= bound:
        return "held"
    return "did not hold" if low > bound else "open"


def at_least(low: float, high: float, bound: float) -> Verdict:
    """Return the verdict on a number that should be at least ``bound``, see `at_most`."""
    return at_most(-high, -low, -bound)


def all_of(*verdicts: Verdict) -> Verdict:
    """Return the verdict on several conditions, all of which must hold."""
    if "did not hold" in verdicts:
        return "did not hold"
    return "open" if "open" in verdicts else "held"


def in_words(claims: Sequence[Claim]) -> str:
    """Return how many claims have each verdict, such as ``17 held, 2 did not hold and 1 is open``."""
    count = Counter(claim.verdict for claim in claims)
    open_ones = f"{count['open']} {'is' if count['open'] == 1 else 'are'} open"
    return f"{count['held']} held, {count['did not hold']} did not hold and {open_ones}"
