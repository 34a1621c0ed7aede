"""The time of each attempt in ``run.json``, whichever way the attempt ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.run_folders import ATTEMPT, IDENTITY, add, measured
from helpers.threads import together

from pathnet.results import opening, read, writing
from pathnet.workers import Workers


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets time pass for runs."""
    now = [1000.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(opening, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    return pass_time


def seconds_in(folder: Path) -> list[float | None]:
    """Return the seconds of the attempts in the file, None where it says none."""
    attempts = json.loads((folder / "run.json").read_text())["attempts"]
    assert all({name: attempt[name] for name in ATTEMPT} == ATTEMPT for attempt in attempts)
    return [attempt.get("seconds") for attempt in attempts]


def test_each_attempt_says_how_long_it_took(tmp_path: Path, passing: Callable[[float], None]) -> None:
    for seconds in (2.0, 0.5004):
        with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
            passing(seconds)
            run.add([measured(0)])
            run.settle()
            run.conclude({"decay": seconds})
    assert seconds_in(tmp_path) == [2.0, 0.5]
    assert read(tmp_path).facts["results"] == {"decay": 0.5004}
    assert [attempt["seconds"] for attempt in run.facts["attempts"]] == [2.0, 0.5]


def test_what_a_study_concludes_later_keeps_the_seconds(tmp_path: Path, passing: Callable[[float], None]) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        passing(3)
    run.conclude({"claims": []})
    assert seconds_in(tmp_path) == [3.0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_interrupted_attempt_says_it_too(
    tmp_path: Path, passing: Callable[[float], None], error: type[BaseException]
) -> None:
    with pytest.raises(error), writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add([measured(0)])
        passing(7)
        raise error
    assert seconds_in(tmp_path) == [7.0] and len(read(tmp_path).measurements()) == 11


def test_results_that_json_cannot_hold_do_not_hide_the_seconds(
    tmp_path: Path, passing: Callable[[float], None]
) -> None:
    expected = pytest.raises(ValueError, match="results: expected an object that JSON can hold")
    with expected, writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        passing(4)
        run.conclude({"decay": float("nan")})
    assert seconds_in(tmp_path) == [4.0] and "results" not in read(tmp_path).facts


def test_a_disk_that_is_full_at_the_end_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("run: no space is left")

    def measure(error: Exception | None) -> None:
        with writing(tmp_path, IDENTITY, {}, ATTEMPT):
            monkeypatch.setattr(opening, "write_facts", full)
            if error is not None:
                raise error
        monkeypatch.undo()

    with pytest.raises(RuntimeError, match="the first error"):
        measure(RuntimeError("the first error"))
    monkeypatch.undo()
    with pytest.raises(OSError, match="no space is left"):
        measure(None)


def test_attempts_of_older_and_of_killed_processes_say_none(tmp_path: Path) -> None:
    facts = {"identity": IDENTITY, "attempts": [ATTEMPT]}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert read(tmp_path).facts == facts
    add(tmp_path, 0)
    older, newer = seconds_in(tmp_path)
    assert older is None and isinstance(newer, float)


@pytest.mark.parametrize("seconds", [-1, "long", None])
def test_seconds_that_are_none_are_refused(tmp_path: Path, seconds: Any) -> None:
    attempts = [ATTEMPT, {**ATTEMPT, "seconds": seconds}]
    (tmp_path / "run.json").write_text(json.dumps({"identity": IDENTITY, "attempts": attempts}))
    with pytest.raises(ValueError, match="attempts.1.seconds: expected a finite number of at least 0"):
        read(tmp_path)


def test_of_several_processes_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, writers = opening.write_facts, count()

    def counted(*arguments: Any) -> None:
        next(writers)
        write(*arguments)

    monkeypatch.setattr(opening, "write_facts", counted)

    def work(group: Workers) -> None:
        with writing(tmp_path, IDENTITY, {}, ATTEMPT, group) as run:
            run.add([measured(group.rank)])
            # The first process waits here for the others.
            time.sleep(0.2 * group.rank)
            run.settle()

    assert together(3, work) == [None] * 3
    (seconds,) = seconds_in(tmp_path)
    assert seconds is not None and 0.3 < seconds < 20
    assert next(writers) == 2  # at the beginning and at the end
    assert read(tmp_path).facts["attempts"][0]["processes"] == 3
