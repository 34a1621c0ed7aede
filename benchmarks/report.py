"""Tables of a results file: goals, timings, errors. ``python -m benchmarks.report [FILE]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.adapted.cases import NAMES, ON_GPU
from benchmarks.adapted.report import GOALS, RATIOS, tables
from benchmarks.results import newest, read

__all__ = ["goals", "show"]

Steps = dict[str, Any]


def goals(steps: Steps) -> list[dict[str, Any]]:
    """Return the goals of the design with the measurements; ``met`` is None for a goal that was not measured."""

    def finding(step: str, *keys: str) -> Any:
        value = steps[step]["found"]
        for key in keys:
            value = value[key]
        return value

    def worst_error(precision: str, key: str) -> float:
        return max(row[key] for row in finding("accuracy", "rows") if row["precision"] == precision)

    judged: list[dict[str, Any]] = []

    def at_most(limit: float, title: str, measure: Callable[..., float], *arguments: str) -> None:
        judged.append(_goal(title, "at most", limit, partial(measure, *arguments)))

    def at_least(limit: float, title: str, *keys: str) -> None:
        judged.append(_goal(title, "at least", limit, partial(finding, *keys)))

    both = ("bfloat16", "float32")
    for precision, limit in zip(both, (6.0, 20.0), strict=True):
        keys = ("whole_sweep", "precisions", precision, "seconds_for_1000_batches")
        at_most(limit, f"54,000 measurements, {precision}, s", finding, *keys)
    at_least(100.0, "times faster than the loop, bfloat16", "sweep", "own", "bfloat16", "times_faster_than_loop")
    title = "times faster than the best composition, bfloat16"
    at_least(5.0, title, "sweep", "own", "bfloat16", "times_faster_than_composed")
    for precision in both:
        title = f"share of the record in a sweep, {precision}"
        at_most(0.1, title, finding, "sweep", "own", precision, "record_share")
    keys = ("batch_sweep", "precisions", "bfloat16", "seconds_for_1000_batches")
    at_most(15.0, "54,000 measurements, BN mode batch, bfloat16, s", finding, *keys)
    for precision in both:
        title = f"share of the record, BN mode batch, {precision}"
        at_most(0.1, title, finding, "batch_sweep", "precisions", precision, "record_share")
        title = f"triton's time in times of cuda's, {precision}"
        at_most(2.5, title, finding, "running_triton", "precisions", precision, "times_of_cuda")
    title = "fused training step, times faster than torch.compile"
    at_least(1.5, title, "training_compiled", "times_faster_than_compiled")
    few, many = ON_GPU.paths
    for name in NAMES:
        for key, (title, sense, goal) in GOALS.items():
            if key in RATIOS and goal is not None:
                measure = partial(finding, "models", "models", name, "ratios", "wall", key)
                judged.append(_goal(f"{name}: {title.format(few=few, many=many)}", sense, goal, measure))
    title = "54 deletions, share of 55 eager forward passes"
    at_most(0.25, title, lambda: min(finding("deletions", "share_of_eager").values()))
    for precision in both:
        title = f"exact sums by length, share of as many modules one by one, {precision}"
        at_most(1.3, title, finding, "sums", "precisions", precision, "share")
    for precision, bounds in (("float32", (1e-5, 1e-4)), ("bfloat16", (5e-3, 2e-2))):
        for key, bound in zip(("batch_norm", "sample_norm"), bounds, strict=True):
            title = f"error of a {key.replace('_', ' ')} against float64, {precision}"
            at_most(bound, title, worst_error, precision, key)
    for goal, precision in zip(judged, both, strict=False):
        if goal["measured"] is not None:
            goal["extrapolated"] = not finding("whole_sweep", "precisions", precision, "complete")
    return judged


def _goal(title: str, sense: str, limit: float, measure: Callable[[], float]) -> dict[str, Any]:
    try:
        measured: float | None = measure()
    except (KeyError, TypeError, ValueError):
        measured = None
    met = None if measured is None else bool(measured <= limit if sense == "at most" else measured >= limit)
    return {"goal": title, "sense": sense, "limit": limit, "measured": measured, "met": met}


def show(results: dict[str, Any], console: Console) -> None:
    """Print a run's results as tables."""
    console.print(f"[bold]{results['device']}[/bold], {results['date']}, commit {results['commit']}")
    if results["rehearsal"]:
        console.print("a rehearsal: its numbers mean nothing")
    console.print(_steps(results["steps"]), _goals(results["goals"]))
    models = results["steps"].get("models", {}).get("found", {})
    if "figures" in models:
        console.print(*tables(models))
    sweep = results["steps"].get("sweep", {}).get("found", {})
    if "timings" in sweep:
        title = f"{sweep['paths']} paths, one of each length, on a batch of {sweep['batch']}"
        console.print(_timings(title, sweep["timings"]))
    paths = results["steps"].get("paths", {}).get("found", {})
    if "rows" in paths:
        named = {f"length {row['length']}, {row['name']}, {row['part']}": row for row in paths["rows"]}
        console.print(_timings("One path", named))
    scaling = results["steps"].get("scaling", {}).get("found", {})
    if "rows" in scaling:
        console.print(_scaling(scaling["rows"]))


def _steps(steps: Steps) -> Table:
    table = Table("step", "outcome", "seconds", "reason", title="Steps")
    for name, step in steps.items():
        table.add_row(name, step["status"], f"{step['seconds']:.1f}", step.get("reason", ""))
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = Table("goal", "limit", "measured", "", title="Goals")
    for goal in goals:
        outcome = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        measured = "" if goal["measured"] is None else f"{goal['measured']:.3g}"
        measured += " (extrapolated)" if goal.get("extrapolated") else ""
        table.add_row(goal["goal"], f"{goal['sense']} {goal['limit']:g}", measured, outcome)
    return table


def _timings(title: str, timings: dict[str, Any]) -> Table:
    table = Table("", "median, ms", "quartiles, ms", title=title)
    for name, timing in timings.items():
        low, high = timing["quartiles_s"]
        table.add_row(name, f"{1e3 * timing['median_s']:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}")
    return table


def _scaling(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "varied", "precision", "paths", "batch", "ms", "paths/s", "TFLOP/s", title="Backward passes of pathnet alone"
    )
    for row in rows:
        varied = f"{row['varied']} {row.get(row['varied'], '')}"
        sizes = (str(row["paths"]), str(row["batch"]), f"{1e3 * row['median_s']:.3f}")
        table.add_row(
            varied, row["precision"], *sizes, f"{row['paths_per_s']:.0f}", f"{row['flops_per_s'] / 1e12:.2f}"
        )
    return table


def main() -> int:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    if file is None:
        print("no results yet: make gpu, on a machine with a GPU", file=sys.stderr)
        return 1
    show(read(file), Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
