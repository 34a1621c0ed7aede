"""The figures of the training step that have goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Goal", "PRECISIONS", "goals"]

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Goal:
    """A figure of one precision, from the conclusions of a run.

    Attributes:
        precision: ``float32`` or ``bfloat16``.
        name: the figure in words, without the precision.
        sense: ``at least`` or ``at most``.
        limit: the goal; None if the figure has none, or none on processors without tiles (AMX).
        value: the figure; None if it was not measured.
    """

    precision: str
    name: str
    sense: str
    limit: float | None
    value: float | None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.precision}"


def goals(findings: Mapping[str, Any]) -> list[Goal]:
    """Return all figures of the step's findings, or of none."""
    amx = findings.get("amx", True)
    modules = f"{findings['drawn']} of {findings['modules']} modules" if findings else "modules"
    judged = []
    for key, name, sense, float32, bfloat16 in (
        (
            "times_faster",
            "training step, times faster than PyTorch's best form",
            "at least",
            2.0,
            3.0 if amx else None,
        ),
        (
            "kept_times_faster",
            "training step, the same if the process keeps freed memory",
            "at least",
            None,
            None,
        ),
        ("drawn_share", f"training step with {modules} drawn, share of a whole one", "at most", 0.45, 0.45),
        ("memory_share", "memory of a training step, share of PyTorch's least", "at most", 1.0, 1.0),
        ("pipeline_share", "input pipeline, share of a training step", "at most", 0.05, 0.05),
        ("epoch_s", "epoch of CIFAR-10, seconds, extrapolated from a step", "at most", None, 210.0 if amx else None),
    ):
        for precision, limit in zip(PRECISIONS, (float32, bfloat16), strict=True):
            value = findings.get("conclusions", {}).get(precision, {}).get(key)
            judged.append(Goal(precision, name, sense, limit, value))
    return judged
