"""Programs that end together with all processes that they started, so that none is left to disturb the next timing.

`execute` starts a program below a supervisor, which is this file run as a program. A process below the supervisor
that loses its parent becomes its child (Linux's "child subreaper"), even in a session of its own. The supervisor
holds a pipe from the caller of `execute`: once the caller closes it, or is killed, the supervisor kills all processes
below it and ends. It imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import ROOT

__all__ = ["Done", "execute"]

TAIL = 3000

PR_SET_CHILD_SUBREAPER = 36

ENDING_S = 20.0
"""Seconds that the supervisor waits for killed processes to be gone; a driver may hold one for seconds."""


@dataclass(frozen=True)
class Done:
    """The end of a program: its status, None if it was stopped at its time limit, and its output."""

    status: int | None
    output: str

    @property
    def tail(self) -> str:
        return self.output[-TAIL:]


def execute(command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Done:
    """Run a program in the repository's root, for ``limit_s`` seconds at most.

    When this returns or raises, or when its process dies, the program and all processes that it started are gone.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.processes", *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            # So that an interrupt from the terminal does not end the supervisor before its children.
            start_new_session=True,
        )
        assert supervisor.stdin is not None
        try:
            status: int | None = supervisor.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            supervisor.stdin.close()
            supervisor.wait()
        output.seek(0)
        return Done(status, output.read())


def supervise(command: Sequence[str]) -> int:
    """Run a program until it or the pipe on standard input ends; kill what is left; return the program's status."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this system lets no process adopt its orphans")
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(child.pid)
    select.select([ended, sys.stdin.fileno()], [], [])
    status = child.poll()
    _end_descendants()
    return signal.SIGKILL if status is None else status


def _end_descendants() -> None:
    """Kill all processes below this one, including those that they start meanwhile."""
    until = time.monotonic() + ENDING_S
    while (below := list(_descendants())) and time.monotonic() < until:
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.01)


def _descendants() -> Iterator[int]:
    """Yield the processes that are below this one now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The state and the parent come after the name, which may hold any character.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        waiting += below
        yield from below


def main() -> int:
    status = supervise(sys.argv[1:])
    if status < 0:
        # End by the same signal as the program, without a core dump.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
