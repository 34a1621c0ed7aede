"""Progress of a long job on stderr: a bar on a terminal, plain lines elsewhere; stdout is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pathnet.printable import printable
from pathnet.training import Progress as Report

__all__ = ["reporter"]

LINE_SECONDS = 10.0


@contextmanager
def reporter(label: str) -> Iterator[Report]:
    """Yield a function of (done, total, note) that shows on stderr how far the job called ``label`` is.

    Off a terminal it writes a line every ten seconds at most, and always the last state.
    """
    console = Console(stderr=True)
    with _bar(label, console) if console.is_terminal else _lines(label) as report:
        yield report


@contextmanager
def _bar(label: str, console: Console) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(printable(label), total=None, note="")
        yield lambda done, total, note: progress.update(task, completed=done, total=total, note=printable(note))


@contextmanager
def _lines(label: str) -> Iterator[Report]:
    shown = time.monotonic()
    waiting = ""

    def show() -> None:
        # A measurement continues even if its progress cannot be written.
        with suppress(OSError):
            print(waiting, file=sys.stderr, flush=True)

    def report(done: int, total: int, note: str) -> None:
        nonlocal shown, waiting
        waiting = printable(f"{label}: {done}/{total} {note}".rstrip())
        if time.monotonic() - shown >= LINE_SECONDS:
            show()
            shown, waiting = time.monotonic(), ""

    try:
        yield report
    finally:
        if waiting:
            show()
