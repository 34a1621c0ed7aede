"""Claims that tests expect to hold or not."""

from __future__ import annotations

from collections.abc import Sequence

from pathnet.experiments.run import Claim

__all__ = ["held"]


def held(claims: Sequence[Claim]) -> list[bool]:
    """Return which claims hold, after checking that each is complete."""
    assert all(type(claim.held) is bool and "nan" not in claim.bound for claim in claims)
    assert all(claim.paper and claim.where.startswith("section") and claim.measured for claim in claims)
    return [claim.held for claim in claims]
