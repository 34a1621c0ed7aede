"""What a results file says, for people: goals, timings, errors. ``python -m benchmarks.report [FILE]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import newest, read

__all__ = ["goals", "show"]

Steps = dict[str, Any]


def goals(steps: Steps) -> list[dict[str, Any]]:
    """What the design asks for beside what was measured; ``met`` is None where nothing was."""
    asked: list[tuple[str, str, float, Callable[[], float]]] = []

    def found(step: str) -> Any:
        return steps[step]["found"]

    for precision, limit in (("bfloat16", 6.0), ("float32", 20.0)):
        whole = lambda p=precision: found("whole_sweep")["precisions"][p]["seconds_for_1000_batches"]  # noqa: E731
        asked.append((f"54,000 measurements, {precision}, s", "at most", limit, whole))
    for name, key, limit in (
        ("loop", "times_faster_than_loop", 100.0),
        ("best composition", "times_faster_than_composed", 5.0),
    ):
        times = lambda k=key: found("sweep")["own"]["bfloat16"][k]  # noqa: E731
        asked.append((f"times faster than the {name}, bfloat16", "at least", limit, times))
    for precision in ("bfloat16", "float32"):
        share = lambda p=precision: found("sweep")["own"][p]["record_share"]  # noqa: E731
        asked.append((f"share of the record in a sweep, {precision}", "at most", 0.1, share))
    in_batch_mode = lambda: found("batch_sweep")["precisions"]["bfloat16"]["seconds_for_1000_batches"]  # noqa: E731
    asked.append(("54,000 measurements, BN mode batch, bfloat16, s", "at most", 15.0, in_batch_mode))
    for precision in ("bfloat16", "float32"):
        share = lambda p=precision: found("batch_sweep")["precisions"][p]["record_share"]  # noqa: E731
        asked.append((f"share of the record, BN mode batch, {precision}", "at most", 0.1, share))
        beside = lambda p=precision: found("running_triton")["precisions"][p]["times_of_cuda"]  # noqa: E731
        asked.append((f"triton's time in times of cuda's, {precision}", "at most", 2.5, beside))
    steps_faster = lambda: found("training_compiled")["times_faster_than_compiled"]  # noqa: E731
    asked.append(("fused training step, times faster than torch.compile", "at least", 1.5, steps_faster))
    deleted = lambda: min(found("deletions")["share_of_eager"].values())  # noqa: E731
    asked.append(("54 deletions, share of 55 eager forward passes", "at most", 0.25, deleted))
    for precision in ("bfloat16", "float32"):
        share = lambda p=precision: found("sums")["precisions"][p]["share"]  # noqa: E731
        asked.append(
            (f"exact sums by length, share of as many modules one by one, {precision}", "at most", 1.3, share)
        )
    for precision, bounds in (("float32", (1e-5, 1e-4)), ("bfloat16", (5e-3, 2e-2))):
        for key, bound in zip(("batch_norm", "sample_norm"), bounds, strict=True):
            worst = lambda p=precision, k=key: max(  # noqa: E731
                row[k] for row in found("accuracy")["rows"] if row["precision"] == p
            )
            asked.append(
                (f"error of a {key.replace('_', ' ')} against float64, {precision}", "at most", bound, worst)
            )
    judged = [_goal(*goal) for goal in asked]
    for own, precision in zip(judged, ("bfloat16", "float32"), strict=False):
        if own["measured"] is not None:
            own["extrapolated"] = not found("whole_sweep")["precisions"][precision]["complete"]
    return judged


def _goal(name: str, sense: str, limit: float, measure: Callable[[], float]) -> dict[str, Any]:
    try:
        measured: float | None = measure()
    except (KeyError, TypeError, ValueError):
        measured = None
    met = None if measured is None else bool(measured <= limit if sense == "at most" else measured >= limit)
    return {"goal": name, "sense": sense, "limit": limit, "measured": measured, "met": met}


def show(results: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{results['device']}[/bold], {results['date']}, commit {results['commit']}")
    if results["rehearsal"]:
        console.print("a rehearsal: its numbers mean nothing")
    console.print(_steps(results["steps"]), _goals(results["goals"]))
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
    table = Table("step", "ended", "seconds", "because", title="Steps")
    for name, step in steps.items():
        table.add_row(name, step["status"], f"{step['seconds']:.1f}", step.get("reason", ""))
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = Table("goal", "asked", "measured", "", title="Goals")
    for own in goals:
        said = {True: "met", False: "not met", None: "not measured"}[own["met"]]
        measured = "" if own["measured"] is None else f"{own['measured']:.3g}"
        measured += " (extrapolated)" if own.get("extrapolated") else ""
        table.add_row(own["goal"], f"{own['sense']} {own['limit']:g}", measured, said)
    return table


def _timings(title: str, timings: dict[str, Any]) -> Table:
    table = Table("", "median, ms", "quartiles, ms", title=title)
    for name, own in timings.items():
        low, high = own["quartiles_s"]
        table.add_row(name, f"{1e3 * own['median_s']:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}")
    return table


def _scaling(rows: list[dict[str, Any]]) -> Table:
    table = Table("varied", "precision", "paths", "batch", "ms", "paths/s", "TFLOP/s", title="Our walks alone")
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
