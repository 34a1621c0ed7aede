"""``python -m benchmarks.adapted [--engine NAME] [--small] [MODEL ...]``: the step of ``pathnet bench`` alone."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from benchmarks.adapted.cases import FULL, SMALL
from benchmarks.adapted.measuring import Sizes, measure
from benchmarks.adapted.report import table
from benchmarks.adapted.subject import Subject
from benchmarks.cpu.budget import Budget


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapted")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"among {', '.join(case.name for case in FULL)}")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--small", action="store_true", help="rehearse: takes seconds, its numbers mean nothing")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes((6, 20), 4, 2, 2) if options.small else Sizes((100, 1000), 20, 5, 3)
    cases = [case for case in (SMALL if options.small else FULL) if case.name in options.models or not options.models]
    budget, models = Budget(60 * options.minutes), {}
    for position, case in enumerate(cases):
        subject = Subject(case, options.engine)
        checked = subject.check()
        findings = measure(subject, sizes, budget.share(1 / (len(cases) - position)))
        models[case.name] = {"check": checked, **findings}
        for part in ("few", "single", "sums", "record", "many"):
            for name, facts in findings.get(part, {}).items():
                print(f"{case.name:14} {part:7} {name:22} {1e3 * facts['median_s']:9.1f} ms wall"
                      f" {1e3 * facts['median_processor_s']:9.1f} ms processor", flush=True)
        print(case.name, findings["visits"], f"tape {findings['tape_bytes'] / 1e6:.1f} MB", flush=True)
    Console(width=130).print(table(models))
    for cut in budget.cuts:
        print(cut)
    return 0


if __name__ == "__main__":
    sys.exit(main())
