"""What a run on a processor found, as tables. ``python -m benchmarks.cpu.report FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.results import read_cpu

__all__ = ["show"]

GOALS = "Means over all lengths, a path a call; 'one call': one path of each length together, which share tails"
SAID = {True: "met", False: "not met", None: ""}


def show(results: dict[str, Any], console: Console) -> None:
    facts, found = results["facts"], results["found"]
    console.print(Text(facts["processor"], "bold"), end="")
    console.print(
        f", {facts['instruction_set']}, {facts['threads']} threads, torch"
        f" {facts['torch']}, {results['date']}, commit {results['commit']}"
    )
    if results["rehearsal"]:
        console.print("a rehearsal: its numbers mean nothing")
    for line in _cuts(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print("this processor has AMX" if facts["amx"] else "this processor has no AMX; the goals are for AMX")
    console.print(_figures(results["figures"]))
    if "lengths" in found:
        console.print(_lengths(found["lengths"], results["lines_by_length"]))
    if "sharing" in found:
        console.print(_sharing(found["sharing"]))
    for line in _sentences(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cuts(results: dict[str, Any]) -> list[str]:
    """Return what was cut to keep the budget, a line each; nothing of files from before there was one."""
    minutes = results.get("budget", {}).get("minutes", 0)
    said = [f"left out: {name}: {reason}" for name, reason in results.get("left_out", {}).items()]
    for cut in results.get("cuts", []):
        step, change = cut["step"] or "everything", f"{cut['kept']} instead of {cut['wanted']}"
        change = "left out" if cut["kept"] is None else change
        said.append(f"cut: {step}: {cut['what']}: {change}, since {cut['because']}")
    heading = f"cut to keep within {minutes:g} minutes; goals are judged only at the batches they are for"
    return [heading, *said] if said else []


def _figures(figures: list[dict[str, Any]]) -> Table:
    table = Table("", "goal", "walks alone", "with the forward pass", "", title=GOALS)
    for own in figures:
        goal = "" if own["goal"] is None else f"{own['sense']} {own['goal']:g}"
        numbers = ("" if own[part] is None else f"{own[part]:.3g}" for part in ("walks", "counted"))
        table.add_row(own["figure"], goal, *numbers, SAID[own["met"]])
    return table


def _lengths(found: dict[str, Any], lines: dict[str, Any]) -> Table:
    """Milliseconds by length, and the straight line through them."""
    lengths = sorted({row["length"] for row in found["rows"] if row["length"] is not None})
    table = Table("ms", "forward", *map(str, lengths), "R²", title=f"One path by length, batch {found['batch']}")
    rows: dict[str, dict[int | None, float]] = {}
    for row in found["rows"]:
        rows.setdefault(f"{row['name']}, {row['bn']}, {row['precision']}", {})[row["length"]] = row["median_s"]
    for name, own in rows.items():
        cells = (f"{1e3 * own[length]:.4g}" if length in own else "" for length in (None, *lengths))
        table.add_row(name, *cells, f"{lines[name]['r_squared']:.4f}")
    return table


def _sharing(found: dict[str, Any]) -> Table:
    title = f"Paths together and one by one, batch {found['batch']}, {found['precision']}"
    table = Table("length", "paths", "times faster together", "modules walked, of all", title=title)
    for row in found["rows"]:
        share = row["modules_walked_once"] / row["modules"]
        table.add_row(str(row["length"]), str(row["paths"]), f"{row['times_faster_together']:.3f}", f"{share:.0%}")
    return table


def _sentences(results: dict[str, Any]) -> list[str]:
    found = results["found"]
    said = [f"failed: {name}: {own['reason']}" for name, own in results["failed"].items()]
    for varied in ("paths", "batch"):
        if varied in found.get("fits", {}):
            line = found["fits"][varied]["line"]
            sizes = ", ".join(str(row[varied]) for row in found["fits"][varied]["rows"])
            each = "path" if varied == "paths" else "sample"
            said.append(
                f"time against {varied} ({sizes}): {1e3 * line['slope']:.4g} ms a {each}, R² {line['r_squared']:.5f}"
            )
    if "memory" in found:
        grown = [own for own in found["memory"].values() if isinstance(own, dict)]
        each = (f"{own['growth_bytes'] / 1e6:.1f} MB for {own['paths']} paths" for own in grown)
        said.append(f"growth of the peak of memory: {', '.join(each)}")
    if "training" in found:
        steps = found["training"]["timings"].items()
        each = ", ".join(f"{name} {timing['median_s']:.3g}" for name, timing in steps)
        said.append(f"seconds a training step, batch {found['training']['batch']}: {each}")
    if "peak_share" in found:
        rates = found["peak_share"]["flops_per_s"].items()
        said.append(
            "GFLOP/s (walks: of the direct convolutions, minimal filtering does fewer): "
            + ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates)
        )
    return said


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.cpu.report FILE", file=sys.stderr)
        return 2
    show(read_cpu(Path(sys.argv[1])), Console(width=130))
    return 0


if __name__ == "__main__":
    sys.exit(main())
