"""The parts of each kind of row."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

from pathnet.results.norms import FORMAT_1, SCHEMA, STEM, upgraded
from pathnet.results.parts import Kind
from pathnet.results.problems import impossible_measurement, out_of_range
from pathnet.results.rows import identifying, optional_in, schema_of

__all__ = ["kind_of", "norms_kind"]

NAME = re.compile(r"(?!.*-\d+$)\w[\w-]*", re.ASCII)
"""Names of kinds of row. A number at the end is that of a process or a part."""


@cache
def norms_kind(n: int) -> Kind:
    """Return the parts of path gradient norms in a network of n blocks."""
    problem = partial(impossible_measurement, n=n)
    return Kind(STEM, SCHEMA, ("batch", "length"), problem, FORMAT_1, partial(upgraded, n=n))


@cache
def kind_of(kind: Any) -> Kind:
    """Return the parts of the rows of a dataclass, see `pathnet.results.Row`.

    Raises:
        ValueError: files of this kind could not be told from those of others.
    """
    if not NAME.fullmatch(kind.PART) or kind.PART == STEM:
        raise ValueError(
            f"{kind.__name__}.PART: expected letters, digits, hyphens and underscores, no number at the end after a "
            f"hyphen, and not {STEM!r}, got {kind.PART!r}"
        )
    schema, problem = schema_of(kind), partial(out_of_range, ranges=kind.RANGES)
    return Kind(kind.PART, schema, identifying(kind), problem, optional=optional_in(schema))
