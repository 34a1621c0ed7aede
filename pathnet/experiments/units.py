"""Units of work: what one process measures before it asks for more, and what an interrupt or a kill costs at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch

from pathnet import results
from pathnet.results import Measurements
from pathnet.training import Progress

__all__ = ["Amounts", "Begin", "Rows", "measure_units", "one_thread"]

Rows: TypeAlias = "Measurements | Sequence[results.Row]"
Begin: TypeAlias = "Callable[[Any, Callable[[int, str], None]], Callable[[], tuple[Rows, str]]]"
"""Function that begins to measure a unit, and returns one that waits for the rows and a note for the progress.

Meanwhile it may call its second argument with the amount of the unit that is done, and a note.
"""


@dataclass(frozen=True)
class Amounts:
    """The amounts that progress counts.

    Attributes:
        total: amount of the whole job.
        before: amount that was done before, with which progress begins.
        of_units: amount of each unit.
    """

    total: int
    before: int
    of_units: Sequence[int]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_units(
    run: results.Run,
    units: Sequence[Any],
    begin: Begin,
    amounts: Amounts,
    progress: Progress | None,
    on_gpu: bool = False,
    any_threads: bool = False,
) -> None:
    """Measure units of work in the processes of a run, each unit in one of them, and add their rows to the run.

    The rows of a unit are added as soon as they are known, so a kill costs the unit that a process is at.

    Args:
        run: the run to add to.
        units: the units, the same in all processes of the run.
        begin: begins to measure a unit.
        amounts: what progress counts.
        progress: called with (amount done by all processes, amount in total, a note), in the first process alone.
        on_gpu: whether to begin a unit before waiting for the one before, so that a GPU computes while the processor
            prepares its next work.
        any_threads: whether the rows are the same bits for any number of threads. If not, one thread computes them:
            operators of PyTorch round differently on more.
    """
    workers, done = run.workers, [*accumulate(amounts.of_units, initial=amounts.before)]
    shown = (amounts.before, "")

    def report(of_unit: int, note: str) -> None:
        nonlocal shown
        if progress is None or not workers.leads:
            return
        state = (min(done[workers.done] + of_unit, amounts.total), note)
        if state != shown:
            shown = state
            progress(state[0], amounts.total, note)

    def add(wait: Callable[[], tuple[Rows, str]], of_unit: int) -> None:
        rows, note = wait()
        if isinstance(rows, Measurements):
            run.add([rows])
        else:
            run.add_rows(rows)
        report(of_unit, note)

    begun: list[Callable[[], tuple[Rows, str]]] = []
    try:
        with nullcontext() if on_gpu or any_threads else one_thread():
            for number in workers.share_out(len(units)):
                begun.append(begin(units[number], report))
                if len(begun) > 1 or not on_gpu:
                    add(begun.pop(0), 0 if on_gpu else amounts.of_units[number])
    finally:
        for wait in begun:
            add(wait, 0)
    workers.gather(None, lambda: report(0, shown[1]))
    if workers.count > 1:
        report(0, shown[1])
