"""The run folder: what a run is, and every measurement it made. The only file that knows paths on disk.

``run.json`` holds the run's identity (all that is needed to measure the same again) and, beside it, the attempts
that added to it (versions, device, time) and the summary. ``measurements/*.parquet`` hold one row a measurement: path
gradient norms (``part-*``) as `Measurements`, anything else as rows of a dataclass. A part is written whole under
another name and renamed, so that a killed run leaves only whole parts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["Measurements", "Row", "Run", "read", "weights_of", "writing"]

SCHEMA = pa.schema(
    [
        ("batch", pa.int32()),
        ("length", pa.int16()),
        ("path", pa.binary()),
        ("norm", pa.float64()),
        ("engine", pa.string()),
    ]
)
TEMPORARY = ".tmp"
COLUMNS = {int: pa.int64(), float: pa.float64(), str: pa.string(), tuple[int, ...]: pa.list_(pa.int32())}


class Row(Protocol):
    """A frozen dataclass of numbers, strings and tuples of integers: one measurement.

    Attributes:
        PART: what the names of its files begin with.
        MEASURED: the fields that were measured; the others say what was, and are different in every row of a run.
    """

    PART: ClassVar[str]
    MEASURED: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


RowType = TypeVar("RowType", bound=Row)


@dataclass(frozen=True)
class Measurements:
    """Path gradient norms, sorted by (batch, length); M of them, in a network of n blocks.

    Attributes:
        batch: int32 [M], the number of the batch.
        length: int16 [M], modules on the path, 1 to n.
        path: uint8 [M, n], the path's binary code.
        norm: float64 [M]
        engine: [M], the engine that measured.
    """

    batch: NDArray[np.int32]
    length: NDArray[np.int16]
    path: NDArray[np.uint8]
    norm: NDArray[np.float64]
    engine: list[str]

    def __len__(self) -> int:
        return len(self.norm)


@dataclass(frozen=True)
class Run:
    """A run folder and what its ``run.json`` says."""

    folder: Path
    facts: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for measurements to belong together."""
        return dict(self.facts["identity"])

    @property
    def experiment(self) -> str:
        """What was measured: the name of a driver."""
        return str(self.identity["experiment"])

    @property
    def n(self) -> int:
        """The number of blocks of the network measured, in a run of a single one."""
        return int(self.identity["model"]["blocks"])

    @property
    def parts(self) -> list[Path]:
        """The files of path gradient norms."""
        return self._parts("part")

    def _parts(self, stem: str) -> list[Path]:
        return sorted((self.folder / "measurements").glob(f"{stem}-*.parquet"))

    def figure_stem(self, name: str) -> Path:
        """Where a figure goes, without the suffix; its folder is made."""
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        return folder / name

    def measurements(self) -> Measurements:
        """Everything measured so far.

        Raises:
            ValueError: a part cannot be read, or two parts contradict each other.
        """
        table = self._table("part", SCHEMA)
        # An interrupt between a part and the note that it is written makes a second part of the same rows.
        table = table.group_by(SCHEMA.names).aggregate([]).sort_by([("batch", "ascending"), ("length", "ascending")])
        batch, length, norm = (table[name].to_numpy() for name in ("batch", "length", "norm"))
        again = np.flatnonzero((np.diff(batch) == 0) & (np.diff(length) == 0))
        if len(again):
            raise ValueError(
                f"run: the parts in {self.folder / 'measurements'} hold batch {batch[again[0]]}, "
                f"length {length[again[0]]} twice and differently; expected every measurement once"
            )
        packed = np.frombuffer(b"".join(table["path"].to_pylist()), np.uint8).reshape(len(table), -(-self.n // 8))
        path = np.unpackbits(packed, axis=1, count=self.n, bitorder="little")
        return Measurements(batch, length, path, norm, table["engine"].to_pylist())

    def add(self, measurements: Sequence[Measurements]) -> None:
        """Writes them as one more part, durably; none write nothing."""
        if measurements:
            self._write_part("part", pa.concat_tables(map(_table, measurements)))

    def rows(self, kind: type[RowType]) -> list[RowType]:
        """Everything measured so far, each once, in the order of what was measured.

        Raises:
            ValueError: a part cannot be read, or two parts contradict each other.
        """
        names = [field.name for field in fields(kind) if field.name not in kind.MEASURED]
        found: dict[tuple[Any, ...], RowType] = {}
        for entry in self._table(kind.PART, _schema(kind)).to_pylist():
            row = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})
            key = tuple(getattr(row, name) for name in names)
            # By what they say, since NaN is not equal to itself.
            if str(found.setdefault(key, row)) != str(row):
                raise ValueError(
                    f"run: the parts in {self.folder / 'measurements'} hold {dict(zip(names, key, strict=True))} "
                    "twice and differently; expected every measurement once"
                )
        return [found[key] for key in sorted(found)]

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Writes them as one more part, durably; none write nothing. All are of one kind."""
        if rows:
            kind = type(rows[0])
            self._write_part(kind.PART, pa.Table.from_pylist(list(map(asdict, rows)), schema=_schema(kind)))

    def _table(self, stem: str, schema: pa.Schema) -> pa.Table:
        return pa.concat_tables([schema.empty_table(), *(_read_part(part, schema) for part in self._parts(stem))])

    def _write_part(self, stem: str, table: pa.Table) -> None:
        numbers = count(len(self._parts(stem)))
        names = (self.folder / "measurements" / f"{stem}-{number:06d}.parquet" for number in numbers)
        with _replacing(next(name for name in names if not name.exists())) as file:
            pq.write_table(table, file, compression="zstd")

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Puts what the measurements came to into ``run.json``."""
        self.facts["results"] = dict(summary)
        _write_facts(self.folder, self.facts)


