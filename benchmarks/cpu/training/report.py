"""The forms of the training step as a table in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = ["table"]


def table(findings: dict[str, Any]) -> Table:
    """Return milliseconds of each form and their parts, those with modules drawn, and megabytes."""
    drawn = f"{findings['drawn']} of {findings['modules']} modules"
    title = f"A training step, batch {findings['batch']}; memory: the growth of its process"
    shown = Table("form", "step ms", "forward", "backward", drawn, "memory MB", title=title)
    for row in findings["forms"]:
        seconds = [row["median_s"], row["parts"]["forward_s"], row["parts"]["backward_s"]]
        seconds += [row["drawn"]["median_s"]] if "drawn" in row else []
        cells = [f"{1e3 * each:.4g}" for each in seconds] + ([] if "drawn" in row else [""])
        shown.add_row(row["form"], *cells, f"{row['memory']['bytes'] / 1e6:.4g}" if "memory" in row else "")
    return shown
