"""Merging the parts of a run: one sorted file of the same bytes whatever was there, and no loss at any step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.full_disk import largest_file
from helpers.run_folders import ATTEMPT, IDENTITY, READINGS, Reading, add, add_readings, measured

from pathnet import files
from pathnet.results import compact, read, writing


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "measurements").iterdir()}


def all_of(folder: Path) -> str:
    run = read(folder)
    back = run.measurements()
    return repr([array.tolist() for array in (back.batch, back.length, back.path, back.norm)]) + repr(
        run.rows(Reading)
    )


def grown(folder: Path, orders: tuple[tuple[int, ...], ...]) -> Path:
    for batches in orders:
        add(folder, *batches)
    add_readings(folder, *READINGS[1:])
    add_readings(folder, *READINGS[:2])
    return folder


def test_the_same_measurements_make_the_same_bytes_whatever_their_parts(tmp_path: Path) -> None:
    orders = [((0, 1, 2, 3),), ((0,), (1,), (2, 3)), ((3,), (1, 0), (2,)), ((2, 2), (0,), (1, 3), (0,))]
    folders = [grown(tmp_path / str(i), order) for i, order in enumerate(orders)]
    expected = all_of(folders[0])
    for folder in folders:
        compact(folder)
        assert all_of(folder) == expected
    assert list(contents(folders[0])) and all(contents(folders[0]) == contents(folder) for folder in folders)
    assert sorted(contents(folders[0])) == ["part-000000.parquet", "readings-000000.parquet"]


def test_what_is_merged_is_not_written_again(tmp_path: Path) -> None:
    grown(tmp_path, ((1,), (0,)))
    assert compact(tmp_path) == {"part": 2, "readings": 2}
    before = {file: file.stat() for file in (tmp_path / "measurements").iterdir()}
    assert compact(tmp_path) == {"part": 1, "readings": 1}
    assert {file: file.stat() for file in (tmp_path / "measurements").iterdir()} == before


def test_measurements_that_contradict_each_other_stay_so(tmp_path: Path) -> None:
    add(tmp_path, 0)
    other = measured(0)
    other.norm[2] *= 1 + 1e-12
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([other])
    compact(tmp_path)
    with pytest.raises(ValueError, match="hold batch 0, length 3 twice and differently"):
        read(tmp_path).measurements()


def test_a_run_that_is_written_to_is_not_merged(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT), pytest.raises(ValueError, match="another process is writing to"):
        compact(tmp_path)


def test_a_damaged_part_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    grown(tmp_path, ((1,), (0,)))
    part = tmp_path / "measurements" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-5])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"^run: {part} is not a readable part"):
        compact(tmp_path)
    assert contents(tmp_path) == before


def test_a_full_disk_keeps_all_parts(tmp_path: Path) -> None:
    grown(tmp_path, ((1,), (0,), (2,)))
    before, expected = contents(tmp_path), all_of(tmp_path)
    with (
        largest_file(500),
        pytest.raises(OSError, match=r"cannot be written \(File too large\); all measurements are"),
    ):
        compact(tmp_path)
    assert contents(tmp_path) == before
    compact(tmp_path)
    assert all_of(tmp_path) == expected


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(step: int, patch: pytest.MonkeyPatch) -> Any:
    """End at the file operation of a number, as a kill does: nothing that comes later happens."""
    count = itertools.count()

    def until_killed(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(count) >= step:
                raise Killed
            return call(*arguments, **options)

        return counted

    with patch.context() as m:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync"), (os, "link"), (files.os, "open")):
            m.setattr(owner, name, until_killed(getattr(owner, name)))
        yield


@pytest.mark.parametrize("journal", [False, True])
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: bool) -> None:
    for step in itertools.count():
        folder = grown(tmp_path / str(step), ((1,), (0,), (2,)))
        if journal:
            left_in_a_journal(folder, 5, monkeypatch)
        expected, done = all_of(folder), False
        try:
            with killed_at(step, monkeypatch):
                compact(folder)
                done = True
        except Killed:
            pass
        assert all_of(folder) == expected, f"step {step}"
        compact(folder)
        assert all_of(folder) == expected, f"step {step}"
        assert sorted(contents(folder)) == ["part-000000.parquet", "readings-000000.parquet"]
        if done:
            break
    assert step > 8


def left_in_a_journal(folder: Path, batch: int, patch: pytest.MonkeyPatch) -> None:
    """Add a batch, and end as a killed process does: with a journal."""
    with patch.context() as m, pytest.raises(OSError, match="full"), writing(folder, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(batch)])
        m.setattr("pathnet.results.opening.write_part", full)
    assert len(list((folder / "measurements").glob(".*.pathnet-journal"))) == 1
    assert batch in np.unique(read(folder).measurements().batch)


def full(*arguments: object) -> None:
    raise OSError("full")
