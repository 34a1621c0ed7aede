"""A run's folder: read, or opened by one process at a time to add measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pathnet.checks import check_integer, check_path, described
from pathnet.files import locked, remove_leftovers, telling
from pathnet.results.facts import check_facts, plain_object, read_facts, write_facts
from pathnet.results.parts import Check, read_part, row_count, write_part
from pathnet.results.problems import impossible_measurement, out_of_range
from pathnet.results.rows import SCHEMA, Measurements, Row, RowType, bits, schema_of, table_of

__all__ = ["Run", "check_run", "read", "weights_of", "writing"]


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder and the content of its ``run.json``.

    `read` returns a run to read, `writing` one to add measurements to.

    Attributes:
        folder: the folder.
        facts: the content of ``run.json``: identity, attempts, planned amounts and results.

    Example:
        >>> import pathnet
        >>> from pathnet.experiments import PathGradients, path_gradients
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, num_classes=2, in_channels=1)
        >>> run = path_gradients.measure(net, data, PathGradients(batches=3, batch_size=16), "run")
        >>> run
        <Run of path-gradients in run: 18 rows measured, planned batches 3; results written>
        >>> measured = run.measurements()
        >>> measured.path.shape, measured.norm.shape
        ((18, 6), (18,))
    """

    folder: Path
    facts: dict[str, Any]

    def __repr__(self) -> str:
        counts = [row_count(part) for part in self._parts("*")]
        rows = f"{sum(number or 0 for number in counts):,} rows measured"
        if unreadable := counts.count(None):
            rows += f" ({unreadable} of {len(counts)} parts cannot be read)"
        planned = ", ".join(f"{name} {number:,}" for name, number in self.planned.items())
        state = "results written" if "results" in self.facts else "no results yet"
        return f"<Run of {self.experiment} in {self.folder}: {rows}{planned and f', planned {planned}'}; {state}>"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for measurements to belong to the same run."""
        return dict(self.facts["identity"])

    def fact(self, *keys: str | int) -> Any:
        """Return one part of the identity, by the keys and positions that lead to it.

        Args:
            keys: names in objects and positions in lists, from the outside in, such as "model", "blocks".

        Raises:
            ValueError: the identity has no such part.
        """
        fact: Any = self.facts["identity"]
        for key in keys:
            try:
                fact = fact[key]
            except (LookupError, TypeError):
                raise ValueError(
                    f"run: {self.folder / 'run.json'}: expected identity.{'.'.join(map(str, keys))} in a run of "
                    f"{self.experiment}, got none"
                ) from None
        return fact

    @property
    def experiment(self) -> str:
        """Name of the driver that measured the run."""
        return str(self.identity["experiment"])

    @property
    def planned(self) -> dict[str, int]:
        """Planned amounts by name, such as ``batches``; they may grow later."""
        return {name: value for name, value in self.facts.items() if isinstance(value, int)}

    @property
    def n(self) -> int:
        """Number of blocks of the network, in a run of a single network."""
        return int(self.fact("model", "blocks"))

    @property
    def parts(self) -> list[Path]:
        """Files of path gradient norms."""
        return self._parts("part")

    def _parts(self, stem: str) -> list[Path]:
        return sorted((self.folder / "measurements").glob(f"{stem}-*.parquet"))

    def figure_stem(self, name: str) -> Path:
        """Return the path of a figure without its suffix, and create the folder of figures.

        Args:
            name: the figure, such as ``figure-6``.

        Raises:
            OSError: the folder cannot be created.
        """
        folder = self.folder / "figures"
        with telling(folder, "figure"):
            folder.mkdir(exist_ok=True)
        return folder / name

    def measurements(self) -> Measurements:
        """Return all path gradient norms measured so far.

        Raises:
            ValueError: a part cannot be read, holds impossible values, or contradicts another part.
        """
        n = self.n
        table = self._table("part", SCHEMA, lambda part: impossible_measurement(part, n))
        # An interrupt between writing a part and noting that it is written makes a second part of the same rows.
        table = table.group_by(SCHEMA.names).aggregate([]).sort_by([("batch", "ascending"), ("length", "ascending")])
        batch, length, norm = (table[name].to_numpy() for name in ("batch", "length", "norm"))
        repeated = np.flatnonzero((np.diff(batch) == 0) & (np.diff(length) == 0))
        if len(repeated):
            raise ValueError(
                f"run: the parts in {self.folder / 'measurements'} hold batch {batch[repeated[0]]}, "
                f"length {length[repeated[0]]} twice and differently; expected every measurement once"
            )
        path = bits(table["path"].combine_chunks(), -(-n // 8))[:, :n]
        return Measurements(batch, length, path, norm, table["engine"].to_pylist())

    def add(self, measurements: Sequence[Measurements]) -> None:
        """Write path gradient norms as one more part, durably; write nothing if there are none.

        Only within `writing`, which keeps other processes from the folder.

        Args:
            measurements: the norms; the part holds all of them.

        Raises:
            ValueError: a value is impossible.
            OSError: the part cannot be written.
        """
        if measurements:
            table = pa.concat_tables(map(table_of, measurements))
            self._write_part("part", table, impossible_measurement(table, self.n))

    def rows(self, kind: type[RowType]) -> list[RowType]:
        """Return all rows of one kind measured so far, each once, sorted by the fields that identify them.

        Args:
            kind: the dataclass of the rows, see `Row`.

        Raises:
            ValueError: a part cannot be read, holds values outside the ranges of the kind, or contradicts another
                part.
        """
        names = [field.name for field in fields(kind) if field.name not in kind.MEASURED]
        rows: dict[tuple[Any, ...], RowType] = {}
        table = self._table(kind.PART, schema_of(kind), lambda part: out_of_range(part, kind.RANGES))
        for entry in table.to_pylist():
            row = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})
            key = tuple(getattr(row, name) for name in names)
            # Compared as text, since NaN is not equal to itself.
            if str(rows.setdefault(key, row)) != str(row):
                raise ValueError(
                    f"run: the parts in {self.folder / 'measurements'} hold {dict(zip(names, key, strict=True))} "
                    "twice and differently; expected every measurement once"
                )
        return [rows[key] for key in sorted(rows)]

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Write rows of one kind as one more part, durably; write nothing if there are none.

        Only within `writing`, which keeps other processes from the folder.

        Args:
            rows: rows of one dataclass, see `Row`.

        Raises:
            ValueError: a value is outside the ranges of the kind.
            OSError: the part cannot be written.
        """
        if rows:
            kind = type(rows[0])
            table = pa.Table.from_pylist(list(map(asdict, rows)), schema=schema_of(kind))
            self._write_part(kind.PART, table, out_of_range(table, kind.RANGES))

    def _table(self, stem: str, schema: pa.Schema, check: Check) -> pa.Table:
        return pa.concat_tables(
            [schema.empty_table(), *(read_part(part, schema, check) for part in self._parts(stem))]
        )

    def _write_part(self, stem: str, table: pa.Table, problem: str) -> None:
        if problem:
            raise ValueError(f"run: {self.folder}: {problem}, which is not written")
        numbers = count(len(self._parts(stem)))
        names = (self.folder / "measurements" / f"{stem}-{number:06d}.parquet" for number in numbers)
        write_part(next(name for name in names if not name.exists()), table)

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write the results of the measurements into ``run.json``.

        Args:
            summary: the results, as JSON can hold them; they replace earlier ones.

        Raises:
            ValueError: JSON cannot hold a result.
            OSError: the file cannot be written.
        """
        self.facts["results"] = dict(summary)
        write_facts(self.folder / "run.json", self.facts)


def weights_of(folder: str | Path) -> Path:
    """Return the path of the weights in a run that trained its own network.

    Args:
        folder: folder of the run.

    Example:
        >>> from pathnet import results
        >>> str(results.weights_of("run"))
        'run/weights.safetensors'
    """
    return Path(folder) / "weights.safetensors"


def read(folder: str | Path) -> Run:
    """Return an existing run.

    Args:
        folder: folder of the run.

    Raises:
        ValueError: the folder holds no run, or its ``run.json`` cannot be read, was edited or is damaged.

    Example:
        >>> from pathnet import results
        >>> with results.writing("run", {"experiment": "my measurement"}, {"batches": 3}, {}):
        ...     pass  # measure
        >>> results.read("run")
        <Run of my measurement in run: 0 rows measured, planned batches 3; no results yet>
    """
    folder = check_path("folder", folder)
    file = folder / "run.json"
    if not file.is_file():
        raise ValueError(f"run: expected the folder of a run, got {folder}, which has no run.json")
    return Run(folder, read_facts(file))


def check_run(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a `Run`.

    Args:
        name: the argument's name in the error.
        value: the value to check.

    Raises:
        ValueError: it is something else.

    Example:
        >>> from pathnet import results
        >>> results.check_run("run", "runs/digits")
        Traceback (most recent call last):
        ValueError: run: expected a run, as pathnet.results.read returns it, got 'runs/digits'
    """
    if not isinstance(value, Run):
        raise ValueError(f"{name}: expected a run, as pathnet.results.read returns it, got {described(value)}")


