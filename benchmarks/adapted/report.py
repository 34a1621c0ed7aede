"""The findings on the timed models as a table, with their goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from benchmarks.adapted.measuring import PARTS

__all__ = ["GOALS", "RATIOS", "figures", "tables"]

GOALS = {
    "few": ("times faster than fifteen lines, {few} random paths in one call", "at least", 1.3),
    "first": ("the same with the forward pass and all preparation of a new network", "at least", None),
    "many": ("times faster than fifteen lines, {many} random paths in one call", "at least", 1.5),
    "single": ("times faster than fifteen lines, one path a call", "at least", 0.95),
    "loop": ("times faster than the loop, one path a call", "at least", None),
    "sums": ("exact sums by length, share of n (n + 1) / 2 module VJPs", "at most", 1.1),
    "record": ("record, share of a forward pass", "at most", 1.3),
    "memory": ("growth of memory, {many} paths in times of {few}", "at most", 1.25),
    "adapt": ("adapt, seconds", "at most", 3.0),
}
"""Title, sense and goal of each ratio."""

RATIOS = ("few", "many", "single", "sums", "record")
"""The goals that compare times."""

LEAST_GROWTH = 16e6
"""Bytes below which a growth of memory counts as this: what allocators keep, and what a result takes."""


def figures(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each ratio of each model, by wall and by processor seconds.

    On a processor the latter are judged, which on one thread do not count what other programs take.
    """
    judged = []
    for model, findings in models.items():
        few, many = (entry["paths"] for entry in findings["visits"])
        wall, processor = (dict(findings["ratios"][clock]) for clock in ("wall", "processor"))
        # The last, since in a new process the first includes imports.
        wall["adapt"], processor["adapt"] = findings["adapt_s"][-1], findings["adapt_processor_s"][-1]
        if "memory" in findings:
            grown = [max(LEAST_GROWTH, findings["memory"][str(count)]["growth_bytes"]) for count in (few, many)]
            wall["memory"] = grown[1] / grown[0]
        for name, (title, sense, goal) in GOALS.items():
            ratio = processor.get(name, wall.get(name)) if findings["device"] == "cpu" else wall.get(name)
            judged.append(
                {
                    "model": model,
                    "figure": title.format(few=few, many=many),
                    "sense": sense,
                    "goal": goal,
                    "wall": wall.get(name),
                    "processor": processor.get(name),
                    "met": _met(ratio, sense, goal),
                }
            )
    return judged


def _met(ratio: float | None, sense: str, goal: float | None) -> bool | None:
    if ratio is None or goal is None:
        return None
    return ratio >= goal if sense == "at least" else ratio <= goal


def tables(findings: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return the ratios with their goals, and the times behind them: a column for each model."""
    models = findings["models"]
    engines = ", ".join(dict.fromkeys(f"{model['engine']} on {model['device']}" for model in models.values()))
    title = f"Any model, engine {engines}; in brackets by processor seconds, which are judged on a processor"
    ratios = Table("", "goal", *models, title=title)
    rows: dict[str, tuple[str, list[str]]] = {}
    for figure in findings["figures"]:
        goal = "" if figure["goal"] is None else f"{figure['sense']} {figure['goal']:g}"
        rows.setdefault(figure["figure"], (goal, []))[1].append(_cell(figure))
    for name, (goal, cells) in rows.items():
        ratios.add_row(name, goal, *cells)
    times = Table("ms", *models, title="Medians behind them")
    for part, name in dict.fromkeys((part, name) for model in models.values() for part, name in _timed(model)):
        cells = [f"{1e3 * model[part][name]['median_s']:.4g}" if part in model else "" for model in models.values()]
        times.add_row(f"{part}: {name}", *cells)
    cells_of: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "adapt, each time": lambda model: "; ".join(f"{1e3 * seconds:.4g}" for seconds in model["adapt_s"]),
        "blocks, input": lambda model: f"{model['blocks']}, {'x'.join(map(str, model['input']))}",
        "modules visited, of all": _visited,
        "growth of memory, MB (paths)": _growth,
    }
    for name, cell in cells_of.items():
        times.add_row(name, *map(cell, models.values()))
    return ratios, times


def _timed(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(part, name) for part in PARTS for name in model.get(part, {})]


def _visited(model: Mapping[str, Any]) -> str:
    return "; ".join(f"{entry['shared']} of {entry['modules']}" for entry in model["visits"])


def _growth(model: Mapping[str, Any]) -> str:
    grown = model.get("memory", {}).items()
    return "; ".join(f"{entry['growth_bytes'] / 1e6:.1f} ({count})" for count, entry in grown)


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["wall"] is None:
        return ""
    processor = "" if figure["processor"] is None else f" ({figure['processor']:.3g})"
    return f"{figure['wall']:.3g}{processor}" + {True: ", met", False: ", NOT met", None: ""}[figure["met"]]
