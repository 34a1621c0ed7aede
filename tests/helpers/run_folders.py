"""Small run folders: identity, measurements and rows that tests write and read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pathnet.results import LARGEST, Measurements, Range, writing

__all__ = [
    "ATTEMPT",
    "IDENTITY",
    "READINGS",
    "Reading",
    "add",
    "add_readings",
    "changed",
    "measured",
    "write_unsigned",
]

IDENTITY: dict[str, Any] = {
    "experiment": "path-gradients",
    "seed": 0,
    "bn": "running",
    "model": {"hash": "abc", "config": None, "blocks": 11},
}
ATTEMPT = {"pathnet": "0.1.0"}


@dataclass(frozen=True)
class Reading:
    """A row with a field of every kind."""

    PART: ClassVar[str] = "readings"
    MEASURED: ClassVar[tuple[str, ...]] = ("count", "value")
    RANGES: ClassVar[Mapping[str, Range]] = {"count": Range(-LARGEST), "value": Range(-LARGEST, math.inf)}

    name: str
    place: int
    share: float
    blocks: tuple[int, ...]
    count: int
    value: float


READINGS = [
    Reading("a", 0, 0.1, (), 3, -1e-300),
    Reading("a", 0, 0.1, (2, 1), 2**53 + 1, 1 / 3),
    Reading("a", 10, 0.25, (53,), 0, float("inf")),
    Reading("b c \N{GREEK SMALL LETTER PI}", 2, 1.0, (0, 0), -5, 0.0),
]


def measured(batch: int, n: int = 11) -> Measurements:
    """One path of every length on one batch, its norms down to 1e-200."""
    rng = np.random.default_rng(batch)
    length = np.arange(1, n + 1, dtype=np.int16)
    path = (np.argsort(rng.random((n, n)), axis=1) < length[:, None]).astype(np.uint8)
    norm = rng.random(n) * 10.0 ** -np.linspace(0, 200, n)
    return Measurements(np.full(n, batch, np.int32), length, path, norm, ["cpu"] * n)


def add(folder: Path, *batches: int, identity: dict[str, Any] = IDENTITY, total: int = 10) -> None:
    with writing(folder, identity, {"batches": total}, ATTEMPT) as run:
        run.add([measured(batch) for batch in batches])


def add_readings(folder: Path, *readings: Reading, identity: dict[str, Any] = IDENTITY) -> None:
    with writing(folder, identity, {}, ATTEMPT) as run:
        run.add_rows(readings)


def write_unsigned(folder: Path, stem: str, table: pa.Table) -> Path:
    """Write a part without a digest."""
    file = folder / "measurements" / f"{stem}-000000.parquet"
    pq.write_table(table.replace_schema_metadata(None), file)
    return file


def changed(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    position = table.schema.get_field_index(column)
    return table.set_column(
        position, table.schema.field(position), pa.array(values, table.schema.field(position).type)
    )
