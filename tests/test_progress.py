"""Progress of a job: how far, how fast, and how long it still takes."""

from __future__ import annotations

import pytest

from pathnet import progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_tell_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.reporter("job") as report:
        for done in (1, 2, 3, 100):
            clock.now += 11
            report(done, 101, "batches")
    assert capsys.readouterr().err.splitlines() == [
        "job: 1/101 batches",
        "job: 2/101 batches, 5.45/min, 18:09 left",
        "job: 3/101 batches, 5.45/min, 17:58 left",
        "job: 100/101 batches, 3/s, 0:00 left",
    ]


def test_what_an_earlier_run_had_done_does_not_count_in_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.reporter("job") as report:
        report(1000, 1010, "batches")
        clock.now += 5
        report(1005, 1010, "batches")
    assert capsys.readouterr().err.splitlines() == ["job: 1005/1010 batches, 1/s, 0:05 left"]
