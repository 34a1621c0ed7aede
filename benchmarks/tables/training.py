"""The table of the training step, from a file of `benchmarks.cpu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cpu.training.goals import PRECISIONS, goals
from benchmarks.tables.markdown import file_names, listed, number, percent, table
from benchmarks.tables.processors import sentence

__all__ = ["PRECISIONS", "TABLES", "times_faster", "times_training"]

Results = dict[str, Any]


def times_training(results: Results) -> bool:
    """Return whether a file times all forms of the training step; older files time one, with modules drawn."""
    return "conclusions" in results["found"].get("training", {})


def times_faster(results: Results, precision: str) -> str:
    """Return how many times as fast as the best of PyTorch a step is."""
    return number(results["found"]["training"]["conclusions"].get(precision, {}).get("times_faster"))


def training(files: Mapping[str, Results]) -> str:
    """Return the times and the memory of all forms of a step, and what follows from them, from one file."""
    ((file, results),) = files.items()
    findings = results["found"]["training"]
    header = [
        "form",
        "step",
        "forward",
        "backward",
        f"{findings['drawn']} of {findings['modules']} modules drawn",
        "memory",
    ]
    rows = [[row["form"], *_milliseconds(row), _memory(row)] for row in findings["forms"]]
    place = f"{sentence(results)}, {findings['modules']} blocks, batch {findings['batch']} ({file_names([file])}):"
    cuts = [f"{cut['what']}, since {cut['because']}" for cut in results["cuts"] if cut["kept"] is None]
    left_out = [f"Left out: {'; '.join(cuts)}."] if cuts else []
    parts = [place, table(header, rows), _figures(results), _bounds(findings), _draws(findings), *left_out]
    return "\n\n".join(parts)


def _milliseconds(row: Mapping[str, Any]) -> list[str]:
    seconds = [row["median_s"], row["parts"]["forward_s"], row["parts"]["backward_s"]]
    seconds += [row["drawn"]["median_s"]] if "drawn" in row else []
    cells = [f"{number(1e3 * each)} ms" for each in seconds]
    return cells if "drawn" in row else [*cells, ""]


def _memory(row: Mapping[str, Any]) -> str:
    return f"{number(row['memory']['bytes'] / 1e6)} MB" if "memory" in row else ""


def _figures(results: Results) -> str:
    """Return a table of the figures that have goals, of PyTorch's best forms, and of the errors."""
    findings = results["found"]["training"]
    recorded = {entry["figure"]: entry for entry in results["figures"]}
    rows: dict[str, list[str]] = {}
    for goal in goals(findings):
        value, met = goal.value, recorded[goal.title]["met"]
        limit = f" (goal: {goal.sense} {goal.limit:g}{', **not** met' if met is False else ''})" if goal.limit else ""
        rows.setdefault(goal.name, []).append("not measured" if value is None else number(value) + limit)
    best = [findings["conclusions"].get(precision, {}) for precision in PRECISIONS]
    rows["PyTorch's best form"] = [entry.get("best", "not measured") for entry in best]
    rows["PyTorch's form of the least memory"] = [entry.get("least_memory", "not measured") for entry in best]
    ours = {row["precision"]: row["median_s"] for row in findings["forms"] if row["by"] == "pathnet"}
    rates = [findings["bounds"]["operations"] / ours[name] if name in ours else None for name in PRECISIONS]
    rows["GFLOP/s of direct convolutions"] = [number(rate and rate / 1e9) for rate in rates]
    errors = findings["error"]
    rows["largest relative error of a gradient, small network"] = [
        number(errors["pathnet, float32"], 2),
        f"{number(errors['pathnet, bfloat16'], 2)} (autocast: {number(errors['torch, bfloat16'], 2)})",
    ]
    return table(["", *PRECISIONS], [[name, *cells] for name, cells in rows.items()])


def _bounds(findings: Mapping[str, Any]) -> str:
    """Return the operations and bytes of a step, and the time that each would take by itself, as a sentence."""
    bounds = findings["bounds"]
    operations, traffic = bounds["operations"], bounds["bytes"]
    peak, rate = bounds["peak_flops_per_s"], bounds["copied_bytes_per_s"]
    fused = "" if peak is None else f" ({number(1e3 * operations / peak)} ms at the measured peak of multiply-adds)"
    return (
        f"A step has {number(operations / 1e9)} GFLOP in direct convolutions{fused}; fused blocks move "
        f"{number(traffic / 1e9)} GB in float32 ({number(1e3 * traffic / rate)} ms at the measured rate of a copy), "
        "and half as much in bfloat16."
    )


def _draws(findings: Mapping[str, Any]) -> str:
    """Return every draw's time as a share of the whole step, as sentences."""
    draws = []
    for row in findings["forms"]:
        if "drawn" in row:
            shares = [percent(seconds / row["median_s"], 2) for seconds in row["drawn"]["seconds"]]
            draws.append(f"{row['form']}: {listed(shares)}")
    return f"Every draw of {findings['drawn']} modules, share of the form's step: {'; '.join(draws)}."


TABLES = {"training": training}
"""Tables by name."""
