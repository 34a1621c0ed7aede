"""A run that is open for adding: by one process at a time, or by several that share the work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from pathnet.checks import check_integer, check_path
from pathnet.files import locked, shared_by_others, telling
from pathnet.results.compaction import clear, merge_parts, recover_journals
from pathnet.results.facts import check_facts, plain_object, write_facts
from pathnet.results.journal import Journal
from pathnet.results.parts import write_part
from pathnet.results.run import Run, read
from pathnet.results.tables import free_names, measurements_in, parts_of
from pathnet.workers import ALONE, Workers, check_workers

__all__ = ["Writer", "writing"]

PART_SECONDS = 30.0
"""Seconds between two parts of a process."""
SAVING_SECONDS = 60.0
"""Seconds that a group of processes waits for an earlier one, whose members may still be saving what they have."""
SHOWN_SECONDS = 120.0
"""Seconds until a file that another machine wrote must be there."""


class Writer:
    """The measurements of one process on their way into a run: rows in journals, which become parts.

    Args:
        folder: folder of the run.
        workers: the processes that add to the run together.
    """

    def __init__(self, folder: Path, workers: Workers) -> None:
        self._folder, self._workers = folder, workers
        self._journals: dict[str, Journal] = {}
        self._saved = time.monotonic()
        self._names: dict[str, Iterator[Path]] = {}

    def add(self, stem: str, table: pa.Table) -> None:
        """Append rows to the journal of their kind; every 30 seconds, make parts of the journals."""
        stem = stem if self._workers.count == 1 else f"{stem}-{self._workers.rank}"
        if stem not in self._journals:
            self._journals[stem] = Journal(measurements_in(self._folder), stem)
            self._names[stem] = free_names(self._folder, stem)
        self._journals[stem].append(table)
        if time.monotonic() - self._saved >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Make a part of each journal, durably.

        Raises:
            OSError: a part cannot be written; its rows stay in the journal.
        """
        for stem, journal in self._journals.items():
            if journal.rows:
                kept = (
                    f"its {journal.rows} measurements are kept in a journal next to it, and the same command resumes "
                    "from them"
                )
                write_part(self._names[stem], journal.content(), kept)
                journal.remove()
        self._saved = time.monotonic()

    def settle(self, run: Run) -> None:
        """Merge what all processes have measured, in the first of them; the others wait, and fail if it fails."""
        self.save()
        names = [file.name for stem in self._journals for file in parts_of(self._folder, stem)]
        written = self._workers.gather(names)

        def merge() -> None:
            _wait_for([measurements_in(self._folder) / name for names in written for name in names])
            merge_parts(run)

        # Nobody may list parts for the next call while these are merged.
        self._workers.agree(merge)

    def close(self) -> None:
        """Close the journals, and leave them where they are."""
        for journal in self._journals.values():
            journal.close()


def _wait_for(files: list[Path]) -> None:
    """Wait until files of other machines are visible here: folders that machines share may show them late.

    Raises:
        OSError: one of them is still not there.
    """
    until = time.monotonic() + SHOWN_SECONDS
    for file in files:
        while not file.exists():
            if time.monotonic() > until:
                raise OSError(
                    f"run: expected {file}, which another process wrote, within {SHOWN_SECONDS:g} s, got none"
                )
            time.sleep(0.1)


