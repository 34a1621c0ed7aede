"""``python -m benchmarks.adapted [--engine NAME] [--small] [MODEL ...]``: one step of ``pathnet bench`` alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console

from benchmarks.adapted.cases import FULL, NAMES, SMALL
from benchmarks.adapted.memory import growth_alone
from benchmarks.adapted.report import figures, tables
from benchmarks.adapted.step import models
from benchmarks.cpu.budget import Budget
from benchmarks.outcome import Findings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapted")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"among {', '.join(NAMES)}; all by default")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--small", action="store_true", help="rehearse: takes seconds, its numbers mean nothing")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit; 10 by default")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(NAMES):
        parser.error(f"expected models among {', '.join(NAMES)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    sizes, console = SMALL if options.small else FULL, Console(width=130)
    sizes = replace(sizes, cases=tuple(case for case in sizes.cases if case.name in (options.models or NAMES)))
    budget = Budget(60 * options.minutes)

    def show(name: str, findings: Findings) -> None:
        shown = {name: findings}
        console.print(*tables({"models": shown, "figures": figures(shown)}))

    measured = partial(growth_alone, sizes=sizes, engine=options.engine, small=options.small)
    models(sizes, options.engine, budget, lambda subject, share: measured(subject.case.name, budget=share), done=show)
    for cut in budget.cuts:
        console.print(cut, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
