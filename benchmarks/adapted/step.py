"""The step that times the engine for any model: check, time, measure memory, judge, model after model."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.adapted.cases import Case, Sizes
from benchmarks.adapted.measuring import measure
from benchmarks.adapted.report import figures
from benchmarks.adapted.subject import Subject
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.outcome import Failed, Findings

__all__ = ["models"]

Growth = Callable[[Subject, Budget], dict[str, Findings]]
"""Function that returns the growth of memory by number of paths."""

TIMES = 0.8
"""Share of a model's time for its timings; the rest is for its memory."""


def models(
    sizes: Sizes,
    engine: str,
    budget: Budget,
    growth: Growth,
    device: str = "cpu",
    done: Callable[[str, Findings], None] = lambda name, findings: None,
) -> Findings:
    """Check and time all models of the sizes; return the findings on each, and the judged figures.

    Args:
        growth: measures the memory; may raise `LeftOut`.
        done: is called with the findings on each model.

    Raises:
        Failed: a result is wrong; the findings hold what was measured before.
    """
    entries: dict[str, Findings] = {}
    for position, case in enumerate(sizes.cases):
        share = budget.share(1 / (len(sizes.cases) - position))
        try:
            entries[case.name] = _model(case, sizes, engine, share, growth, device)
        except Failed as failed:
            raise Failed(str(failed), {"models": entries, case.name: failed.findings}) from failed
        done(case.name, entries[case.name])
    return {"models": entries, "figures": figures(entries)}


def _model(case: Case, sizes: Sizes, engine: str, budget: Budget, growth: Growth, device: str) -> Findings:
    subject = Subject(case, engine, device, sizes.adaptations)
    findings: Findings = {"check": subject.check()}
    findings |= measure(subject, sizes, budget.share(TIMES))
    try:
        findings["memory"] = growth(subject, budget)
    except LeftOut as left_out:
        budget.cut(f"{case.name}, memory", 1, None, str(left_out))
    return findings
