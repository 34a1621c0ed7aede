"""The benchmark of run folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bookkeeping, results


def test_a_small_run_is_timed_and_its_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bookkeeping, "GOALS", dict.fromkeys(bookkeeping.GOALS, 1e9))
    assert bookkeeping.main(["--parts", "3", "--batches", "20", "--part-seconds", "0", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    content = results.read_object(file)
    assert content["kind"] == "bookkeeping" and content["parts"]["parts"] == 3 and content["batches"]["parts"] == 20
    assert content["within"] == dict.fromkeys(bookkeeping.GOALS, True)
    assert set(content["batches"]["seconds"]) == {"add", "resume", "settle", "read"}
    assert "read_parts_s" in capsys.readouterr().out
    monkeypatch.setattr(bookkeeping, "GOALS", dict.fromkeys(bookkeeping.GOALS, 0.0))
    assert bookkeeping.main(["--parts", "3", "--batches", "20", "--out", str(tmp_path)]) == 1


def test_measurements_that_differ_from_those_that_were_added_are_an_error() -> None:
    with pytest.raises(ValueError, match="measurements: expected those of 2 batches, got 54 rows"):
        bookkeeping.check(bookkeeping.batch_of(1), 2)
