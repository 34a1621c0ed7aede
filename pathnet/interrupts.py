"""Interrupts of the command ``pathnet``, which end it in one line at any time.

The package installs the handlers before it imports anything that takes long: `torch` and the rest take seconds, and
an interrupt in the midst of them would print a traceback.
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
"""Signals of Ctrl-C, of a request to terminate, and of a terminal that closes."""


def is_command() -> bool:
    """Return whether this process is the command: its console script, or ``python -m pathnet``."""
    script = sys.argv[0] if sys.argv else ""
    if script == "-m":
        # While Python looks for the module, only the interpreter's own arguments hold its name.
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "pathnet"
    return os.path.basename(script).removesuffix(".exe") == "pathnet"


def end_at_once() -> None:
    """Let every interrupt end the process in one line from now on; an ignored signal stays ignored."""
    for kind in KINDS:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Let an interrupt raise KeyboardInterrupt instead, so that measurements are still written to disk."""
    kinds = [kind for kind in KINDS if signal.getsignal(kind) is _end]
    for kind in kinds:
        signal.signal(kind, signal.default_int_handler)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, _end)


def _end(*_: object) -> None:
    # Not an exception: imported code may swallow or report one, and nothing is open yet that must be closed.
    with suppress(OSError):
        os.write(2, b"pathnet: interrupted\n")
    os._exit(STATUS)
