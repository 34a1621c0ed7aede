"""The kinds of rows that a run holds: path gradient norms, and dataclasses of numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["LARGEST", "SCHEMA", "Measurements", "Range", "Row", "RowType", "bits", "schema_of", "table_of"]

LARGEST = sys.float_info.max
"""Largest finite float64."""

SCHEMA = pa.schema(
    [
        ("batch", pa.int32()),
        ("length", pa.int16()),
        ("path", pa.binary()),
        ("norm", pa.float64()),
        ("engine", pa.string()),
    ]
)
"""Columns of a part of path gradient norms; a path is its binary code in little-endian bits."""
COLUMNS = {int: pa.int64(), float: pa.float64(), str: pa.string(), tuple[int, ...]: pa.list_(pa.int32())}
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

    A field's type is int, float, str or tuple[int, ...].

    Attributes:
        PART: prefix of the names of its files.
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


def table_of(measurements: Measurements) -> pa.Table:
    """Return path gradient norms as a table with the columns of `SCHEMA`."""
    packed = np.packbits(measurements.path, axis=1, bitorder="little")
    columns = (
        measurements.batch,
        measurements.length,
        [row.tobytes() for row in packed],
        measurements.norm,
        measurements.engine,
    )
    return pa.table(list(map(pa.array, columns, SCHEMA.types)), schema=SCHEMA)


def schema_of(kind: type[Row]) -> pa.Schema:
    """Return the columns of a part that holds rows of one kind."""
    hints = get_type_hints(kind)
    return pa.schema([(field.name, COLUMNS[hints[field.name]]) for field in fields(kind)])


def bits(path: pa.BinaryArray, size: int) -> NDArray[np.uint8]:
    """Unpack M paths of ``size`` bytes each into uint8 [M, 8 * size]."""
    packed = np.frombuffer(b"".join(path.to_pylist()), np.uint8).reshape(len(path), size)
    return np.unpackbits(packed, axis=1, bitorder="little")
