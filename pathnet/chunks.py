"""Work on many routings in chunks, so that neither memory nor the wait for a signal grows with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["CHUNK_BYTES", "Pace", "in_chunks"]

CHUNK_BYTES = 256 << 20

CHUNK_PASSES = 1 << 20
"""Passes of a sample through a block in one chunk on a GPU: reckoned, a tenth of a second on an H100."""

POLL_SECONDS = 1e-3

Done = TypeVar("Done")


class Pace:
    """Keeps a GPU at most two chunks behind the program that asks for them.

    Asking takes no time, and whoever fetches a result waits for all that was asked for before it, deaf to signals. So
    the program waits chunk by chunk, in Python, where Ctrl-C ends it. Native walks on a processor answer signals.

    Args:
        device: that computes.
        passes_each: of a sample through a block, for each item.
    """

    def __init__(self, device: torch.device, passes_each: int) -> None:
        self.device = device
        self.most = max(1, CHUNK_PASSES // max(1, passes_each)) if device.type == "cuda" else None
        self._before: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait for the chunk before the one that was asked for last."""
        if self.device.type != "cuda":
            return
        asked = torch.cuda.current_stream(self.device).record_event()
        while self._before is not None and not self._before.query():  # type: ignore[no-untyped-call]
            time.sleep(POLL_SECONDS)
        self._before = asked


def in_chunks(
    count: int,
    bytes_each: int,
    work: Callable[[slice], Done],
    room: int | None = None,
    pace: Pace | None = None,
) -> Iterator[tuple[slice, Done]]:
    """``work`` of ``count`` items, as many at a time as ``bytes_each`` bytes of each fit into ``room`` bytes, by
    default `CHUNK_BYTES`.

    Where a GPU runs out of memory, the chunk is halved and the work goes on.

    Args:
        pace: of a GPU, which bounds the chunks too.

    Yields:
        Which items, in order, each once; what ``work`` made of them.

    Raises:
        torch.cuda.OutOfMemoryError: there is no room for a single item.
    """
    room = CHUNK_BYTES if room is None else room
    size, start = max(1, room // max(1, bytes_each)), 0
    if pace is not None and pace.most is not None:
        size = min(size, pace.most)
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            done = work(part)
        except torch.cuda.OutOfMemoryError:
            size = (part.stop - part.start) // 2
            if size == 0:
                raise
            continue
        if pace is not None and part.stop < count:
            pace.wait()
        yield part, done
        del done
        start = part.stop
