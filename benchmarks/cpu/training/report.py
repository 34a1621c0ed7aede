"""The figures of the training step, and its forms as a table in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.cpu.training.forms import PRECISIONS

__all__ = ["judged", "table"]

FASTER = {"float32": 2.0, "bfloat16": 3.0}
DRAWN_SHARE, MEMORY_SHARE, PIPELINE_SHARE = 0.45, 1.0, 0.05
EPOCH_S = {"float32": None, "bfloat16": 210.0}

Row = tuple[str, str, float | None, float | None]


def judged(findings: dict[str, Any]) -> list[Row]:
    """Return title, sense, goal and value of each figure; no value if it was not measured."""
    conclusions = findings.get("conclusions", {})
    modules = f"{findings['drawn']} of {findings['modules']} modules" if findings else "modules"
    rows: list[Row] = []
    for key, sense, goals, title in (
        ("times_faster", "at least", FASTER, "training step, times faster than PyTorch's best form"),
        ("drawn_share", "at most", DRAWN_SHARE, f"training step with {modules} drawn, share of a whole one"),
        ("memory_share", "at most", MEMORY_SHARE, "memory of a training step, share of PyTorch's least"),
        ("pipeline_share", "at most", PIPELINE_SHARE, "input pipeline, share of a training step"),
        ("epoch_s", "at most", EPOCH_S, "epoch of CIFAR-10, seconds, extrapolated from a training step"),
    ):
        for precision in PRECISIONS:
            goal = goals[precision] if isinstance(goals, dict) else goals
            rows.append((f"{title}, {precision}", sense, goal, conclusions.get(precision, {}).get(key)))
    return rows


def table(findings: dict[str, Any]) -> Table:
    """Return milliseconds of each form, with modules drawn as a share of the whole step, and megabytes."""
    drawn = f"{findings['drawn']} of {findings['modules']} modules, share"
    title = f"A training step, batch {findings['batch']}; memory: the peak of a process in a step"
    shown = Table("form", "step ms", "forward", "backward", drawn, "memory MB", title=title)
    for row in findings["forms"]:
        parts, cells = row["parts"], (row.get("drawn"), row.get("memory"))
        shown.add_row(
            row["form"],
            *(f"{1e3 * seconds:.4g}" for seconds in (row["median_s"], parts["forward_s"], parts["backward_s"])),
            f"{cells[0]['share']:.3f}" if cells[0] else "",
            f"{cells[1]['bytes'] / 1e6:.4g}" if cells[1] else "",
        )
    return shown
