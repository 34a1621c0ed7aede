"""Time and memory that a run's folder costs: ``python -m benchmarks.bookkeeping [--parts N] [--batches N]``.

Batches of 54 norms are added to runs without measuring anything. One run grows to many parts and is read; another
grows by many batches, is read as when a command resumes, and is settled. What is read is compared with what was
added. Seconds are those of a clock on the wall.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.cpu.facts import processor, processor_facts
from benchmarks.facts import commit_here
from benchmarks.results import FOLDER, file_name, write
from pathnet import results
from pathnet.results import Measurements, opening

__all__ = ["BLOCKS", "GOALS", "main", "of_batches", "of_parts"]

BLOCKS = 54
GOALS = {"read_parts_s": 5.0, "add_ms": 0.3, "batch_ms": 1.0}
"""Largest times: to read 10,000 parts, to add a batch, and all of a batch's bookkeeping."""
LENGTH = np.arange(1, BLOCKS + 1, dtype=np.int16)
CODES = (np.arange(BLOCKS)[None, :] < LENGTH[:, None]).astype(np.uint8)

Entry = dict[str, Any]


def batch_of(number: int) -> Measurements:
    """Return norms that tell their batch and length."""
    norm = number + LENGTH / (BLOCKS + 1)
    return Measurements(np.full(BLOCKS, number, np.int32), LENGTH, CODES, norm, ["cpu"] * BLOCKS)


@contextmanager
def opened(folder: Path, batches: int, part_seconds: float) -> Iterator[results.Run]:
    """Open a run that makes a part every few seconds."""
    identity = {"experiment": "path-gradients", "model": {"config": None, "blocks": BLOCKS}}
    patched = mock.patch.object(opening, "PART_SECONDS", part_seconds)
    with patched, results.writing(folder, identity, {"batches": batches}, {}) as run:
        yield run


def check(measured: Measurements, batches: int) -> None:
    """Raise ValueError unless measurements are those that were added."""
    expected = (np.arange(batches)[:, None] + LENGTH / (BLOCKS + 1)).ravel()
    if not np.array_equal(measured.norm, expected) or not np.array_equal(measured.path[:BLOCKS], CODES):
        raise ValueError(f"measurements: expected those of {batches} batches, got {len(measured)} rows")


def of_parts(folder: Path, parts: int) -> Entry:
    """Return the seconds to write, read and merge a run of many parts, each with one batch."""
    seconds: dict[str, float] = {}
    with opened(folder, parts, 0.0) as run, timed(seconds, "write"):
        for number in range(parts):
            run.add([batch_of(number)])
    if len(run.parts) != parts:
        raise ValueError(f"parts: expected {parts}, got {len(run.parts)}")
    with timed(seconds, "read"):
        measured = results.read(folder).measurements()
    check(measured, parts)
    with timed(seconds, "read_column"):
        results.read(folder).columns("norm")
    with timed(seconds, "describe"):
        repr(results.read(folder))
    with timed(seconds, "compact"):
        results.compact(folder)
    with timed(seconds, "read_merged"):
        measured = results.read(folder).measurements()
    check(measured, parts)
    return {"parts": parts, "rows_in_part": BLOCKS, "seconds": seconds}


def of_batches(folder: Path, batches: int, part_seconds: float) -> Entry:
    """Return the seconds to add, read and settle many batches, and the memory that it takes."""
    seconds: dict[str, float] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with timed(seconds, "add"), opened(folder, batches, part_seconds) as run:
        for number in range(batches):
            run.add([batch_of(number)])
    parts = len(run.parts)
    with opened(folder, batches, part_seconds) as run:
        with timed(seconds, "resume"):
            known = np.unique(run.columns("batch")["batch"])
        if len(known) != batches:
            raise ValueError(f"batches: expected {batches}, got {len(known)}")
        with timed(seconds, "settle"):
            run.settle()
    with timed(seconds, "read"):
        measured = run.measurements()
    check(measured, batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "batches": batches,
        "rows_in_batch": BLOCKS,
        "parts": parts,
        "seconds_of_a_part": part_seconds,
        "seconds": seconds,
        "peak_memory_bytes": 1024 * peak,
        "growth_of_peak_memory_bytes": 1024 * (peak - before),
        "bytes_on_disk": sum(file.stat().st_size for file in run.parts),
    }


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Note the seconds that the context takes."""
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def figures(parts: Entry, batches: Entry) -> dict[str, float]:
    """Return the numbers that `GOALS` bound."""
    count, seconds = batches["batches"], batches["seconds"]
    return {
        "read_parts_s": parts["seconds"]["read"],
        "add_ms": 1000 * seconds["add"] / count,
        "batch_ms": 1000 * sum(seconds.values()) / count,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the numbers, and write the results file; return 1 if one is above its goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bookkeeping")
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--part-seconds", type=float, default=0.1, help="time between two parts; runs wait 30 s")
    parser.add_argument("--out", type=Path, default=FOLDER / "bookkeeping", help="folder of the results file")
    options = parser.parse_args(arguments)
    now, facts = datetime.now(UTC), processor_facts()
    date, commit = now.date().isoformat(), commit_here() or "unknown"
    with tempfile.TemporaryDirectory() as folder:
        # Parts first, while the process is small as that of a command that only reads.
        parts = of_parts(Path(folder) / "parts", options.parts)
        batches = of_batches(Path(folder) / "batches", options.batches, options.part_seconds)
    reached = figures(parts, batches)
    within = {name: reached[name] <= goal for name, goal in GOALS.items()}
    content = {
        "kind": "bookkeeping",
        "date": date,
        "commit": commit,
        "facts": facts,
        "parts": parts,
        "batches": batches,
        "figures": reached,
        "goals": GOALS,
        "within": within,
    }
    for name, goal in GOALS.items():
        print(f"{name} {reached[name]:.3g} (at most {goal:g})")
    write(options.out / file_name(f"{processor()} {facts['instruction_set']}", date, commit), content)
    return int(not all(within.values()))


if __name__ == "__main__":
    sys.exit(main())
