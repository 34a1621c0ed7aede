"""Measurements in a process of their own, started from a step."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import torch

from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.outcome import Failed, Findings
from benchmarks.processes import execute

__all__ = ["measured_alone"]

ALONE_S = 300.0


def measured_alone(
    budget: Budget, module: str, *arguments: str, small: bool, environment: Mapping[str, str] | None = None
) -> Findings:
    """Return the findings that a module prints, run as a program on as many threads as this process.

    Args:
        budget: its remaining time, at most five minutes, is the limit of the process.
        module: takes ``--threads``, ``--seconds`` and ``--small``, and prints one line of JSON at its end.
        small: whether the process measures the sizes of the rehearsal.

    Raises:
        LeftOut: there is no time, or the process took longer than the remaining time.
        Failed: the process ended with an error.
    """
    limit = min(ALONE_S, budget.left)
    if limit <= 0:
        raise LeftOut("no time is left for it")
    process = [f"--threads={torch.get_num_threads()}", f"--seconds={limit}", *(["--small"] if small else [])]
    start = budget.clock()
    done = execute([sys.executable, "-m", module, *arguments, *process], limit, environment)
    if done.status is None and limit < ALONE_S:
        raise LeftOut(f"the process {arguments[0]} was stopped after {limit:.3g} s")
    if done.status != 0:
        ended = "was stopped" if done.status is None else f"ended with status {done.status}"
        raise Failed(f"the process {' '.join(arguments)} {ended}", {"output": done.tail})
    return {**json.loads(done.output.splitlines()[-1]), "process_s": budget.clock() - start}
