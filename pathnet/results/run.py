"""A run's folder, to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from numpy.typing import NDArray

from pathnet.checks import check_path, described
from pathnet.files import telling
from pathnet.results.facts import plain_object, read_facts, write_facts
from pathnet.results.kinds import kind_of, norms_kind
from pathnet.results.norms import STEM, measurements_of, table_of
from pathnet.results.parts import Kind
from pathnet.results.rows import Measurements, Row, RowType
from pathnet.results.tables import counted, parts_of, read_table
from pathnet.workers import ALONE, Workers

if TYPE_CHECKING:
    from pathnet.results.opening import Writer

__all__ = ["Run", "check_run", "read", "weights_of"]


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder and the content of its ``run.json``.

    `read` returns a run to read, `writing` one to add measurements to.

    Attributes:
        folder: the folder.
        facts: the content of ``run.json``: identity, attempts, planned amounts and results.
        workers: the processes that add to the run together.

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
    # As a value of the class, viewcode would take its module for that of the class.
    workers: Workers = field(default_factory=lambda: ALONE)
    _writer: Writer | None = None

    def __repr__(self) -> str:
        counts, waiting = counted(self.folder)
        rows = f"{sum(number or 0 for number in counts) + waiting:,} rows measured"
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
        return parts_of(self.folder, STEM)

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
        kind = norms_kind(self.n)
        return measurements_of(read_table(self.folder, kind, kind.schema.names), self.n)

    def columns(self, *names: str, kind: type[Row] | None = None) -> dict[str, NDArray[Any]]:
        """Return some columns of all rows of one kind, sorted by what identifies a row, without reading the others.

        Args:
            names: the columns.
            kind: the dataclass of the rows, see `Row`; by default path gradient norms, see `Measurements`.

        Returns:
            An array [M] of the M rows for each name; of texts and lists, an array of objects.

        Raises:
            ValueError: there is no such column, or a part cannot be read or holds impossible values in these columns.

        Example:
            >>> import pathnet
            >>> from pathnet.experiments import PathGradients
            >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
            >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=2, in_channels=1)
            >>> plan = PathGradients(batches=2, batch_size=16)
            >>> run = pathnet.measure(net, data, plan, "my-run")
            >>> run.columns("length")["length"]
            array([1, 2, 3, 1, 2, 3], dtype=int16)
        """
        stored = norms_kind(self.n) if kind is None else kind_of(kind)
        for name in names:
            if name not in stored.schema.names:
                raise ValueError(
                    f"names: expected columns among {', '.join(stored.schema.names)}, got {described(name)}"
                )
        table = read_table(self.folder, stored, list(dict.fromkeys([*stored.keys, *names])))
        return {name: table[name].to_numpy(zero_copy_only=False) for name in names}

    def rows(self, kind: type[RowType]) -> list[RowType]:
        """Return all rows of one kind measured so far, each once, sorted by the fields that identify them.

        Args:
            kind: the dataclass of the rows, see `Row`.

        Raises:
            ValueError: a part cannot be read, holds values outside the ranges of the kind, or contradicts another
                part.
        """
        stored = kind_of(kind)
        rows = [
            kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})
            for entry in read_table(self.folder, stored, stored.schema.names).to_pylist()
        ]
        return sorted(rows, key=lambda row: [getattr(row, name) for name in stored.keys])

    def add(self, measurements: Sequence[Measurements]) -> None:
        """Add path gradient norms; from now on they are kept, even if this process is killed.

        Only within `writing`, which keeps other commands from the folder.

        Args:
            measurements: the norms.

        Raises:
            ValueError: a value is impossible, or the run is not open for adding.
            OSError: the disk does not take them.
        """
        if measurements:
            self._add(norms_kind(self.n), pa.concat_tables(map(table_of, measurements)))

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Add rows of one kind; from now on they are kept, even if this process is killed.

        Only within `writing`, which keeps other commands from the folder.

        Args:
            rows: rows of one dataclass, see `Row`.

        Raises:
            ValueError: a value is outside the ranges of the kind, or the run is not open for adding.
            OSError: the disk does not take them.
        """
        if rows:
            kind = kind_of(type(rows[0]))
            self._add(kind, pa.Table.from_pylist(list(map(asdict, rows)), schema=kind.schema))

    def _add(self, kind: Kind, table: pa.Table) -> None:
        if problem := kind.problem(table):
            raise ValueError(f"run: {self.folder}: {problem}, which is not written")
        self._open_writer("add").add(kind.stem, table)

    def settle(self) -> None:
        """Turn all that was added into one sorted file of each kind, the same for any number of processes.

        Every process of the run calls it, before the first of them reads and concludes.

        Raises:
            ValueError: a part cannot be read, or the run is not open for adding.
            OSError: a file cannot be written; all measurements are kept.
        """
        self._open_writer("settle").settle(self)

    def _open_writer(self, what: str) -> Writer:
        if self._writer is None:
            raise ValueError(f"run: expected a run within pathnet.results.writing to {what}, got one that was read")
        return self._writer

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write the results of the measurements into ``run.json``, in the first process of the run.

        Args:
            summary: the results, as JSON can hold them; they replace earlier ones.

        Raises:
            ValueError: JSON cannot hold a result.
            OSError: the file cannot be written.
        """
        # A result that JSON cannot hold must not keep the end of the attempt from being written.
        self.facts["results"] = plain_object("results", summary)
        if self.workers.leads:
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
