"""The command line under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pathnet

__all__ = ["torchrun", "torchrun_program"]

ROOT = Path(pathnet.__file__).resolve().parent.parent

COMMAND = """
import json, os, signal, sys
import pathnet.commands

sys.argv[1:] = json.loads(os.environ["ARGUMENTS"])
watch = pathnet.commands.watch

def watch_and_arm(arguments):
    watch(arguments)
    if os.environ["RANK"] == os.environ["VICTIM"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        from pathnet import results

        add, calls = results.Run.add, []

        def kill(run, measurements):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            add(run, measurements)

        results.Run.add = kill

pathnet.commands.watch = watch_and_arm
pathnet.commands.main()
"""
"""The command, which SIGKILL ends in one of the processes as it is about to keep its first batch."""


def torchrun(
    folder: Path, *arguments: object, count: int = 2, restarts: int = 0, victim: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in several processes.

    Args:
        folder: where the program of the processes is written.
        arguments: the words of the command line.
        count: number of processes.
        restarts: number of times that torchrun may start them again.
        victim: number of the process to kill.
    """
    program = folder / "pathnet"
    program.write_text(COMMAND)
    environment = {"ARGUMENTS": json.dumps(list(map(str, arguments))), "VICTIM": str(victim)}
    return torchrun_program(program, count, restarts, environment)


def torchrun_program(
    program: Path, count: int = 2, restarts: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes."""
    words = ["--nproc-per-node", str(count), "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, str(program)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
