"""The findings on the timed models as a table, with their goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

__all__ = ["GOALS", "figures", "table"]

GOALS = {
    "few": ("times faster than fifteen lines, {few} random paths in one call", "at least", 1.3),
    "many": ("times faster than fifteen lines, {many} random paths in one call", "at least", 1.5),
    "single": ("times faster than fifteen lines, one path a call", "at least", 0.95),
    "single, loop": ("times faster than the loop, one path a call", "at least", None),
    "sums": ("exact sums by length, share of n (n + 1) / 2 module VJPs", "at most", 1.1),
    "record": ("record, share of a forward pass", "at most", 1.3),
    "adapt": ("adapt, seconds, the first model with the imports", "at most", 3.0),
}
"""Title, sense and goal of each ratio."""


def figures(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each ratio of each model, by wall and by processor seconds, judged by the wall's."""
    judged = []
    for model, findings in models.items():
        few, many = (entry["paths"] for entry in findings["visits"])
        wall, processor = (dict(findings["ratios"][clock]) for clock in ("wall", "processor"))
        wall["adapt"] = findings["adapt_s"][0]
        for name, (title, sense, goal) in GOALS.items():
            ratio = wall.get(name)
            met = None
            if ratio is not None and goal is not None:
                met = ratio >= goal if sense == "at least" else ratio <= goal
            judged.append(
                {
                    "model": model,
                    "figure": title.format(few=few, many=many),
                    "sense": sense,
                    "goal": goal,
                    "wall": ratio,
                    "processor": processor.get(name),
                    "met": met,
                }
            )
    return judged


def table(models: Mapping[str, Any]) -> Table:
    """Return the ratios, a row each, a column for each model; processor seconds in brackets where they differ."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for figure in figures(models):
        goal = "" if figure["goal"] is None else f"{figure['sense']} {figure['goal']:g}"
        rows.setdefault(figure["figure"], (goal, []))[1].append(_cell(figure))
    engines = " / ".join(dict.fromkeys(findings["engine"] for findings in models.values()))
    result = Table("", "goal", *models, title=f"Any model (engine {engines}), one thread; by processor seconds in brackets")
    for title, (goal, cells) in rows.items():
        result.add_row(title, goal, *cells)
    return result


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["wall"] is None:
        return ""
    number = f"{figure['wall']:.3g}"
    if figure["processor"] is not None:
        number += f" ({figure['processor']:.3g})"
    return number + {True: " met", False: " NOT met", None: ""}[figure["met"]]
