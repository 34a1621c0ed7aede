"""A run to which several processes add, here as threads; and readers of a folder that changes meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folders import ATTEMPT, IDENTITY, READINGS, add, measured
from helpers.threads import together

from pathnet.results import compaction, opening, parts, read, tables, writing
from pathnet.workers import Workers


def test_settling_again_and_again_waits_for_no_part_that_was_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "SHOWN_SECONDS", 0.5)
    replace = compaction.replace_part

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        replace(*arguments)

    monkeypatch.setattr(compaction, "replace_part", slowly)

    def work(group: Workers) -> None:
        with writing(tmp_path, IDENTITY, {}, ATTEMPT, group) as run:
            for turn in range(3):
                run.add([measured(2 * turn + group.rank)])
                run.settle()

    assert together(2, work) == [None, None]
    assert [file.name for file in tables.parts_of(tmp_path)] == ["part-000000.parquet"]
    assert set(read(tmp_path).measurements().batch.tolist()) == set(range(6))


def test_if_the_first_process_cannot_merge_all_raise_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("run: no space is left")

    monkeypatch.setattr(opening, "merge_parts", full)

    def work(group: Workers) -> None:
        with writing(tmp_path, IDENTITY, {}, ATTEMPT, group) as run:
            run.add([measured(group.rank)])
            run.settle()

    assert [str(error) for error in together(2, work)] == ["run: no space is left"] * 2
    assert set(read(tmp_path).measurements().batch.tolist()) == {0, 1}


@pytest.mark.parametrize(("module", "name"), [(tables, "row_count"), (compaction, "stored_schema")])
def test_parts_that_are_merged_meanwhile_are_looked_for_again(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, 0)
    add(tmp_path, 1)
    look, merged, lock = getattr(parts, name), list[str](), threading.Lock()

    def look_later(file: Path) -> Any:
        with lock:  # parts are looked at in threads
            if not merged:
                merged.append(name)
                for part in compaction.parts_of(tmp_path)[1:]:
                    part.rename(part.with_suffix(".merged"))
        return look(file)

    monkeypatch.setattr(module, name, look_later)
    run = read(tmp_path)
    assert [kind.stem for kind in compaction.kinds_in(run)] == ["part"]
    assert "11 rows measured, " in repr(run)


@pytest.mark.parametrize("name", ["", "top-5", "part", "a/b", ".hidden", "a.b"])
def test_a_kind_whose_files_would_be_those_of_another_is_refused(name: str, tmp_path: Path) -> None:
    kind = type("Reading", (type(READINGS[0]),), {"PART": name})
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run, pytest.raises(ValueError, match=r"Reading\.PART: expected"):
        run.add_rows([kind("a", 0, 0.1, (), 3, 0.0)])
    assert list((tmp_path / "measurements").iterdir()) == []
