"""Programs that a benchmark runs: no process that they started outlives them, whichever ends first and however."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.signals import heed

sys.path.insert(0, str(ROOT))

from benchmarks.processes import execute  # noqa: E402

STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
if sys.argv[1] == "step":
    inner = subprocess.Popen([sys.executable, __file__, "inner", sys.argv[2]], start_new_session=True)
    while len(list(pathlib.Path(sys.argv[2]).iterdir())) < 2:
        time.sleep(0.01)
    print("begun", flush=True)
    if sys.argv[3] == "ends":
        sys.exit(7)
    inner.wait()
else:
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    (pathlib.Path(sys.argv[2]) / str(os.getpid())).touch()
    time.sleep(600)
"""
"""A step whose inner program has a session of its own, a child in another session, and ignores signals."""


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def within(seconds: float, what: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def step(tmp_path: Path) -> tuple[list[str], Path]:
    """Return the command of a stubborn step, and the folder of its inner processes' numbers."""
    program, pids = tmp_path / "step.py", tmp_path / "pids"
    program.write_text(STUBBORN)
    pids.mkdir()
    return [sys.executable, str(program), "step", str(pids)], pids


def inner(pids: Path) -> list[int]:
    return [int(path.name) for path in pids.iterdir()]


def test_a_program_that_outlasts_its_limit_is_stopped_with_all_it_started(step: tuple[list[str], Path]) -> None:
    command, pids = step
    done = execute([*command, "stays"], 5.0)
    assert done.status is None and done.output == "begun\n"
    assert len(inner(pids)) == 2 and not any(map(alive, inner(pids)))


def test_what_a_program_leaves_behind_ends_with_it(step: tuple[list[str], Path]) -> None:
    command, pids = step
    done = execute([*command, "ends"], 60.0)
    assert done.status == 7
    assert len(inner(pids)) == 2 and not any(map(alive, inner(pids)))


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_everything_ends_when_whoever_runs_it_is_killed(kind: signal.Signals, step: tuple[list[str], Path]) -> None:
    command, pids = step
    run = f"from benchmarks.processes import execute; execute({[*command, 'stays']}, 600.0)"
    top = subprocess.Popen(
        [sys.executable, "-c", run], cwd=ROOT, stderr=subprocess.DEVNULL, preexec_fn=heed, process_group=0
    )
    try:
        assert within(60, lambda: len(inner(pids)) == 2)
        os.kill(top.pid, kind)
        assert top.wait(30) != 0
        assert within(30, lambda: not any(map(alive, inner(pids))))
    finally:
        top.kill()
        for pid in filter(alive, inner(pids)):
            os.kill(pid, signal.SIGKILL)


def test_the_status_and_the_output_are_the_programs() -> None:
    assert execute([sys.executable, "-c", "print('said'); raise SystemExit(3)"], 60.0).status == 3
    killed = execute([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], 60.0)
    assert killed.status == -11
    done = execute([sys.executable, "-c", "import os; print(os.environ['TOLD'])"], 60.0, {"TOLD": "so"})
    assert (done.status, done.output) == (0, "so\n")
