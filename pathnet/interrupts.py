"""Interrupts of the command ``pathnet``, which end it in one line however far it is.

The package installs the handlers before it imports anything that takes long: `torch` and what else the command
needs take seconds, in which an interrupt would print where in them it came.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["STATUS", "end_at_once", "is_command", "raised"]

STATUS = 130
KINDS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""From the keyboard, from whoever stops a job, and from a terminal that closes."""


def is_command() -> bool:
    """Return whether this process is the command: its console script, or ``python -m pathnet``."""
    script = sys.argv[0] if sys.argv else ""
    if script == "-m":
        # While Python looks for the module, its name stands only among the words that Python itself was given.
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "pathnet"
    return os.path.basename(script).removesuffix(".exe") == "pathnet"


def end_at_once() -> None:
    """Let an interrupt end the process in one line from now on; one that is ignored stays so."""
    for kind in KINDS:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Raise KeyboardInterrupt at an interrupt instead, which leaves everything measured on disk."""
    kinds = [kind for kind in KINDS if signal.getsignal(kind) is _end]
    for kind in kinds:
        signal.signal(kind, signal.default_int_handler)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, _end)


def _end(*_: object) -> None:
    # No exception: imports run code that swallows or reports it, and nothing is open yet that must be closed.
    with suppress(OSError):
        os.write(2, b"pathnet: interrupted\n")
    os._exit(STATUS)
