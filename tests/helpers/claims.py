"""Claims that tests expect to hold, not to hold, or to be open."""

from __future__ import annotations

from collections.abc import Sequence

from pathnet.experiments.claims import Claim, Verdict

__all__ = ["HELD", "NOT", "OPEN", "verdicts"]

HELD: Verdict = "held"
NOT: Verdict = "did not hold"
OPEN: Verdict = "open"


def verdicts(claims: Sequence[Claim]) -> list[Verdict]:
    """Return the verdicts on claims, after checking that each claim is complete."""
    assert all(claim.verdict in (HELD, NOT, OPEN) and "nan" not in claim.bound for claim in claims)
    assert all(claim.paper and claim.where.startswith("section") and claim.measured for claim in claims)
    return [claim.verdict for claim in claims]
