"""The process that torchrun starts, which only watches the one that measures.

torchrun stops all processes when one of them dies. Measurements are independent, so there is no need for that: the
process that torchrun sees starts the command as its child. If the child is killed and torchrun has a restart left,
the watcher ends too, and torchrun starts all processes again. Otherwise it stays, and the others measure on.

The watcher imports no torch, so it takes little memory, unless its child is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pathnet import interrupts
from pathnet.commands.streams import tell

__all__ = ["in_one_process", "share_cores", "watch"]

SEPARATE = ("train",)
"""Commands whose processes cannot do without each other."""
IN_ONE_PROCESS = ("", "demo", "doctor", "bench", "compact", "export")
"""Commands that have nothing to share, and the empty command line."""
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5


def watch(arguments: Sequence[str]) -> None:
    """Return in the process that is to run the command; under torchrun, that may be a child of the one that calls.

    Args:
        arguments: the words of the command line after the program's name.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment or _command(arguments) in SEPARATE:
        return
    if in_one_process(arguments):
        if environment["RANK"] != "0":
            raise SystemExit(0)
        if (count := int(environment["WORLD_SIZE"])) > 1:
            tell(f"pathnet: this command runs in one process; {count - 1} of {count} have nothing to do")
        return
    share_cores(environment)
    # torch would report the end of torchrun with a stack trace, besides the error that it raises.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A signal that comes before there is a handler for it waits.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.KINDS)
    watcher = os.getpid()
    child = os.fork()
    if child == 0:
        _follow(watcher)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return
    forwarded: set[int] = set()

    def forward(number: int, _: object) -> None:
        forwarded.add(number)
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for kind in interrupts.KINDS:
        signal.signal(kind, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if -code in forwarded:  # as its interpreter ended, when it heeded signals no more
        code = interrupts.STATUS
    raise SystemExit(code if code >= 0 else _killed(-code))


def in_one_process(arguments: Sequence[str]) -> bool:
    """Return whether the work of a command line cannot be shared among processes."""
    command = _command(arguments)
    is_drawing = command == "figures" and "--all" not in arguments
    return "--help" in arguments or is_drawing or command in IN_ONE_PROCESS


def share_cores(environment: Mapping[str, str]) -> None:
    """Set the number of threads to this process's share of the cores, unless somebody set one.

    torchrun gives each process one thread if nobody did.
    """
    if environment.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(environment["LOCAL_WORLD_SIZE"])))


def _command(arguments: Sequence[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def _follow(watcher: int) -> None:
    """Let the death of the watcher interrupt this process, which so keeps what it measured."""
    # torchrun signals a whole group of processes; the watcher alone hands signals on, so each comes once.
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != watcher:  # which died before
        os._exit(interrupts.STATUS)


def _killed(number: int) -> int:
    """Return the status of the watcher of a child that a signal killed."""
    environment = os.environ
    name, rank, count = signal.Signals(number).name, environment["RANK"], int(environment["WORLD_SIZE"])
    who = f"pathnet: process {rank} of {count} was killed ({name})"
    # An interrupt from now on ends the watcher, which has nothing to keep.
    interrupts.end_at_once()
    if int(environment["TORCHELASTIC_RESTART_COUNT"]) < int(environment["TORCHELASTIC_MAX_RESTARTS"]):
        tell(f"{who}; torchrun starts all again, and they measure what is missing")
    elif count > 1:
        tell(f"{who}; the others go on, and the same command then measures what it left")
        with suppress(OSError, RuntimeError):  # torchrun has ended
            _await_others(int(rank), count)
    else:
        tell(f"{who}; what was measured is kept, and the same command measures the rest")
    return 128 + number


def _await_others(rank: int, count: int) -> None:
    """Tell the others that this rank is gone, and wait until they are: torchrun stops them once the watcher ends."""
    from pathnet.workers import gone, shared_store

    store = shared_store(os.environ)
    store.set(gone(rank), "")
    keys = [gone(other) for other in range(count) if other != rank]
    while not store.check(keys):
        time.sleep(POLL_SECONDS)
