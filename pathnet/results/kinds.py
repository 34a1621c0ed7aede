"""The parts of each kind of row."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from pathnet.results.norms import FORMAT_1, SCHEMA, STEM, upgraded
from pathnet.results.parts import Kind
from pathnet.results.problems import impossible_measurement, out_of_range
from pathnet.results.rows import identifying, schema_of

__all__ = ["kind_of", "norms_kind"]


@cache
def norms_kind(n: int) -> Kind:
    """Return the parts of path gradient norms in a network of n blocks."""
    problem = partial(impossible_measurement, n=n)
    return Kind(STEM, SCHEMA, ("batch", "length"), problem, FORMAT_1, partial(upgraded, n=n))


@cache
def kind_of(kind: Any) -> Kind:
    """Return the parts of the rows of a dataclass, see `pathnet.results.Row`."""
    return Kind(kind.PART, schema_of(kind), identifying(kind), partial(out_of_range, ranges=kind.RANGES))
