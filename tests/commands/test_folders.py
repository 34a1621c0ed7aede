"""``pathnet compact`` and ``pathnet export``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_line import assert_one_line, pathnet_
from helpers.run_folders import ATTEMPT, IDENTITY, add

from pathnet import results


def test_compact_says_how_many_files_became_one(tmp_path: Path) -> None:
    for batch in (2, 0, 1):
        add(tmp_path / "run", batch)
    before = results.read(tmp_path / "run").measurements().norm.tolist()
    ended = pathnet_("compact", tmp_path / "run")
    assert (ended.status, ended.out, ended.err) == (0, "part: 3 files became one\n", "")
    assert pathnet_("compact", tmp_path / "run").out == "part: already one file\n"
    run = results.read(tmp_path / "run")
    assert [part.name for part in run.parts] == ["part-000000.parquet"]
    assert run.measurements().norm.tolist() == before
    assert json.loads(pathnet_("compact", tmp_path / "run", "--json").out) == {"merged": {"part": 1}, "written": []}


def test_compact_says_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    add(tmp_path / "run")
    assert pathnet_("compact", tmp_path / "run").out == "no measurements\n"


def test_compact_waits_for_no_other_command(tmp_path: Path) -> None:
    with results.writing(tmp_path / "run", IDENTITY, {}, ATTEMPT):
        assert_one_line(pathnet_("compact", tmp_path / "run"), "another process is writing to", tmp_path / "run")


def test_folders_that_hold_no_run_are_named(tmp_path: Path) -> None:
    for command in ("compact", "export"):
        assert_one_line(pathnet_(command, tmp_path / "nothing"), "run: expected the folder of a run", "not exist")
        assert_one_line(pathnet_(command, tmp_path), "which has no run.json")


def test_export_writes_next_to_the_run(tmp_path: Path) -> None:
    add(tmp_path / "run", 0)
    ended = pathnet_("export", tmp_path / "run", "--to", "hf")
    files = [tmp_path / "run-hf" / name for name in ("README.md", "data/path_gradients.parquet")]
    assert ended.status == 0 and ended.out.splitlines() == list(map(str, files))
    assert all(file.exists() for file in files)
    assert_one_line(pathnet_("export", tmp_path / "run"), "out: expected a new or empty folder", "run-hf")


def test_export_names_its_folder_by_the_run_that_a_person_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path / "run", 0)
    for place, run, out in (("run", ".", "run-hf"), ("run/measurements", "..", "run-hf"), ("", "run/", "run-hf")):
        monkeypatch.chdir(tmp_path / place)
        ended = pathnet_("export", run)
        assert ended.status == 0, ended.err
        shutil.rmtree(tmp_path / out)


def test_export_takes_another_folder(tmp_path: Path) -> None:
    add(tmp_path / "run", 0)
    facts = json.loads(pathnet_("export", tmp_path / "run", "--out", tmp_path / "deep" / "out", "--json").out)
    assert facts["written"][0] == str(tmp_path / "deep" / "out" / "README.md")


def test_export_knows_one_layout(tmp_path: Path) -> None:
    add(tmp_path / "run", 0)
    ended = pathnet_("export", tmp_path / "run", "--to", "csv")
    assert ended.status == 2 and "expected hf, got 'csv'" in ended.err
