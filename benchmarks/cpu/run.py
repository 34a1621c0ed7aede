"""A whole run on a processor: step after step, what each found on disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cpu.cases import FULL, Sizes
from benchmarks.cpu.competitors import BUILDERS, Builder, Key
from benchmarks.cpu.facts import processor, processor_facts
from benchmarks.cpu.field import Field
from benchmarks.cpu.figures import figures, lines_by_length
from benchmarks.cpu.steps import STEPS
from benchmarks.facts import commit_here
from benchmarks.outcome import Failed, Found
from benchmarks.results import CPU_FOLDER, ROOT, file_name, write

__all__ = ["REHEARSALS", "Run", "measure"]

REHEARSALS = ROOT / "build" / "rehearsal" / "cpu"


class Run:
    """One run and its results file, named by processor, instruction set, date and commit."""

    def __init__(self, sizes: Sizes, folder: Path | None = None, builders: Mapping[Key, Builder] = BUILDERS) -> None:
        now, facts = datetime.now(UTC), processor_facts()
        rehearsal, commit = sizes != FULL, commit_here() or "unknown"
        folder = folder or (REHEARSALS if rehearsal else CPU_FOLDER)
        date = now.date().isoformat()
        self.file = folder / file_name(f"{processor()} {facts['instruction_set']}", date, commit)
        self.field = Field(sizes, builders)
        self.results: dict[str, Any] = {
            "kind": "cpu",
            "date": date,
            "began": now.isoformat(timespec="seconds"),
            "commit": commit,
            "rehearsal": rehearsal,
            "facts": facts,
            "figures": [],
            "lines_by_length": {},
            "failed": {},
            "found": {},
        }

    def perform(self, name: str) -> Found:
        """One step; what it found goes to the file.

        Raises:
            Failed: it found something wrong.
        """
        try:
            found = STEPS[name](self.field)
        except Failed as failed:
            self.results["failed"][name] = {"reason": str(failed), "found": failed.found}
            self._save()
            raise
        self.results["found"][name] = found
        self._save()
        return found

    @property
    def wrong(self) -> str | None:
        """What failed, in one line."""
        return "; ".join(f"{name}: {own['reason']}" for name, own in self.results["failed"].items()) or None

    def _save(self) -> None:
        found = self.results["found"]
        self.results |= {"figures": figures(found), "lines_by_length": lines_by_length(found)}
        write(self.file, self.results)


def measure(
    sizes: Sizes,
    folder: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    steps: Iterable[str] = STEPS,
) -> Run:
    """The steps, the checks always before them; one that fails stops no other."""
    run, steps = Run(sizes, folder), list(dict.fromkeys(["checks", *steps]))
    for done, name in enumerate(steps):
        progress(done, len(steps), name)
        try:
            run.perform(name)
        except Failed:
            continue
    progress(len(steps), len(steps), "")
    return run
