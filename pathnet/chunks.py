"""Work on many routings in chunks, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["CHUNK_BYTES", "in_chunks"]

CHUNK_BYTES = 256 << 20

Done = TypeVar("Done")


def in_chunks(
    count: int, bytes_each: int, work: Callable[[slice], Done], room: int | None = None
) -> Iterator[tuple[slice, Done]]:
    """``work`` of ``count`` items, as many at a time as ``bytes_each`` bytes of each fit into ``room`` bytes, by
    default `CHUNK_BYTES`.

    Where a GPU runs out of memory, the chunk is halved and the work goes on.

    Yields:
        Which items, in order, each once; what ``work`` made of them.

    Raises:
        torch.cuda.OutOfMemoryError: there is no room for a single item.
    """
    room = CHUNK_BYTES if room is None else room
    size, start = max(1, room // max(1, bytes_each)), 0
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            done = work(part)
        except torch.cuda.OutOfMemoryError:
            size = (part.stop - part.start) // 2
            if size == 0:
                raise
            continue
        yield part, done
        del done
        start = part.stop
