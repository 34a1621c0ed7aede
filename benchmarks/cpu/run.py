"""A complete run on a processor, step after step; each step's findings are on disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.cpu.cases import FULL, MINUTES, Sizes
from benchmarks.cpu.competitors import BUILDERS, Builder, Key
from benchmarks.cpu.facts import processor, processor_facts
from benchmarks.cpu.field import Field
from benchmarks.cpu.figures import figures, lines_by_length
from benchmarks.cpu.steps import PREPARATION, SELF_CHECKED, SHARES, STEPS
from benchmarks.facts import commit_here
from benchmarks.outcome import Failed, Findings
from benchmarks.results import CPU_FOLDER, ROOT, file_name, write

__all__ = ["REHEARSALS", "Run", "measure"]

REHEARSALS = ROOT / "build" / "rehearsal" / "cpu"


class Run:
    """One run and its results file, named by processor, instruction set, date and commit."""

    def __init__(
        self,
        sizes: Sizes,
        folder: Path | None = None,
        builders: Mapping[Key, Builder] = BUILDERS,
        budget: Budget | None = None,
        steps: Iterable[str] = STEPS,
    ) -> None:
        self.budget, self.waiting = budget or Budget(60 * MINUTES), list(steps)
        now, facts = datetime.now(UTC), processor_facts()
        rehearsal, commit = sizes != FULL, commit_here() or "unknown"
        folder = folder or (REHEARSALS if rehearsal else CPU_FOLDER)
        date = now.date().isoformat()
        self.file = folder / file_name(f"{processor()} {facts['instruction_set']}", date, commit)
        self.field = Field(sizes, builders, self.budget)
        self.results: dict[str, Any] = {
            "kind": "cpu",
            "date": date,
            "began": now.isoformat(timespec="seconds"),
            "commit": commit,
            "rehearsal": rehearsal,
            "facts": facts,
            "budget": {},
            "cuts": self.budget.cuts,
            "left_out": {},
            "figures": [],
            "lines_by_length": {},
            "failed": {},
            "found": {},
        }

    def perform(self, name: str) -> Findings:
        """Run one step in its share of the remaining time, write its findings to the file and return them.

        Raises:
            Failed: the step found an error.
            LeftOut: there is no time for it.
        """
        parts = SHARES[name] + sum(SHARES[later] for later in self.waiting if later != name)
        self.waiting = [later for later in self.waiting if later != name]
        self.field.budget = self.budget.share(SHARES[name] / parts, name)
        try:
            self.field.budget.require(PREPARATION[name] * self.field.check_s, "to prepare and check it")
            findings = STEPS[name](self.field)
        except Failed as failed:
            self.results["failed"][name] = {"reason": str(failed), "found": failed.findings}
            self._save()
            raise
        except LeftOut as left_out:
            self.results["left_out"][name] = str(left_out)
            self._save()
            raise
        self.results["found"][name] = findings
        self._save()
        return findings

    @property
    def wrong(self) -> str | None:
        """The failures in one line, or None."""
        return "; ".join(f"{name}: {failure['reason']}" for name, failure in self.results["failed"].items()) or None

    def _save(self) -> None:
        findings = self.results["found"]
        judged = figures(findings)
        if self.field.sizes.setup.batch != self.field.unlimited.setup.batch:
            # Goals apply to the batches of a run without limits.
            judged = [{**figure, "met": None} for figure in judged]
        self.results |= {"figures": judged, "lines_by_length": lines_by_length(findings)}
        self.results["budget"] = {"minutes": self.budget.seconds / 60, "taken_s": round(self.budget.spent, 1)}
        write(self.file, self.results)


def measure(
    sizes: Sizes,
    folder: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    steps: Iterable[str] = STEPS,
    budget: Budget | None = None,
) -> Run:
    """Run the steps; one that fails or has no time stops no other.

    The checks of the competitors come first, unless every step checks itself all that it times.
    """
    steps = list(dict.fromkeys(steps))
    if not SELF_CHECKED.issuperset(steps):
        steps = list(dict.fromkeys(["checks", *steps]))
    run = Run(sizes, folder, budget=budget, steps=steps)
    for done, name in enumerate(steps):
        progress(done, len(steps), name)
        try:
            run.perform(name)
        except (Failed, LeftOut):
            continue
    progress(len(steps), len(steps), "")
    return run
