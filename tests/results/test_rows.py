"""Rows of dataclasses: they come back equal, sorted, each once, and kinds lie side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from helpers.run_folders import ATTEMPT, IDENTITY, READINGS, Reading, add_readings, measured

from pathnet.results import Range, parts, read, writing


def test_rows_come_back_equal_sorted_and_with_their_types(tmp_path: Path) -> None:
    add_readings(tmp_path, READINGS[3], READINGS[1])
    add_readings(tmp_path, READINGS[2], READINGS[0])
    back = read(tmp_path).rows(Reading)
    assert back == READINGS and [type(value) for value in vars(back[0]).values()] == [
        str,
        int,
        float,
        tuple,
        int,
        float,
    ]
    assert sorted(file.name for file in (tmp_path / "measurements").iterdir()) == [
        "readings-000000.parquet",
        "readings-000001.parquet",
    ]


def test_no_rows_write_no_part(tmp_path: Path) -> None:
    add_readings(tmp_path)
    assert read(tmp_path).rows(Reading) == [] and not list((tmp_path / "measurements").iterdir())


def test_a_row_written_twice_counts_once(tmp_path: Path) -> None:
    add_readings(tmp_path, *READINGS, READINGS[0])
    add_readings(tmp_path, READINGS[2])
    assert read(tmp_path).rows(Reading) == READINGS


@pytest.mark.parametrize("change", [{"count": 4}, {"value": 0.5}])
def test_rows_that_contradict_each_other_are_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    add_readings(tmp_path, *READINGS)
    add_readings(tmp_path, replace(READINGS[1], **change))
    with pytest.raises(ValueError, match=r"hold name a, place 0, share 0.1, blocks \[2, 1\] twice and differently"):
        read(tmp_path).rows(Reading)


def test_rows_that_measure_something_else_are_kept_apart(tmp_path: Path) -> None:
    add_readings(tmp_path, *(replace(READINGS[0], place=place) for place in (2, 1)))
    assert [row.place for row in read(tmp_path).rows(Reading)] == [1, 2]


def test_rows_of_other_columns_are_an_error_that_names_the_part(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Other:
        PART: ClassVar[str] = "readings"
        MEASURED: ClassVar[tuple[str, ...]] = ("value",)
        RANGES: ClassVar[Mapping[str, Range]] = {}

        name: str
        value: float

    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows([Other("a", 1.0)])
    with pytest.raises(ValueError, match=r"readings-000000.parquet has other columns: expected \['name', 'place',"):
        read(tmp_path).rows(Reading)


def test_kinds_of_rows_lie_side_by_side(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Note:
        PART: ClassVar[str] = "notes"
        MEASURED: ClassVar[tuple[str, ...]] = ("text",)
        RANGES: ClassVar[Mapping[str, Range]] = {}

        batch: int
        text: str

    notes = [Note(0, "x"), Note(1, "y")]
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows(READINGS)
        run.add_rows(notes)
        run.add([measured(0)])
    run = read(tmp_path)
    assert run.rows(Reading) == READINGS and run.rows(Note) == notes and len(run.measurements()) == 11


def test_a_half_written_part_of_rows_is_ignored_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_readings(tmp_path, READINGS[0])
    leftover = tmp_path / "measurements" / ".readings-000001.parquet.0123456789ab.pathnet-temporary"
    leftover.write_bytes(b"PAR1 half a part")
    assert read(tmp_path).rows(Reading) == READINGS[:1]
    add_readings(tmp_path, *READINGS[1:])
    assert read(tmp_path).rows(Reading) == READINGS and not leftover.exists()

    def half_written(table: pa.Table, file: Any, **_: object) -> None:
        file.write(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(parts.pq, "write_table", half_written)
    with pytest.raises(OSError, match="No space"):
        add_readings(tmp_path, replace(READINGS[0], place=99))
    assert not [part for part in (tmp_path / "measurements").glob("*.parquet") if part.name.endswith("2.parquet")]
    monkeypatch.undo()
    assert replace(READINGS[0], place=99) in read(tmp_path).rows(Reading), "the row is kept in the journal"