@contextmanager
def writing(
    folder: str | Path, identity: Mapping[str, Any], planned: Mapping[str, int], attempt: Mapping[str, Any]
) -> Iterator[Run]:
    """Open a run to add measurements, and create it if there is none. One process at a time may do so.

    Args:
        folder: folder of the run.
        identity: everything that decides what is measured, as JSON can hold it, with the name of the ``experiment``;
            it must equal that of an existing run.
        planned: planned amounts by name, such as ``batches``; the run keeps the largest of all calls.
        attempt: versions, device and time of this process.

    Yields:
        The run.

    Raises:
        ValueError: the folder holds a run with another identity, another process is writing to it, or an argument
            has the wrong type.
        OSError: the folder cannot be written to.

    Example:
        >>> from pathnet import results
        >>> with results.writing("run", {"experiment": "my measurement", "seed": 0}, {}, {"by": "me"}) as run:
        ...     run.conclude({"mean": 0.25})
        >>> results.read("run").facts["results"]
        {'mean': 0.25}
        >>> with results.writing("run", {"experiment": "my measurement", "seed": 1}, {}, {}):
        ...     pass
        Traceback (most recent call last):
        ValueError: run: run holds another run (seed: expected 1, found 0); give another folder
    """
    folder = check_path("folder", folder)
    identity, attempt = plain_object("identity", identity), plain_object("attempt", attempt)
    amounts = plain_object("planned", planned).items()
    planned = {name: check_integer(f"planned.{name}", amount, 0) for name, amount in amounts}
    check_facts({"identity": identity, "attempts": [attempt], **planned})
    measurements = folder / "measurements"
    with telling(measurements, "run"):
        measurements.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", "run", f"writing to {folder}"):
        if (folder / "run.json").exists():
            run = read(folder)
            _check_same(folder, identity, run.identity)
        else:
            run = Run(folder, {"identity": identity, "attempts": []})
        with telling(folder, "run"):
            remove_leftovers(folder, r"run\.json")
            remove_leftovers(measurements, r"[a-z]+-\d{6,}\.parquet")
        for name, amount in planned.items():
            run.facts[name] = max(amount, run.facts.get(name, 0))
        run.facts["attempts"].append(attempt)
        write_facts(folder / "run.json", run.facts)
        yield run


def _check_same(folder: Path, expected: Any, recorded: Any, field: str = "") -> None:
    if isinstance(expected, dict) and isinstance(recorded, dict):
        for key in (*expected, *(key for key in recorded if key not in expected)):
            _check_same(folder, expected.get(key), recorded.get(key), f"{field}.{key}" if field else key)
    elif expected != recorded:
        difference = f"{field}: expected {expected!r}, found {recorded!r}"
        raise ValueError(f"run: {folder} holds another run ({difference}); give another folder")
