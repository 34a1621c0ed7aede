"""The findings of a run on a processor, as tables: ``python -m benchmarks.cpu.report FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.adapted.report import tables
from benchmarks.cpu.training import report as training
from benchmarks.results import read_cpu

__all__ = ["show"]

GOALS = "Means over all lengths, a path a call; 'one call': one path of each length together, which share tails"
OUTCOMES = {True: "met", False: "not met", None: ""}


def show(results: dict[str, Any], console: Console) -> None:
    """Print a run's results as tables and sentences."""
    facts, findings = results["facts"], results["found"]
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
    if "lengths" in findings:
        console.print(_lengths(findings["lengths"], results["lines_by_length"]))
    if "sharing" in findings:
        console.print(_sharing(findings["sharing"]))
    if "forms" in findings.get("training", {}):
        console.print(training.table(findings["training"]))
    if "models" in findings:
        console.print(*tables(findings["models"]))
    for line in _sentences(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cuts(results: dict[str, Any]) -> list[str]:
    """Return the cuts that kept the budget, one a line; none for old files without a budget."""
    minutes = results.get("budget", {}).get("minutes", 0)
    lines = [f"left out: {name}: {reason}" for name, reason in results.get("left_out", {}).items()]
    for cut in results.get("cuts", []):
        step, change = cut["step"] or "everything", f"{cut['kept']} instead of {cut['wanted']}"
        change = "left out" if cut["kept"] is None else change
        lines.append(f"cut: {step}: {cut['what']}: {change}, since {cut['because']}")
    heading = f"cut to keep within {minutes:g} minutes; goals are judged only at the batches they are for"
    return [heading, *lines] if lines else []


def _figures(figures: list[dict[str, Any]]) -> Table:
    table = Table("", "goal", "backward passes alone", "with the forward pass", "", title=GOALS)
    for figure in figures:
        goal = "" if figure["goal"] is None else f"{figure['sense']} {figure['goal']:g}"
        numbers = ("" if figure[part] is None else f"{figure[part]:.3g}" for part in ("walks", "counted"))
        table.add_row(figure["figure"], goal, *numbers, OUTCOMES[figure["met"]])
    return table


def _lengths(findings: dict[str, Any], lines: dict[str, Any]) -> Table:
    """Return a table of milliseconds by length, and of the straight line through them."""
    lengths = sorted({row["length"] for row in findings["rows"] if row["length"] is not None})
    table = Table("ms", "forward", *map(str, lengths), "R²", title=f"One path by length, batch {findings['batch']}")
    rows: dict[str, dict[int | None, float]] = {}
    for row in findings["rows"]:
        rows.setdefault(f"{row['name']}, {row['bn']}, {row['precision']}", {})[row["length"]] = row["median_s"]
    for name, by_length in rows.items():
        cells = (f"{1e3 * by_length[length]:.4g}" if length in by_length else "" for length in (None, *lengths))
        table.add_row(name, *cells, f"{lines[name]['r_squared']:.4f}")
    return table


def _sharing(findings: dict[str, Any]) -> Table:
    title = f"Paths together and one by one, batch {findings['batch']}, {findings['precision']}"
    table = Table("length", "paths", "times faster together", "modules run, of all", title=title)
    for row in findings["rows"]:
        share = row["modules_walked_once"] / row["modules"]
        table.add_row(str(row["length"]), str(row["paths"]), f"{row['times_faster_together']:.3f}", f"{share:.0%}")
    return table


def _sentences(results: dict[str, Any]) -> list[str]:
    findings = results["found"]
    sentences = [f"failed: {name}: {entry['reason']}" for name, entry in results["failed"].items()]
    for varied in ("paths", "batch"):
        if varied in findings.get("fits", {}):
            line = findings["fits"][varied]["line"]
            sizes = ", ".join(str(row[varied]) for row in findings["fits"][varied]["rows"])
            each = "path" if varied == "paths" else "sample"
            sentences.append(
                f"time against {varied} ({sizes}): {1e3 * line['slope']:.4g} ms a {each}, R² {line['r_squared']:.5f}"
            )
    if "memory" in findings:
        grown = [entry for entry in findings["memory"].values() if isinstance(entry, dict)]
        each = (f"{entry['growth_bytes'] / 1e6:.1f} MB for {entry['paths']} paths" for entry in grown)
        sentences.append(f"growth of the peak of memory: {', '.join(each)}")
    for name, timing in findings.get("training", {}).get("timings", {}).items():  # of older files
        sentences.append(f"seconds a training step, {name}: {timing['median_s']:.3g}")
    if "peak_share" in findings:
        rates = findings["peak_share"]["flops_per_s"].items()
        sentences.append(
            "GFLOP/s (walk: backward pass, operations of direct convolutions; minimal filtering needs fewer): "
            + ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates)
        )
    return sentences


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.cpu.report FILE", file=sys.stderr)
        return 2
    show(read_cpu(Path(sys.argv[1])), Console(width=130))
    return 0


if __name__ == "__main__":
    sys.exit(main())
