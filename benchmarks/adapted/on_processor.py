"""The step of ``pathnet bench`` on the engine for any model."""

from __future__ import annotations

import torch

from benchmarks.adapted.memory import growth, growth_alone
from benchmarks.adapted.step import models
from benchmarks.adapted.subject import Subject
from benchmarks.cpu.budget import Budget
from benchmarks.cpu.cases import FULL
from benchmarks.cpu.field import Field
from benchmarks.outcome import Findings

__all__ = ["ENGINE", "any_model"]

ENGINE = "auto"


def any_model(field: Field) -> Findings:
    """Check and time the engine for any model on one thread."""
    sizes, small, threads = field.sizes.models, field.unlimited != FULL, torch.get_num_threads()

    def grown(subject: Subject, budget: Budget) -> dict[str, Findings]:
        if subject.case.name in sizes.alone:
            return growth_alone(subject.case.name, sizes, ENGINE, small, budget)
        return growth(subject, (1, *sizes.paths))

    torch.set_num_threads(1)
    try:
        return models(sizes, ENGINE, field.budget, grown)
    finally:
        torch.set_num_threads(threads)
