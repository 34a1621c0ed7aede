"""The kinds of rows that a run holds: path gradient norms, and dataclasses of numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathnet.settings import settings_of

__all__ = [
    "LARGEST",
    "Measurements",
    "Range",
    "Row",
    "RowType",
    "described_field",
    "identifying",
    "optional_in",
    "schema_of",
]

LARGEST = sys.float_info.max
"""Largest finite float64."""

OPTIONAL = "optional"
"""Key in the metadata of a column that older files lack."""

COLUMNS = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    tuple[int, ...]: pa.list_(pa.field("element", pa.int32())),
}
"""Column types of the types that the field of a `Row` may have."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field of a row may hold; by default, finite numbers of at least 0.

    Attributes:
        least: lower bound, included.
        most: upper bound, included; it may be the name of another field.
        nan: whether NaN is allowed, which stands for a quantity that is undefined.

    Example:
        >>> from pathnet.results import Range
        >>> print(Range(0, 1))
        a finite number of at least 0, at most 1
        >>> print(Range(-1, 1, nan=True))
        a finite number of at least -1, at most 1 or NaN
    """

    least: float = 0.0
    most: float | str = LARGEST
    nan: bool = False

    def __str__(self) -> str:
        lower = "" if self.least in (-LARGEST, -np.inf) else f" of at least {self.least:g}"
        upper = "" if self.most in (LARGEST, np.inf) else f", at most {self.most}"
        return f"{'a' if self.most == np.inf else 'a finite'} number{lower}{upper}{' or NaN' if self.nan else ''}"


class Row(Protocol):
    """A frozen dataclass of numbers, strings and tuples of integers: one measurement.

    A field has the type int, float, str or tuple[int, ...], perhaps annotated with ``Help`` and ``Unit`` of
    `pathnet.settings`, which become metadata of the columns. Files that were written before a text field with the
    default ``""`` was added have no column for it, and are read with that default.

    Attributes:
        PART: prefix of the names of its files: letters, digits, hyphens and underscores, without a number at the end
            after a hyphen.
        MEASURED: the measured fields. The others identify the measurement, and no two rows of a run share them.
        RANGES: the allowed numbers, by field; the default `Range` for fields that are not named.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import ClassVar
        >>> from pathnet import results
        >>> @dataclass(frozen=True)
        ... class Timing:
        ...     PART: ClassVar[str] = "timings"
        ...     MEASURED: ClassVar[tuple[str, ...]] = ("seconds",)
        ...     RANGES: ClassVar[dict[str, results.Range]] = {}
        ...     batch: int
        ...     seconds: float
        >>> with results.writing("run", {"experiment": "timings"}, {"batches": 2}, {}) as run:
        ...     run.add_rows([Timing(0, 0.81), Timing(1, 0.79)])
        >>> results.read("run").rows(Timing)
        [Timing(batch=0, seconds=0.81), Timing(batch=1, seconds=0.79)]
    """

    PART: ClassVar[str]
    MEASURED: ClassVar[tuple[str, ...]]
    RANGES: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


RowType = TypeVar("RowType", bound=Row)


@dataclass(frozen=True)
class Measurements:
    """M path gradient norms in a network of n blocks, sorted by (batch, length).

    Attributes:
        batch: int32 [M], the number of the batch.
        length: int16 [M], the number of residual modules on the path, 1 to n.
        path: uint8 [M, n], the binary code of the path.
        norm: float64 [M], the norm of the path gradient.
        engine: [M], the name of the engine.

    Example:
        >>> import numpy
        >>> from pathnet.results import Measurements
        >>> measured = Measurements(
        ...     batch=numpy.array([0, 0], numpy.int32),
        ...     length=numpy.array([1, 2], numpy.int16),
        ...     path=numpy.array([[0, 1, 0], [1, 0, 1]], numpy.uint8),
        ...     norm=numpy.array([0.013, 0.008]),
        ...     engine=["cpu", "cpu"],
        ... )
        >>> len(measured), measured.path.sum(1) == measured.length
        (2, array([ True,  True]))
    """

    batch: NDArray[np.int32]
    length: NDArray[np.int16]
    path: NDArray[np.uint8]
    norm: NDArray[np.float64]
    engine: list[str]

    def __len__(self) -> int:
        return len(self.norm)


@cache
def schema_of(kind: Any) -> pa.Schema:
    """Return the columns of a part that holds rows of one kind; each has its meaning as metadata."""
    hints = get_type_hints(kind)
    settings = {setting.name: setting for setting in settings_of(kind)}
    return pa.schema(
        [
            described_field(name, COLUMNS[hints[name]], setting.help, setting.unit, setting.default == "")
            for name, setting in settings.items()
        ]
    )


def described_field(name: str, kind: pa.DataType, meaning: str, unit: str = "", optional: bool = False) -> pa.Field:
    """Return a column with its meaning, its unit if it has one, and whether older files lack it, as metadata."""
    metadata = {"description": meaning, "unit": unit, OPTIONAL: "empty in files without it" if optional else ""}
    return pa.field(name, kind, metadata={key: text for key, text in metadata.items() if text} or None)


def optional_in(schema: pa.Schema) -> frozenset[str]:
    """Return the names of the text columns that older files lack."""
    return frozenset(field.name for field in schema if OPTIONAL.encode() in (field.metadata or {}))


def identifying(kind: type[Row]) -> list[str]:
    """Return the names of the fields that identify a row."""
    return [field.name for field in fields(kind) if field.name not in kind.MEASURED]
