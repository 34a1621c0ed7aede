"""The peak of memory against the number of paths, on one model in a process of its own. Prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.adapted.cases import FULL, NAMES, SMALL, Sizes
from benchmarks.adapted.subject import Subject
from benchmarks.cpu.alone import forget_peak, peak_bytes
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.outcome import Failed, Findings
from benchmarks.processes import execute

__all__ = ["growth", "growth_alone"]


def growth(subject: Subject, counts: tuple[int, ...]) -> dict[str, Findings]:
    """Return by number of paths, in increasing order, how much the peak of memory exceeds that of the tape alone."""
    entries: dict[str, Findings] = {}
    # Against one baseline, since memory that a smaller number of paths freed may stay with the process.
    baseline = _peak(subject, lambda: None)
    for count in counts:
        paths, start = subject.paths(count), time.perf_counter()
        peak = _peak(subject, partial(subject.tape.path_gradient_norms, paths))
        entries[str(count)] = {"growth_bytes": peak - baseline, "seconds": time.perf_counter() - start}
    return entries


def _peak(subject: Subject, work: Callable[[], object]) -> int:
    """Return the peak of memory, in bytes, from the beginning of a work to its end."""
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
        work()
        subject.synchronize()
        return torch.cuda.max_memory_allocated(subject.device)
    forget_peak()
    work()
    return peak_bytes()


def growth_alone(name: str, sizes: Sizes, engine: str, small: bool, budget: Budget) -> dict[str, Findings]:
    """Return `growth` of the model of that name in a process of its own, where no other work has left memory behind.

    Args:
        small: whether the model is that of the rehearsal.

    Raises:
        LeftOut: the process was stopped, since the time is over.
        Failed: it ended with an error.
    """
    limit = budget.left
    budget.require(0.0, "a process")
    arguments = [name, f"--engine={engine}", "--counts", *map(str, (1, *sizes.paths))]
    done = execute(
        [sys.executable, "-m", "benchmarks.adapted.memory", *arguments, *(["--small"] if small else [])], limit
    )
    if done.status is None:
        raise LeftOut(f"its process was stopped after {limit:.3g} s")
    if done.status != 0:
        raise Failed(
            f"the process that measures memory on {name} ended with status {done.status}", {"output": done.tail}
        )
    entries: dict[str, Findings] = json.loads(done.output.splitlines()[-1])
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapted.memory", description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--counts", type=int, nargs="+", required=True, help="numbers of paths, in increasing order")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (case,) = (case for case in (SMALL if options.small else FULL).cases if case.name == options.model)
    subject = Subject(case, options.engine, adaptations=1)
    # Sizes that the engine measures once, and its first buffers, belong to no number of paths.
    subject.tape.path_gradient_norms(subject.paths(1))
    print(json.dumps(growth(subject, tuple(options.counts))))


if __name__ == "__main__":
    main()
