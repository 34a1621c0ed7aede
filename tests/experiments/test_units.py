"""The loop that measures units of work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pathnet import results
from pathnet.experiments.run import Value
from pathnet.experiments.units import Amounts, measure_units


def measured(folder: Path, units: list[int], on_gpu: bool = False, fail_at: int | None = None) -> list[str]:
    """Measure units that note what happens, and return the notes."""
    events = list[str]()

    def begin(unit: int, report: Callable[[int, str], None]) -> Callable[[], tuple[Any, str]]:
        if unit == fail_at:
            raise KeyboardInterrupt
        events.append(f"begin {unit}")
        rows = [Value("net", 0, unit, "threads", 0, float(torch.get_num_threads()))]
        return lambda: (rows, "units")

    with results.writing(folder, {"experiment": "some"}, {}, {}) as run:
        amounts = Amounts(10 + len(units), 10, [1] * len(units))
        try:
            measure_units(run, units, begin, amounts, lambda done, *_: events.append(f"done {done}"), on_gpu)
        except KeyboardInterrupt:
            events.append("interrupt")
    return events


def batches(folder: Path) -> list[int]:
    return [row.batch for row in results.read(folder).rows(Value)]


def test_a_processor_has_the_rows_of_a_unit_before_it_begins_the_next(tmp_path: Path) -> None:
    events = measured(tmp_path, [4, 5], fail_at=5)
    assert events == ["begin 4", "done 11", "interrupt"] and batches(tmp_path) == [4]


def test_a_gpu_begins_the_next_unit_before_the_rows_of_the_last_are_awaited(tmp_path: Path) -> None:
    events = measured(tmp_path / "all", [4, 5, 6], on_gpu=True)
    assert events == ["begin 4", "begin 5", "done 11", "begin 6", "done 12", "done 13"]
    events = measured(tmp_path / "some", [4, 5, 6], on_gpu=True, fail_at=6)
    assert events[-2:] == ["done 12", "interrupt"] and batches(tmp_path / "some") == [4, 5]


def test_units_are_computed_on_one_thread_unless_that_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measured(tmp_path / "one", [0])
        measured(tmp_path / "any", [0], on_gpu=True)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    threads = [results.read(tmp_path / name).rows(Value)[0].value for name in ("one", "any")]
    assert threads == [1.0, 3.0]
