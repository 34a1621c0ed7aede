"""The step of ``make gpu`` on the engine for any model."""

from __future__ import annotations

import math

from benchmarks.adapted.cases import ON_GPU, SMALL
from benchmarks.adapted.memory import growth
from benchmarks.adapted.step import models
from benchmarks.budget import COSTS, START_S
from benchmarks.cases import Setup
from benchmarks.cpu.budget import Budget
from benchmarks.outcome import Findings

__all__ = ["any_model"]


def any_model(setup: Setup) -> Findings:
    """Check and time the engine for any model, in the seconds that the budget of a run has for it."""
    sizes, seconds = (ON_GPU, COSTS["models"].run_s - START_S) if setup.cuda else (SMALL, math.inf)
    budget = Budget(seconds, step="models")
    counts = (1, *sizes.paths)
    findings = models(sizes, "auto", budget, lambda subject, _: growth(subject, counts), setup.device)
    return {**findings, "cuts": budget.cuts}
