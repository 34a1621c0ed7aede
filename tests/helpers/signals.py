"""Signals as a terminal would deliver them, however the tests were started."""

from __future__ import annotations

import signal

from pathnet.interrupts import KINDS

__all__ = ["heed"]


def heed() -> None:
    """Let interrupts, terminations and hang-ups have their usual effect on this process.

    Tests that run in the background of a script, or under nohup, have some of them ignored, and hand that on to the
    programs that they start (``preexec_fn=heed``).
    """
    for kind in KINDS:
        signal.signal(kind, signal.default_int_handler if kind is signal.SIGINT else signal.SIG_DFL)
