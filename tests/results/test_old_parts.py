"""Runs measured before paths became text, and runs that go on from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.old_parts import old_rows, write_old_norms, write_old_part
from helpers.run_folders import ATTEMPT, IDENTITY, READINGS, Reading, add, add_readings, measured

from pathnet.results import compact, read, writing

TYPES = {
    "name": pa.string(),
    "place": pa.int64(),
    "share": pa.float64(),
    "blocks": pa.list_(pa.int32()),
    "count": pa.int64(),
    "value": pa.float64(),
}


def part(folder: Path, number: int, stem: str = "part") -> Path:
    return folder / "measurements" / f"{stem}-{number:06d}.parquet"


def mixed(folder: Path) -> None:
    """Make a run of two old parts and one of today."""
    add(folder)
    for batch in (3, 0):
        write_old_norms(part(folder, batch), measured(batch))
    add(folder, 1)


def check(folder: Path) -> None:
    back = read(folder).measurements()
    expected = [measured(batch) for batch in (0, 1, 3)]
    assert back.batch.tolist() == [0] * 11 + [1] * 11 + [3] * 11
    np.testing.assert_array_equal(back.path, np.concatenate([one.path for one in expected]))
    np.testing.assert_array_equal(back.norm, np.concatenate([one.norm for one in expected]))
    assert back.engine == ["cpu"] * 33


def test_old_and_new_parts_are_read_together(tmp_path: Path) -> None:
    mixed(tmp_path)
    check(tmp_path)
    assert read(tmp_path).columns("length")["length"].tolist() == [*range(1, 12)] * 3


def test_compaction_makes_new_parts_of_old_ones(tmp_path: Path) -> None:
    mixed(tmp_path)
    assert compact(tmp_path) == {"part": 3}
    check(tmp_path)
    (file,) = read(tmp_path).parts
    assert str(pq.read_schema(file).field("path").type) == "string"
    assert pq.read_schema(file).metadata[b"pathnet.format"] == b"2"


@pytest.mark.parametrize("merge", [False, True])
def test_old_parts_of_rows_are_read(tmp_path: Path, merge: bool) -> None:
    add_readings(tmp_path, *READINGS[2:])
    rows = [{**vars(row), "blocks": list(row.blocks)} for row in READINGS[:3]]
    write_old_part(part(tmp_path, 1, "readings"), old_rows(rows, TYPES))
    if merge:
        assert compact(tmp_path) == {"readings": 2}
    assert read(tmp_path).rows(Reading) == READINGS


def test_a_changed_value_in_an_old_part_is_damage(tmp_path: Path) -> None:
    add(tmp_path)
    file = part(tmp_path, 0)
    write_old_norms(file, measured(0))
    table = pq.ParquetFile(file).read()
    norms = table["norm"].to_numpy().copy()
    norms[4] = np.nextafter(norms[4], 1)
    pq.write_table(table.set_column(3, "norm", pa.array(norms)).replace_schema_metadata(table.schema.metadata), file)
    for reading in (lambda: read(tmp_path).measurements(), lambda: read(tmp_path).columns("length")):
        with pytest.raises(ValueError, match=f"^run: {file} is damaged .its sha256 does not match"):
            reading()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (b"\x01", "expected 2 bytes for 11 blocks, got 1"),
        (b"\x01\x80", "expected no modules beyond those of 11 blocks"),
    ],
)
def test_old_paths_that_do_not_fit_are_refused_by_file_and_row(tmp_path: Path, path: bytes, message: str) -> None:
    add(tmp_path)
    file = part(tmp_path, 0)
    write_old_norms(file, measured(0))
    table = pq.ParquetFile(file).read().replace_schema_metadata(None)
    paths = table["path"].to_pylist()
    paths[3] = path
    write_old_part(file, table.set_column(2, "path", pa.array(paths)))
    with pytest.raises(ValueError, match=f"^run: {file}: row 3: path: {message}"):
        read(tmp_path).measurements()


@dataclass(frozen=True)
class Explained(Reading):
    """A reading of a later version, which has a text more."""

    MEASURED: ClassVar[tuple[str, ...]] = (*Reading.MEASURED, "reason")
    PART: ClassVar[str] = Reading.PART
    reason: str = ""


def explained(reading: Reading, reason: str) -> Explained:
    return Explained(**vars(reading), reason=reason)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("journal", [False, True], ids=["part", "journal"])
def test_rows_of_before_a_text_was_added_are_read_without_it(tmp_path: Path, journal: bool, merge: bool) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows(READINGS[:2])
        if journal:
            (waiting,) = (tmp_path / "measurements").iterdir()
            content = waiting.read_bytes()
    if journal:
        (part(tmp_path, 0, "readings")).unlink()
        waiting.write_bytes(content)
    expected = [explained(reading, "") for reading in READINGS[:2]]
    assert read(tmp_path).rows(Explained) == expected
    assert read(tmp_path).columns("reason", kind=Explained)["reason"].tolist() == ["", ""]
    later = [explained(reading, "noise") for reading in READINGS[2:]]
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows(later)
    if merge:
        assert compact(tmp_path) == {"readings": 2}
    assert read(tmp_path).rows(Explained) == [*expected, *later]
    if not merge:
        with pytest.raises(ValueError, match="has other columns"):
            read(tmp_path).rows(Reading)


@dataclass(frozen=True)
class Required(Reading):
    """A reading with a text more that every file must have."""

    PART: ClassVar[str] = Reading.PART
    MEASURED: ClassVar[tuple[str, ...]] = (*Reading.MEASURED, "reason")
    reason: str


def test_merging_adds_no_text_that_every_row_must_have(tmp_path: Path) -> None:
    add_readings(tmp_path, *READINGS[:2])
    with pytest.raises(ValueError, match="has other columns"), writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows([Required(**vars(reading), reason="noise") for reading in READINGS[2:]])
        run.settle()


def test_a_part_that_lacks_another_column_is_refused(tmp_path: Path) -> None:
    rows = [{"name": row.name, "place": row.place} for row in READINGS]
    add_readings(tmp_path)
    write_old_part(part(tmp_path, 1, "readings"), old_rows(rows, {"name": pa.string(), "place": pa.int64()}))
    with pytest.raises(ValueError, match=r"readings-000001.parquet has other columns: expected .*, got"):
        read(tmp_path).rows(Explained)
