"""The command under torchrun, as the benchmarks of several processes start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.results import ROOT
from pathnet import models

__all__ = ["children", "command", "environment", "stop", "write_weights"]


def write_weights(file: Path, depth: int, width: int) -> None:
    """Save an untrained network for digits."""
    torch.manual_seed(0)
    models.save(models.preact_resnet(depth, width, in_channels=1), file)


def command(words: Sequence[str], processes: int = 1, restarts: int = 0) -> list[str]:
    """Return the command line of ``pathnet`` in one process, or in several under torchrun."""
    if processes == 1:
        return [sys.executable, "-m", "pathnet", *words]
    options = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "pathnet", *words]


def environment(threads: int | None = None) -> dict[str, str]:
    """Return the environment of such a command."""
    number = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONPATH": str(ROOT), **number}


def children(process: int) -> list[int]:
    """Return the processes that a process started and that still run, oldest first."""
    started = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == process and state != "Z":
                    started.append(int(folder.name))
    return sorted(started)


def stop(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started."""
    waiting, family = [process.pid], list[int]()
    while waiting:
        family.append(waiting.pop())
        waiting += children(family[-1])
    for member in reversed(family):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
