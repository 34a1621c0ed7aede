"""The run folder: what a run is, and every measurement it made. The only file that knows paths on disk.

``run.json`` holds the run's identity (all that is needed to measure the same again) and, beside it, the attempts
that added to it (versions, device, time) and the summary. ``measurements/*.parquet`` hold one row a measurement: path
gradient norms (``part-*``) as `Measurements`, anything else as rows of a dataclass. A part is written whole under
another name and renamed, so that a killed run leaves only whole parts.

``run.json`` and every part hold a SHA-256 of their content, which is compared when they are read: a bit that flipped
on the disk is an error, not another result. Files from before there was one are read without it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pathnet.checks import check_integer, check_number, check_path, described
from pathnet.files import locked, remove_leftovers, replacing, telling

__all__ = ["LARGEST", "Measurements", "Range", "Row", "Run", "check_run", "read", "weights_of", "writing"]

SCHEMA = pa.schema(
    [
        ("batch", pa.int32()),
        ("length", pa.int16()),
        ("path", pa.binary()),
        ("norm", pa.float64()),
        ("engine", pa.string()),
    ]
)
DIGEST = "sha256"
LARGEST = sys.float_info.max
COLUMNS = {int: pa.int64(), float: pa.float64(), str: pa.string(), tuple[int, ...]: pa.list_(pa.int32())}


@dataclass(frozen=True)
class Range:
    """The numbers that a field of a row may hold; by default finite ones of at least 0.

    Attributes:
        least, most: bounds, both included; ``most`` may be the name of another field.
        nan: whether NaN is among them: nothing to be measured.
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

    Attributes:
        PART: what the names of its files begin with.
        MEASURED: the fields that were measured; the others say what was, and are different in every row of a run.
        RANGES: by field, which numbers it may hold; `Range` itself where a field is not named.
    """

    PART: ClassVar[str]
    MEASURED: ClassVar[tuple[str, ...]]
    RANGES: ClassVar[Mapping[str, Range]]
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

    def fact(self, *keys: str | int) -> Any:
        """Return one part of the identity, by the keys and positions that lead to it.

        Raises:
            ValueError: the identity has none.
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
        """What was measured: the name of a driver."""
        return str(self.identity["experiment"])

    @property
    def n(self) -> int:
        """The number of blocks of the network measured, in a run of a single one."""
        return int(self.fact("model", "blocks"))

    @property
    def parts(self) -> list[Path]:
        """The files of path gradient norms."""
        return self._parts("part")

    def _parts(self, stem: str) -> list[Path]:
        return sorted((self.folder / "measurements").glob(f"{stem}-*.parquet"))

    def figure_stem(self, name: str) -> Path:
        """Where a figure goes, without the suffix; its folder is made."""
        folder = self.folder / "figures"
        with telling(folder, "figure"):
            folder.mkdir(exist_ok=True)
        return folder / name

    def measurements(self) -> Measurements:
        """Everything measured so far.

        Raises:
            ValueError: a part cannot be read, holds what no measurement can come to, or contradicts another one.
        """
        n = self.n
        table = self._table("part", SCHEMA, lambda part: _odd_measurement(part, n))
        # An interrupt between a part and the note that it is written makes a second part of the same rows.
        table = table.group_by(SCHEMA.names).aggregate([]).sort_by([("batch", "ascending"), ("length", "ascending")])
        batch, length, norm = (table[name].to_numpy() for name in ("batch", "length", "norm"))
        again = np.flatnonzero((np.diff(batch) == 0) & (np.diff(length) == 0))
        if len(again):
            raise ValueError(
                f"run: the parts in {self.folder / 'measurements'} hold batch {batch[again[0]]}, "
                f"length {length[again[0]]} twice and differently; expected every measurement once"
            )
        path = _bits(table["path"].combine_chunks(), -(-n // 8))[:, :n]
        return Measurements(batch, length, path, norm, table["engine"].to_pylist())

    def add(self, measurements: Sequence[Measurements]) -> None:
        """Writes them as one more part, durably; none write nothing."""
        if measurements:
            table = pa.concat_tables(map(_table, measurements))
            self._write_part("part", table, _odd_measurement(table, self.n))

    def rows(self, kind: type[RowType]) -> list[RowType]:
        """Everything measured so far, each once, in the order of what was measured.

        Raises:
            ValueError: a part cannot be read, holds what the kind's ranges exclude, or contradicts another one.
        """
        names = [field.name for field in fields(kind) if field.name not in kind.MEASURED]
        found: dict[tuple[Any, ...], RowType] = {}
        table = self._table(kind.PART, _schema(kind), lambda part: _odd_number(part, kind.RANGES))
        for entry in table.to_pylist():
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
            table = pa.Table.from_pylist(list(map(asdict, rows)), schema=_schema(kind))
            self._write_part(kind.PART, table, _odd_number(table, kind.RANGES))

    def _table(self, stem: str, schema: pa.Schema, odd: Callable[[pa.Table], str]) -> pa.Table:
        return pa.concat_tables(
            [schema.empty_table(), *(_read_part(part, schema, odd) for part in self._parts(stem))]
        )

    def _write_part(self, stem: str, table: pa.Table, odd: str) -> None:
        if odd:
            raise ValueError(f"run: {self.folder}: {odd}, which is not written")
        numbers = count(len(self._parts(stem)))
        names = (self.folder / "measurements" / f"{stem}-{number:06d}.parquet" for number in numbers)
        lost = (
            f"its {len(table)} measurements are lost, the parts on the disk stay good, and the same command goes on "
            "from them"
        )
        with replacing(next(name for name in names if not name.exists()), "run", lost) as file:
            signed = table.replace_schema_metadata({DIGEST: _digest(table)})
            pq.write_table(signed, file, compression="zstd", write_page_checksum=True)

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
        ValueError: the folder holds no run, or its ``run.json`` cannot be read, was edited or is damaged.
    """
    folder = check_path("folder", folder)
    file = folder / "run.json"
    if not file.is_file():
        raise ValueError(f"run: expected the folder of a run, got {folder}, which has no run.json")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        digest = facts.pop(DIGEST, None) if isinstance(facts, dict) else None
        damaged = digest is not None and digest != _digest_of_facts(facts)
        if not damaged:
            _check_facts(facts)
    except RecursionError:
        raise ValueError(f"run: {file} is not the run.json of a run (it is nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"run: {file} is not the run.json of a run ({error})") from None
    if damaged:
        raise ValueError(
            f"run: {file} was edited or damaged after it was written (its {DIGEST} is of another content); restore "
            "it from a copy, or measure into another folder"
        )
    return Run(folder, facts)


def check_run(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a `Run`."""
    if not isinstance(value, Run):
        raise ValueError(f"{name}: expected a run, as pathnet.results.read returns it, got {described(value)}")


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
        ValueError: the folder holds a run of another identity, or another process is writing to it; or an argument
            is of another kind.
    """
    folder, identity, attempt = check_path("folder", folder), _plain("identity", identity), _plain("attempt", attempt)
    asked = {name: check_integer(f"asked.{name}", number, 0) for name, number in _plain("asked", asked).items()}
    _check_facts({"identity": identity, "attempts": [attempt], **asked})
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
        for name, number in asked.items():
            run.facts[name] = max(number, run.facts.get(name, 0))
        run.facts["attempts"].append(attempt)
        _write_facts(folder, run.facts)
        yield run


def _plain(name: str, value: object) -> dict[str, Any]:
    """Return an object as it is read again from a file: with strings for keys, and lists for tuples.

    Raises:
        ValueError: it is no object, or not one that JSON can hold.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected an object, got {described(value)}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected an object that JSON can hold, got one that it cannot ({error})") from None
    return plain


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


def _read_part(file: Path, schema: pa.Schema, odd: Callable[[pa.Table], str]) -> pa.Table:
    remedy = "move it away to measure its batches again"
    try:
        # ParquetFile, since read_table would take columns from folder names such as seed=1; opened here, since it
        # takes no name that is not UTF-8.
        with file.open("rb") as handle:
            table = pq.ParquetFile(handle, page_checksum_verification=True).read()
        table.validate(full=True)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"run: {file} is not a readable part ({reason}); {remedy}") from None
    if not table.schema.equals(schema):
        raise ValueError(f"run: {file} has other columns: expected {schema.names}, got {table.schema.names}")
    # Nulls first, which the digest is not defined of.
    if problem := _null(table):
        raise ValueError(f"run: {file}: {problem}; {remedy}")
    metadata = table.schema.metadata
    if metadata is not None and metadata != {DIGEST.encode(): _digest(table).encode()}:
        raise ValueError(f"run: {file} is damaged (its {DIGEST} is of another content); {remedy}")
    if problem := odd(table):
        raise ValueError(f"run: {file}: {problem}; {remedy}")
    return table.replace_schema_metadata(None)


def _digest(table: pa.Table) -> str:
    """SHA-256 over names, types and values of all columns, however they are encoded and compressed."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        listed = pa.types.is_list(column.type)
        # Of a list Parquet keeps the type of its items, and not their name.
        kind = f"list of {column.type.value_type}" if listed else str(column.type)
        digest.update(f"{name} {kind} {len(column)}\n".encode())
        if listed:
            digest.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            column = column.flatten()
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            digest.update(pc.binary_length(column).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(b"".join(column.cast(pa.binary()).to_pylist()))
        else:
            values = column.to_numpy(zero_copy_only=False)
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _null(table: pa.Table) -> str:
    """Return the first value that is missing, in words; nothing where there is none."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        if column.null_count:
            return f"row {column.is_null().to_pylist().index(True)}: {name}: expected a value, got null"
        if pa.types.is_list(column.type) and (items := column.flatten()).null_count:
            row = pc.list_parent_indices(column)[items.is_null().to_pylist().index(True)]
            return f"row {row}: {name}: expected integers, got null among them"
    return ""


def _odd_number(table: pa.Table, ranges: Mapping[str, Range]) -> str:
    """Return the first number that is not in its field's range, in words; nothing where there is none."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            continue
        rows = None
        if pa.types.is_list(column.type):
            column, rows = column.flatten(), pc.list_parent_indices(column)
        allowed, values = ranges.get(name, Range()), column.to_numpy(zero_copy_only=False)
        most = table[allowed.most].to_numpy() if isinstance(allowed.most, str) else allowed.most
        inside = (values >= allowed.least) & (values <= most) | (allowed.nan & np.isnan(values))
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            row = first if rows is None else rows[first].as_py()
            return f"row {row}: {name}: expected {allowed}, got {values[first]}"
    return ""


def _odd_measurement(table: pa.Table, n: int) -> str:
    """Return what is wrong with path gradient norms in a network of n blocks, in words; nothing where nothing is."""
    if problem := _odd_number(table, {"length": Range(1, n)}):
        return problem
    size, path = -(-n // 8), table["path"].combine_chunks()
    wrong = np.flatnonzero(pc.binary_length(path).to_numpy(zero_copy_only=False) != size)
    if len(wrong):
        return f"row {wrong[0]}: path: expected {size} bytes for {n} blocks, got {len(path[wrong[0]].as_py())}"
    bits = _bits(path, size)
    length = table["length"].to_numpy()
    wrong = np.flatnonzero((bits[:, :n].sum(1) != length) | bits[:, n:].any(1))
    if len(wrong):
        return f"row {wrong[0]}: path: expected {length[wrong[0]]} modules among {n} (its length), got others"
    return ""


def _bits(path: pa.BinaryArray, size: int) -> NDArray[np.uint8]:
    """Return the bits of paths of ``size`` bytes each, uint8 [M, 8 * size]."""
    packed = np.frombuffer(b"".join(path.to_pylist()), np.uint8).reshape(len(path), size)
    return np.unpackbits(packed, axis=1, bitorder="little")


JSON_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def _field(owner: Mapping[str, Any], where: str, name: str, kind: type) -> Any:
    """Return one field of a JSON object.

    Raises:
        ValueError: it has none of that kind.
    """
    if not isinstance(owner.get(name), kind):
        came = described(owner[name]) if name in owner else "none"
        raise ValueError(f"{where}{name}: expected {JSON_NAMES[kind]}, got {came}")
    return owner[name]


def _check_facts(facts: Any) -> None:
    """Find what a ``run.json`` has of another kind than is read from it later.

    Raises:
        ValueError: there is something.
    """
    _field({"content": facts}, "", "content", dict)
    identity = _field(facts, "", "identity", dict)
    _field(identity, "identity.", "experiment", str)
    attempts = _field(facts, "", "attempts", list)
    if not attempts:
        raise ValueError("attempts: expected at least one, got none")
    for number, attempt in enumerate(attempts):
        _field({f"attempts.{number}": attempt}, "", f"attempts.{number}", dict)
    for name in facts.keys() - {"identity", "attempts", "results"}:
        check_integer(name, facts[name], 0)
    if "results" in facts:
        _field(facts, "", "results", dict)
    for name in {"blocks", "modules"} & identity.keys():
        check_integer(f"identity.{name}", identity[name], 1)
    if "data" in identity:
        data = _field(identity, "identity.", "data", dict)
        _field(data, "identity.data.", "name", str)
        if "classes" in data:
            check_integer("identity.data.classes", data["classes"], 1)
    if "model" in identity:
        _check_network(_field(identity, "identity.", "model", dict), "identity.model.")
    for kind, networks in (_field(identity, "identity.", "networks", dict) if "networks" in identity else {}).items():
        where = f"identity.networks.{kind}"
        _field({where: networks}, "", where, list)
        if not networks:
            raise ValueError(f"{where}: expected at least one network, got none")
        for number, network in enumerate(networks):
            name = f"{where}.{number}"
            _check_network(_field({name: network}, "", name, dict), f"{name}.")


def _check_network(network: Mapping[str, Any], where: str) -> None:
    blocks = check_integer(f"{where}blocks", network.get("blocks"), 1)
    if "config" not in network or network["config"] is not None:
        config = _field(network, where, "config", dict)
        if "model" in config:
            _field(config, f"{where}config.", "model", str)
    if "survival" in network:
        survival = _field(network, where, "survival", list)
        check_integer(f"{where}survival, how many", len(survival), blocks, blocks)
        for probability in survival:
            check_number(f"{where}survival", probability, 0, 1)
    if "downsampling" in network:
        for block in _field(network, where, "downsampling", list):
            check_integer(f"{where}downsampling", block, 0, blocks - 1)


def _check_same(folder: Path, expected: Any, found: Any, field: str = "") -> None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in (*expected, *(key for key in found if key not in expected)):
            _check_same(folder, expected.get(key), found.get(key), f"{field}.{key}" if field else key)
    elif expected != found:
        raise ValueError(f"run: {folder} holds another run ({field}: expected {expected!r}, found {found!r})")


def _digest_of_facts(facts: Mapping[str, Any]) -> str:
    """SHA-256 over what a ``run.json`` says, however it is laid out."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    plain = _plain("results", facts)
    plain[DIGEST] = _digest_of_facts(plain)
    lost = "the parts on the disk stay good, and the same command goes on from them"
    with replacing(folder / "run.json", "run", lost) as file:
        file.write((json.dumps(plain, indent=2) + "\n").encode())
