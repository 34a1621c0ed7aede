"""Progress of a long job: a bar in a notebook or on a terminal, plain lines on stderr elsewhere.

Whatever takes ``progress=``, such as `pathnet.training.train` and `pathnet.lesion.errors`, takes the function that
`reporter` yields. Stdout is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pathnet.checks import described
from pathnet.printable import printable
from pathnet.training import Progress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["reporter"]

LINE_SECONDS = 10.0
UPDATE_SECONDS = 0.1
"""Least time between two updates of a notebook's bar: each is a message to the browser."""


def reporter(label: str) -> AbstractContextManager[Progress]:
    """Return a context manager that yields a function of (done, total, note), which shows how far a job is.

    In a notebook it shows a bar in the output of the cell, which stays in its last state. On a terminal it shows a
    bar on stderr (with rich, which the extra ``paper`` brings). Elsewhere it writes a line to stderr every ten
    seconds at most, and always the last state.

    Args:
        label: name of the job, shown before the bar.

    Returns:
        A context manager; its function is what ``progress=`` takes.

    Raises:
        ValueError: ``label`` is no string.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=128, classes=4, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=4, in_channels=1
        ... )
        >>> lesions = [pathnet.lesion.Lesion(deleted=(i,)) for i in range(net.n)]
        >>> with pathnet.progress.reporter("lesions") as progress:
        ...     measured = pathnet.lesion.errors(net, data, lesions, progress=progress)
        >>> measured.images
        32
    """
    if not isinstance(label, str):
        raise ValueError(f"label: expected a string, got {described(label)}")
    if _in_notebook():
        return _cell(label)
    console = _terminal()
    return _lines(label) if console is None else _bar(label, console)


def _in_notebook() -> bool:
    """Return whether this is the process of a notebook's kernel; a process that it starts or forks is not."""
    ipython = sys.modules.get("IPython")
    kernel = None if ipython is None else getattr(ipython.get_ipython(), "kernel", None)
    # A fork inherits the kernel but not the thread that sends its messages. The process id of its session does not
    # tell: ipykernel sets it to the fork's when that prints.
    sender = getattr(getattr(kernel, "iopub_thread", None), "thread", None)
    return kernel is not None and (sender is None or sender.is_alive())


def _terminal() -> Console | None:
    """Return the console of a terminal on stderr; None if it is none, or rich is not installed."""
    # FORCE_COLOR, which notebooks and build servers set for what they start, makes rich take any file for a terminal.
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None


@contextmanager
def _bar(label: str, console: Console) -> Iterator[Progress]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[note]}", markup=False),
        bars.TextColumn("{task.fields[pace]}", markup=False),
    )
    pace = _Pace()
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task(printable(label), total=None, note="", pace="")

        def report(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=printable(note), pace=pace.words(done, total))

        yield report


@contextmanager
def _cell(label: str) -> Iterator[Progress]:
    # IPython is installed wherever there is a kernel, but its functions are not typed.
    handle: Any = import_module("IPython.display").DisplayHandle()
    shown, pace = time.monotonic(), _Pace()
    last: tuple[int, int, str] | None = None
    handle.display(_bundle(label, '<progress style="width: 20em"></progress>'), raw=True)

    def report(done: int, total: int, note: str) -> None:
        nonlocal shown, last
        now = time.monotonic()
        last, words = (done, total, note), pace.words(done, total)
        if now - shown >= UPDATE_SECONDS:
            shown = now
            handle.update(_state(label, done, total, note, words), raw=True)

    try:
        yield report
    finally:
        handle.update(_bundle(label) if last is None else _state(label, *last), raw=True)


class _Pace:
    """The rate of a job, and the time that the rest takes, in words.

    What an earlier run of the same job had done does not count: the rate is that since the first report.
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def words(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        started, before = self._first
        if done <= before or now <= started:
            return ""
        rate = (done - before) / (now - started)
        shown = f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.3g}/min"
        if done >= total:
            return shown
        minutes, seconds = divmod(round((total - done) / rate), 60)
        return f"{shown}, {minutes}:{seconds:02d} left"


def _state(label: str, done: int, total: int, note: str, pace: str = "") -> dict[str, Any]:
    bar = f'<progress value="{done}" max="{max(total, 1)}" style="width: 20em"></progress>'
    return _bundle(label, bar, _line(done, total, note, pace))


def _line(done: int, total: int, note: str, pace: str) -> str:
    state = f"{done}/{total} {note}".rstrip()
    return f"{state}, {pace}" if pace else state


def _bundle(label: str, bar: str = "", state: str = "") -> dict[str, Any]:
    """Return what a notebook shows: HTML, and text for readers without it."""
    name, words = printable(label), printable(state)
    html = " ".join(part for part in (escape(name), bar, escape(words)) if part)
    return {"text/plain": f"{name}: {words}" if words else name, "text/html": f"<div>{html}</div>"}


@contextmanager
def _lines(label: str) -> Iterator[Progress]:
    shown, pace = time.monotonic(), _Pace()
    waiting = ""

    def show() -> None:
        # A measurement continues even if its progress cannot be written.
        with suppress(OSError):
            print(waiting, file=sys.stderr, flush=True)

    def report(done: int, total: int, note: str) -> None:
        nonlocal shown, waiting
        waiting = printable(f"{label}: {_line(done, total, note, pace.words(done, total))}")
        if time.monotonic() - shown >= LINE_SECONDS:
            show()
            shown, waiting = time.monotonic(), ""

    try:
        yield report
    finally:
        if waiting:
            show()
