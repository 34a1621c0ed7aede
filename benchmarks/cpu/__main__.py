"""``python -m benchmarks.cpu [--small] [--out FOLDER] [STEP ...]``; ``pathnet bench`` runs the same."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.cpu.cases import FULL, SMALL
from benchmarks.cpu.report import show
from benchmarks.cpu.run import measure
from benchmarks.cpu.steps import STEPS
from pathnet.progress import reporter


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="Times the cpu engine.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"among {', '.join(STEPS)}; all by default")
    parser.add_argument("--small", action="store_true", help="the rehearsal: seconds, and numbers without meaning")
    parser.add_argument("--out", type=Path, help="where the results go")
    asked = parser.parse_args()
    for name in asked.steps:
        if name not in STEPS:
            parser.error(f"expected steps among {', '.join(STEPS)}, got {name}")
    with reporter("benchmarks") as progress:
        run = measure(SMALL if asked.small else FULL, asked.out, progress, asked.steps or STEPS)
    show(run.results, Console(width=130))
    print(run.file)
    return int(run.wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
