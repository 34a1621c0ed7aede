"""A run folder: parts of path gradient norms that come back sorted, complete and once, under one identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.run_folders import ATTEMPT, IDENTITY, add, measured

from pathnet.results import parts, read, writing


def test_what_was_written_is_read_back_sorted(tmp_path: Path) -> None:
    add(tmp_path / "run", 5, 2)
    add(tmp_path / "run", 0)
    run = read(tmp_path / "run")
    back = run.measurements()
    assert [part.name for part in run.parts] == ["part-000000.parquet", "part-000001.parquet"]
    assert back.batch.tolist() == [0] * 11 + [2] * 11 + [5] * 11 and back.length.tolist() == [*range(1, 12)] * 3
    for position, batch in enumerate([0, 2, 5]):
        rows = slice(11 * position, 11 * position + 11)
        np.testing.assert_array_equal(back.norm[rows], measured(batch).norm)
        np.testing.assert_array_equal(back.path[rows], measured(batch).path)
    assert back.engine == ["cpu"] * 33 and (back.path.sum(1) == back.length).all()


def test_parts_are_zstd_parquet_whose_columns_explain_themselves(tmp_path: Path) -> None:
    add(tmp_path, 0)
    (part,) = read(tmp_path).parts
    file = pq.ParquetFile(part)
    types = {field.name: str(field.type) for field in file.schema_arrow}
    assert types == {"batch": "int32", "length": "int16", "path": "string", "norm": "double", "engine": "string"}
    assert file.metadata.row_group(0).column(3).compression == "ZSTD"
    assert file.read()["path"].to_pylist() == ["".join(map(str, path)) for path in measured(0).path]
    assert all(field.metadata[b"description"].endswith(b".") for field in file.schema_arrow)
    assert b"character i, from 0, is 1" in file.schema_arrow.field("path").metadata[b"description"]
    assert file.schema_arrow.field("norm").metadata[b"unit"].startswith(b"loss per unit")
    metadata = file.schema_arrow.metadata
    assert metadata[b"pathnet.format"] == b"2"
    assert {f"sha256.{name}".encode() for name in types} == metadata.keys() - {b"pathnet.format"}


def test_an_empty_run_has_no_measurements(tmp_path: Path) -> None:
    add(tmp_path)
    assert len(read(tmp_path).measurements()) == 0 and read(tmp_path).measurements().path.shape == (0, 11)


def test_run_json_keeps_identity_attempts_and_the_largest_number_of_batches(tmp_path: Path) -> None:
    add(tmp_path, total=20)
    add(tmp_path, total=10)
    with writing(tmp_path, IDENTITY, {"batches": 5}, ATTEMPT) as run:
        run.conclude({"decay": 0.5})
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["identity"] == IDENTITY and facts["batches"] == 20
    assert [attempt.pop("seconds") >= 0 for attempt in facts["attempts"]] == [True] * 3
    assert facts["attempts"] == [ATTEMPT] * 3 and facts["results"] == {"decay": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed: expected 1, found 0"),
        ({"model": {**IDENTITY["model"], "hash": "xyz"}}, r"model.hash: expected 'xyz', found 'abc'"),
        (
            {"model": {**IDENTITY["model"], "config": {"depth": 8}}},
            r"model.config: expected {'depth': 8}, found None",
        ),
        ({"at": "image"}, r"at: expected 'image', found None"),
    ],
)
def test_another_identity_is_refused_by_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    add(tmp_path, 0)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        add(tmp_path, 1, identity={**IDENTITY, **change})
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_field_that_only_the_folder_has_is_a_difference(tmp_path: Path) -> None:
    add(tmp_path, identity={**IDENTITY, "at": "image"})
    with pytest.raises(ValueError, match=r"at: expected None, found 'image'"):
        add(tmp_path)


def test_leftovers_of_a_killed_run_are_ignored_and_removed(tmp_path: Path) -> None:
    add(tmp_path, 0)
    end = ".0123456789ab.pathnet-temporary"
    leftovers = [tmp_path / f".run.json{end}", tmp_path / "measurements" / f".part-000001.parquet{end}"]
    for leftover in leftovers:
        leftover.write_bytes(b"PAR1 half a part")
    assert len(read(tmp_path).measurements()) == 11
    add(tmp_path, 1)
    assert not any(leftover.exists() for leftover in leftovers)
    assert len(read(tmp_path).measurements()) == 22


def test_a_part_takes_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(table: pa.Table, file: Any, **_: object) -> None:
        file.write(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(parts.pq, "write_table", half_written)
    with pytest.raises(OSError, match="No space"):
        add(tmp_path, 0)
    assert read(tmp_path).parts == []


def test_a_new_part_never_replaces_one(tmp_path: Path) -> None:
    for batch in range(3):
        add(tmp_path, batch)
    (tmp_path / "measurements" / "part-000001.parquet").unlink()
    add(tmp_path, 7)
    add(tmp_path, 8)
    assert sorted(set(read(tmp_path).measurements().batch.tolist())) == [0, 2, 7, 8]


@pytest.mark.parametrize("kept", [0, 4, 300])
def test_a_truncated_part_is_an_error_that_names_it(tmp_path: Path, kept: int) -> None:
    add(tmp_path, 0)
    part = tmp_path / "measurements" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"run: .*part-000000.parquet is not a readable part"):
        read(tmp_path).measurements()


def test_a_part_of_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    add(tmp_path, 0)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "measurements" / "part-000001.parquet")
    with pytest.raises(ValueError, match=r"part-000001.parquet has other columns"):
        read(tmp_path).measurements()


def test_a_part_written_twice_counts_once(tmp_path: Path) -> None:
    add(tmp_path, 0)
    add(tmp_path, 1, 0)
    assert read(tmp_path).measurements().batch.tolist() == [0] * 11 + [1] * 11


def test_parts_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    add(tmp_path, 0)
    other = measured(0)
    other.norm[2] *= 1 + 1e-12
    with writing(tmp_path, IDENTITY, {"batches": 10}, ATTEMPT) as run:
        run.add([other])
    with pytest.raises(ValueError, match="hold batch 0, length 3 twice and differently"):
        read(tmp_path).measurements()


def test_two_processes_cannot_write_at_once(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, {"batches": 10}, ATTEMPT):
        with pytest.raises(ValueError, match="another process is writing"):
            add(tmp_path, 0)
        assert len(read(tmp_path).measurements()) == 0
    add(tmp_path, 0)


def test_folders_that_hold_no_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run: expected the folder of a run, got .*nowhere"):
        read(tmp_path / "nowhere")
    for content in ("{", "[]", "{}", '{"identity": {}}', "\x00"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run: .*run.json is not the run.json of a run"):
            read(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run: .*run.json is not the run.json of a run"):
        add(tmp_path, 0)


def test_a_folder_named_like_a_partition_adds_no_columns(tmp_path: Path) -> None:
    add(tmp_path / "seed=1", 0)
    assert len(read(tmp_path / "seed=1").measurements()) == 11


def test_a_run_says_what_it_holds(tmp_path: Path) -> None:
    add(tmp_path / "empty", total=0)
    assert repr(read(tmp_path / "empty")) == (
        f"<Run of path-gradients in {tmp_path / 'empty'}: 0 rows measured, planned batches 0; no results yet>"
    )
    add(tmp_path, *range(200), total=1000)
    with writing(tmp_path, IDENTITY, {"exact_batches": 5}, ATTEMPT) as run:
        run.conclude({"decay": 0.5})
    start, end = f"<Run of path-gradients in {tmp_path}", "planned batches 1,000, exact_batches 5; results written>"
    assert repr(read(tmp_path)) == f"{start}: 2,200 rows measured, {end}"
    (tmp_path / "measurements" / "exact-000000.parquet").write_bytes(b"PAR1")
    assert repr(read(tmp_path)) == f"{start}: 2,200 rows measured (1 of 2 parts cannot be read), {end}"


# Files of others are left alone


def test_files_of_somebody_else_stay(tmp_path: Path) -> None:
    add(tmp_path, 0)
    strangers = [tmp_path / "notes.tmp", tmp_path / "measurements" / "notes.tmp", tmp_path / "run.json.tmp"]
    strangers.append(tmp_path / ".notes.0123456789ab.pathnet-temporary")
    for stranger in strangers:
        stranger.write_text("precious")
    add(tmp_path, 1)
    assert all(stranger.read_text() == "precious" for stranger in strangers)


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"^run: expected a lock file at .*\.lock, got a link"):
        add(tmp_path / "run", 0)
    assert target.read_text() == "precious"


# A full disk, or no folder


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^run: .*file/run/measurements cannot be written \(Not a directory\)$"):
        add(tmp_path / "file" / "run", 0)
