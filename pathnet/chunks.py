"""Work on many routings in chunks, so neither memory nor the delay of signals grows with their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "Pace", "in_chunks"]

CHUNK_BYTES = 256 << 20
"""Bytes of memory for the results of one chunk."""

CHUNK_PASSES = 1 << 20
"""Passes of a sample through a block in one chunk on a GPU: a tenth of a second on an H100, by calculation."""

POLL_SECONDS = 1e-3

Sliceable = TypeVar("Sliceable", range, Tensor)
Result = TypeVar("Result")


class Pace:
    """Brake that lets the program launch at most two chunks ahead of the GPU that computes them.

    A launch takes no time, but the fetch of a result waits for all launches before it and does not answer signals. So
    the program waits chunk by chunk, in Python, where Ctrl-C ends it. Native ops on a CPU answer signals themselves.

    Args:
        device: the device that computes.
        passes_each: number of passes of a sample through a block that each item takes.

    Attributes:
        most: maximum number of items in a chunk; None for no maximum.
    """

    def __init__(self, device: torch.device, passes_each: int) -> None:
        self.device = device
        self.most = max(1, CHUNK_PASSES // max(1, passes_each)) if device.type == "cuda" else None
        self._before: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait for the chunk before the one that was launched last."""
        if self.device.type != "cuda":
            return
        launched = torch.cuda.current_stream(self.device).record_event()
        while self._before is not None and not self._before.query():  # type: ignore[no-untyped-call]
            time.sleep(POLL_SECONDS)
        self._before = launched


def in_chunks(
    items: Sliceable,
    bytes_each: int,
    work: Callable[[Sliceable], Result],
    room: int | None = None,
    most: int | None = None,
    pace: Pace | None = None,
) -> Iterator[tuple[slice, Result]]:
    """Call ``work`` on one chunk of the items after the other.

    A chunk has as many items as fit into ``room`` bytes, but never more than ``most``. Where a GPU runs out of
    memory, the chunk is halved and the work continues.

    Args:
        items: what is sliced: a range, or a tensor along its first dimension.
        bytes_each: bytes of memory that an item takes.
        room: bytes of memory for a chunk, by default `CHUNK_BYTES`.
        most: maximum number of items in a chunk; None for no maximum.
        pace: the pace of a GPU, which bounds the chunks too.

    Yields:
        The chunk's place among the items, in order, and the result of ``work``.

    Raises:
        torch.cuda.OutOfMemoryError: there is no room for a single item.
    """
    room = CHUNK_BYTES if room is None else room
    size, start, count = max(1, room // max(1, bytes_each)), 0, len(items)
    for bound in (most, None if pace is None else pace.most):
        size = size if bound is None else min(size, bound)
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            result = work(items[part])
        except torch.cuda.OutOfMemoryError:
            size = (part.stop - part.start) // 2
            if size == 0:
                raise
            continue
        if pace is not None and part.stop < count:
            pace.wait()
        yield part, result
        del result
        start = part.stop
