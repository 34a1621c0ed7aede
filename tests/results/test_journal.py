"""Measurements outlive their process at once, and nothing that was measured is lost or changed in silence."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.full_disk import largest_file
from helpers.run_folders import ATTEMPT, IDENTITY, READINGS, Reading, add, measured

from pathnet.results import Run, opening, read, writing

WRITER = """
import sys
from helpers.run_folders import ATTEMPT, IDENTITY, measured
from pathnet.results import opening, read, writing

opening.PART_SECONDS = 0.02
with writing(sys.argv[1], IDENTITY, {}, ATTEMPT) as run:
    known = set(run.measurements().batch.tolist())
    print("open", flush=True)
    for batch in range(300):
        if batch not in known:
            run.add([measured(batch)])
            print(batch, flush=True)
    run.settle()
"""


def journals(folder: Path) -> list[Path]:
    return list((folder / "measurements").glob(".*.pathnet-journal"))


def parts(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "measurements").glob("*.parquet"))


def check(folder: Path, *batches: int) -> None:
    back = read(folder).measurements()
    assert back.batch.tolist() == [batch for batch in batches for _ in range(11)]
    np.testing.assert_array_equal(back.norm, np.concatenate([measured(batch).norm for batch in batches]))
    np.testing.assert_array_equal(back.path, np.concatenate([measured(batch).path for batch in batches]))


def journal_of(folder: Path, *batches: int) -> Path:
    """Leave batches in a journal, one record each, as a killed process does."""
    with writing(folder, IDENTITY, {}, ATTEMPT) as run:
        for batch in batches:
            run.add([measured(batch)])
        (file,) = journals(folder)
        content = file.read_bytes()
    for part in (folder / "measurements").iterdir():
        part.unlink()
    file.write_bytes(content)
    return file


def test_what_is_added_is_read_at_once_and_becomes_one_part(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(3)])
        run.add([measured(1)])
        run.add_rows(READINGS)
        check(tmp_path, 1, 3)
        assert read(tmp_path).rows(Reading) == READINGS and parts(tmp_path) == [] and len(journals(tmp_path)) == 2
        assert repr(read(tmp_path)).count("26 rows measured")
    assert parts(tmp_path) == ["part-000000.parquet", "readings-000000.parquet"] and not journals(tmp_path)
    check(tmp_path, 1, 3)


def test_a_part_is_written_every_thirty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(opening.time, "monotonic", lambda: now)
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        for batch in range(5):
            run.add([measured(batch)])
            now += 11.0
        assert parts(tmp_path) == ["part-000000.parquet"]
        check(tmp_path, 0, 1, 2, 3, 4)


def test_a_journal_that_a_kill_left_is_read_and_becomes_a_part(tmp_path: Path) -> None:
    journal_of(tmp_path, 2, 0)
    check(tmp_path, 0, 2)
    add(tmp_path, 1)
    assert not journals(tmp_path) and parts(tmp_path) == ["part-000000.parquet", "part-000001.parquet"]
    check(tmp_path, 0, 1, 2)


def test_rows_in_a_journal_and_a_part_count_once(tmp_path: Path) -> None:
    add(tmp_path, 0, 1)
    journal_of(tmp_path / "other", 0, 1).rename(tmp_path / "measurements" / ".part.0123456789ab.pathnet-journal")
    check(tmp_path, 0, 1)
    add(tmp_path)
    check(tmp_path, 0, 1)


def test_a_journal_cut_short_anywhere_holds_its_whole_records(tmp_path: Path) -> None:
    file = journal_of(tmp_path, 0, 1, 2)
    content = file.read_bytes()
    size = len(content) // 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in (*range(2 * size, 2 * size + 60), 3 * size - 1):
            file.write_bytes(content[:end])
            check(tmp_path, 0, 1)
    add(tmp_path)
    check(tmp_path, 0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_in_a_journal_is_told_and_changes_nothing(tmp_path: Path, seed: int) -> None:
    file = journal_of(tmp_path, 0, 1, 2)
    content = file.read_bytes()
    size, rng = len(content) // 3, random.Random(seed)
    for bit in [*range(8 * size, 8 * size + 128, 7), *rng.sample(range(8 * size, 16 * size), 30)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match=f"^run: {file} is damaged; [12] of its records are read"):
            back = read(tmp_path).measurements()
        # Only a damaged length hides where the next record begins.
        hidden = bit < 8 * size + 128
        assert back.batch.tolist() == [0] * 11 + ([] if hidden else [2] * 11), bit
    with pytest.warns(RuntimeWarning, match="the same command measures them again"):
        add(tmp_path, 1)
    check(tmp_path, 0, 1, 2)


def test_a_full_disk_costs_the_open_batch_and_says_so(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        room = journals(tmp_path)[0].stat().st_size + 100
        with largest_file(room), pytest.raises(OSError) as failure:
            run.add([measured(1)])
        assert str(failure.value) == (
            f"run: {tmp_path / 'measurements'} cannot be written (File too large); its 11 measurements are lost, all "
            "earlier ones are kept, and the same command resumes from them"
        )
        check(tmp_path, 0)
        run.add([measured(2)])
        check(tmp_path, 0, 2)
    check(tmp_path, 0, 2)


def test_a_disk_that_is_full_when_a_part_is_due_keeps_the_journal(tmp_path: Path) -> None:
    with pytest.raises(OSError) as failure, writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        with largest_file(500):
            run.settle()
    assert str(failure.value) == (
        f"run: {tmp_path / 'measurements' / 'part-000000.parquet'} cannot be written (File too large); its 11 "
        "measurements are kept in a journal next to it, and the same command resumes from them"
    )
    check(tmp_path, 0)
    add(tmp_path, 1)
    check(tmp_path, 0, 1)


def test_results_that_find_no_room_leave_the_measurements(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        with largest_file(10), pytest.raises(OSError) as failure:
            run.conclude({"mean": 1.0})
        assert str(failure.value).startswith(f"run: {tmp_path / 'run.json'} cannot be written (File too large); the ")
    check(tmp_path, 0)


def test_a_folder_removed_meanwhile_is_told_at_the_next_batch(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(OSError) as failure, writing(folder, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        shutil.rmtree(folder)
        run.add([measured(1)])
    message = str(failure.value)
    assert "\n" not in message and "it was removed while measurements were written to it" in message
    assert "kept" not in message and not folder.exists()


def test_a_folder_removed_after_a_part_was_written_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "PART_SECONDS", 0.0)
    with pytest.raises(OSError) as failure, writing(tmp_path / "run", IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        shutil.rmtree(tmp_path / "run")
        run.add([measured(1)])
    assert "it was removed" in str(failure.value) and "kept" not in str(failure.value)


def test_a_folder_moved_meanwhile_keeps_all_measurements(tmp_path: Path) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.raises(OSError) as failure, writing(folder, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        folder.rename(moved)
        run.add([measured(1)])
    assert "it was moved while measurements were written to it" in str(failure.value)
    assert not folder.exists()
    check(moved, 0, 1)
    add(moved, 2)
    check(moved, 0, 1, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_told_in_one_line(tmp_path: Path) -> None:
    add(tmp_path, 0)
    (tmp_path / "measurements").chmod(0o500)
    with pytest.raises(OSError, match=r"^run: .*measurements cannot be written \(Permission denied\)"):
        add(tmp_path, 1)
    (tmp_path / "measurements").chmod(0o700)
    check(tmp_path, 0)


def test_a_read_only_file_system_is_told_with_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, 0)

    def refuse(*arguments: Any, **options: Any) -> int:
        raise OSError(30, os.strerror(30))

    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        monkeypatch.setattr("pathnet.results.journal.os.open", refuse)
        with pytest.raises(
            OSError, match=r"cannot be written \(Read-only file system\); its 11 measurements are lost"
        ):
            run.add([measured(1)])
        monkeypatch.undo()
    check(tmp_path, 0)


def test_an_interrupt_keeps_all_that_was_added(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        raise KeyboardInterrupt
    assert parts(tmp_path) == ["part-000000.parquet"] and not journals(tmp_path)
    check(tmp_path, 0)


@pytest.mark.parametrize(
    "call", [lambda run: run.add([measured(0)]), lambda run: run.settle()], ids=["add", "settle"]
)
def test_a_run_that_was_read_takes_nothing(tmp_path: Path, call: Callable[[Run], None]) -> None:
    add(tmp_path, 0)
    with pytest.raises(ValueError, match=r"^run: expected a run within pathnet\.results\.writing to (add|settle)"):
        call(read(tmp_path))


# Processes


def started(folder: Path) -> subprocess.Popen[str]:
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_killed_writers_lose_nothing_that_they_said_was_added(tmp_path: Path) -> None:
    """Kills come at random moments of adding, of writing parts, and of merging."""
    said: set[int] = set()
    for seed in range(3):
        process = started(tmp_path)
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        time.sleep(random.Random(seed).uniform(0.0, 0.08))
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].split("\n")
        # The last line may be cut short.
        said |= set(map(int, lines[:-1]))
        back = read(tmp_path).measurements()
        assert said <= set(back.batch.tolist()), seed
    process = started(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    check(tmp_path, *range(300))
    assert parts(tmp_path) == ["part-000000.parquet"] and not journals(tmp_path)
    undisturbed = tmp_path / "undisturbed"
    add(undisturbed, *range(300))
    with writing(undisturbed, IDENTITY, {}, ATTEMPT) as run:
        run.settle()
    name = Path("measurements") / "part-000000.parquet"
    assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_second_command_is_refused_and_a_dead_ones_lock_does_not_matter(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"^run: another process is writing to {tmp_path}$"):
        add(tmp_path, 999)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".lock").exists()
    add(tmp_path, 999)
    assert 999 in read(tmp_path).measurements().batch