def weights_of(folder: str | Path) -> Path:
    """Where the weights of a run lie that trained its own network."""
    return Path(folder) / "weights.safetensors"


def read(folder: str | Path) -> Run:
    """An existing run.

    Raises:
        ValueError: the folder holds no run, or its ``run.json`` cannot be read.
    """
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise ValueError(f"run: expected the folder of a run, got {folder}, which has no run.json")
    try:
        run = Run(Path(folder), json.loads(file.read_text()))
        _ = run.experiment, run.facts["attempts"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"run: {file} is not the run.json of a run ({type(error).__name__}: {error})") from None
    return run


@contextmanager
def writing(
    folder: str | Path, identity: Mapping[str, Any], asked: Mapping[str, int], attempt: Mapping[str, Any]
) -> Iterator[Run]:
    """Opens a run to add measurements to it, and makes it where there is none. One process at a time may do so.

    Args:
        identity: must equal that of an existing run.
        asked: how many of something are asked for, by its name; a later call may ask for more.
        attempt: versions, device and time of this process.

    Raises:
        ValueError: the folder holds a run of another identity, or another process is writing to it.
    """
    folder, identity = Path(folder), json.loads(json.dumps(identity))
    (folder / "measurements").mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run: another process is writing to {folder}") from None
        if (folder / "run.json").exists():
            run = read(folder)
            _check_same(folder, identity, run.identity)
        else:
            run = Run(folder, {"identity": identity, "attempts": []})
        for leftover in (*folder.glob(f"*{TEMPORARY}"), *(folder / "measurements").glob(f"*{TEMPORARY}")):
            leftover.unlink()
        for name, number in asked.items():
            run.facts[name] = max(number, run.facts.get(name, 0))
        run.facts["attempts"].append(dict(attempt))
        _write_facts(folder, run.facts)
        yield run


def _table(measurements: Measurements) -> pa.Table:
    packed = np.packbits(measurements.path, axis=1, bitorder="little")
    columns = (
        measurements.batch,
        measurements.length,
        [row.tobytes() for row in packed],
        measurements.norm,
        measurements.engine,
    )
    return pa.table(list(map(pa.array, columns, SCHEMA.types)), schema=SCHEMA)


def _schema(kind: type[Row]) -> pa.Schema:
    hints = get_type_hints(kind)
    return pa.schema([(field.name, COLUMNS[hints[field.name]]) for field in fields(kind)])


def _read_part(file: Path, schema: pa.Schema) -> pa.Table:
    try:
        # ParquetFile, since read_table would take columns from folder names such as seed=1; opened here, since it
        # takes no name that is not UTF-8.
        with file.open("rb") as handle:
            table = pq.ParquetFile(handle).read()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"run: {file} is not a readable part ({reason}); move it away to measure its batches again"
        ) from None
    if not table.schema.equals(schema):
        raise ValueError(f"run: {file} has other columns: expected {schema.names}, got {table.schema.names}")
    return table


def _check_same(folder: Path, expected: Any, found: Any, field: str = "") -> None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in (*expected, *(key for key in found if key not in expected)):
            _check_same(folder, expected.get(key), found.get(key), f"{field}.{key}" if field else key)
    elif expected != found:
        raise ValueError(f"run: {folder} holds another run ({field}: expected {expected!r}, found {found!r})")


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    with _replacing(folder / "run.json") as file:
        file.write((json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def _replacing(file: Path) -> Iterator[Any]:
    """A binary file that takes its name only when it is whole and on the disk."""
    temporary = file.with_name(file.name + TEMPORARY)
    with temporary.open("wb") as handle:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