@contextmanager
def writing(
    folder: str | Path,
    identity: Mapping[str, Any],
    planned: Mapping[str, int],
    attempt: Mapping[str, Any],
    workers: Workers = ALONE,
) -> Iterator[Run]:
    """Open a run to add measurements, and create it if there is none. One process, or one group, at a time may do so.

    What is added is kept from then on, even if the process is killed; the same command goes on from there.

    Args:
        folder: folder of the run.
        identity: everything that decides what is measured, as JSON can hold it, with the name of the ``experiment``;
            it must equal that of an existing run.
        planned: planned amounts by name, such as ``batches``; the run keeps the largest of all calls.
        attempt: versions, device and time of this process. The run adds the ``seconds`` within the context, when it
            is left, even by an error; a process that is killed leaves none.
        workers: the processes that add to the run together, all of which enter and leave the context.

    Yields:
        The run.

    Raises:
        ValueError: the folder holds a run with another identity, another command is writing to it, or an argument
            has the wrong type.
        OSError: the folder cannot be written to.

    Example:
        >>> from pathnet import results
        >>> with results.writing("run", {"experiment": "my measurement", "seed": 0}, {}, {"by": "me"}) as run:
        ...     run.conclude({"mean": 0.25})
        >>> results.read("run").facts["results"]
        {'mean': 0.25}
        >>> with results.writing("run", {"experiment": "my measurement", "seed": 1}, {}, {}):
        ...     pass
        Traceback (most recent call last):
        ValueError: run: run holds another run (seed: expected 1, found 0); give another folder
    """
    folder = check_path("folder", folder)
    check_workers(workers)
    identity, attempt = plain_object("identity", identity), plain_object("attempt", attempt)
    amounts = plain_object("planned", planned).items()
    planned = {name: check_integer(f"planned.{name}", amount, 0) for name, amount in amounts}
    check_facts({"identity": identity, "attempts": [attempt], **planned})
    if workers.count > 1:
        attempt["processes"] = workers.count
    lock, busy = folder / ".lock", f"writing to {folder}"
    with ExitStack() as held:

        def opened() -> dict[str, Any]:
            with telling(measurements_in(folder), "run"):
                measurements_in(folder).mkdir(parents=True, exist_ok=True)
            patience = SAVING_SECONDS if workers.count > 1 else 0.0
            descriptor = held.enter_context(locked(lock, "run", busy, patience=patience))
            run = _prepared(folder, identity, planned, attempt)
            if workers.count > 1:
                shared_by_others(descriptor, "run", busy)
            return run.facts

        facts = workers.agree(opened)
        if not workers.leads:
            _check_same(folder, identity, facts["identity"])
            held.enter_context(locked(lock, "run", busy, shared=True, patience=SAVING_SECONDS))
        writer, begun = Writer(folder, workers), time.monotonic()

        def end_attempt() -> None:
            if workers.leads:
                facts["attempts"][-1]["seconds"] = round(time.monotonic() - begun, 3)
                write_facts(folder / "run.json", facts)

        try:
            yield Run(folder, facts, workers, writer)
        except BaseException:
            # What is in a journal is kept there, if it cannot become a part.
            with suppress(OSError):
                writer.save()
            with suppress(OSError):
                end_attempt()
            raise
        else:
            try:
                writer.save()
            finally:
                end_attempt()
        finally:
            writer.close()
    if workers.count > 1:
        workers.gather(None)
        workers.agree(lambda: None)


def _prepared(folder: Path, identity: dict[str, Any], planned: Mapping[str, int], attempt: dict[str, Any]) -> Run:
    """Return the run in a locked folder, without what killed processes left, and with one more attempt."""
    if (folder / "run.json").exists():
        run = read(folder)
        _check_same(folder, identity, run.identity)
    else:
        run = Run(folder, {"identity": identity, "attempts": []})
    clear(folder)
    recover_journals(folder)
    for name, amount in planned.items():
        run.facts[name] = max(amount, run.facts.get(name, 0))
    run.facts["attempts"].append(attempt)
    write_facts(folder / "run.json", run.facts)
    return run


def _check_same(folder: Path, expected: Any, recorded: Any, field: str = "") -> None:
    if isinstance(expected, dict) and isinstance(recorded, dict):
        for key in (*expected, *(key for key in recorded if key not in expected)):
            _check_same(folder, expected.get(key), recorded.get(key), f"{field}.{key}" if field else key)
    elif expected != recorded:
        difference = f"{field}: expected {expected!r}, found {recorded!r}"
        raise ValueError(f"run: {folder} holds another run ({difference}); give another folder")
