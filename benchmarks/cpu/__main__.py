"""``python -m benchmarks.cpu [--small] [--minutes N] [--out FOLDER] [STEP ...]``; ``pathnet bench`` runs the same."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.cpu.budget import Budget
from benchmarks.cpu.cases import FULL, MINUTES, SMALL
from benchmarks.cpu.report import show
from benchmarks.cpu.run import measure
from benchmarks.cpu.steps import STEPS
from pathnet.printable import printable
from pathnet.progress import reporter


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="Times the cpu engine.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"among {', '.join(STEPS)}; all by default")
    parser.add_argument("--small", action="store_true", help="rehearse: takes seconds, its numbers mean nothing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit of the run; 15 by default")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    for name in options.steps:
        if name not in STEPS:
            parser.error(f"expected steps among {', '.join(STEPS)}, got {name}")
    if not 0 < options.minutes < float("inf"):
        parser.error(f"expected minutes above 0, got {options.minutes}")
    budget = Budget(60 * options.minutes)
    with reporter("benchmarks") as progress:
        run = measure(SMALL if options.small else FULL, options.out, progress, options.steps or STEPS, budget)
    show(run.results, Console(width=130))
    print(printable(run.file))
    return int(run.wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
