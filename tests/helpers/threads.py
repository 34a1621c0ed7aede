"""Processes that share the work of a run, as threads with a store of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]

from pathnet.workers import Workers

__all__ = ["together"]


def together(count: int, work: Callable[[Workers], Any]) -> list[Any]:
    """Return what each of several processes returns or raises, by rank."""
    store, outcomes = HashStore(), list[Any]([None] * count)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(Workers(rank, count, rank, count, store))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a process waits for ever"
    return outcomes
