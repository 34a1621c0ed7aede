"""The processes that measure one run together: those of ``torchrun``, or a single one.

Measurements are independent of each other, so processes share nothing but a counter, from which each takes the number
of its next unit of work. Counter and messages live in the key-value store of ``torchrun``, which outlives its
processes; no process group is needed. A process that dies costs the unit that it was measuring: whoever waits for it
sees that it is gone, and goes on.

All methods of `Workers` but `Workers.done` are collective: every process makes the same calls in the same order.
"""

from __future__ import annotations

import atexit
import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from pathnet.checks import check_callable, check_integer, described

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["ALONE", "Workers", "torchrun"]

PATIENCE = timedelta(seconds=60)
"""Time that torchrun's store has to answer the first call."""
SHORTEST_WAIT, LONGEST_WAIT = 0.002, 0.1
"""Seconds between two looks at the store, first and at most."""
LONGEST_VALUE = 1 << 22
"""Bytes of a value in the store at most, half of what torch's takes."""
WHAT_REMAINS = "what was measured is kept, and the same command measures the rest"
ERRORS: dict[str, type[ValueError | OSError]] = {"ValueError": ValueError, "OSError": OSError}
"""Errors of the first process that all of them raise, by their names."""


@dataclass(eq=False, repr=False)
class Workers:
    """The processes that share the work of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0. The first one reads the folder, merges parts and shows progress.
        count: number of processes.
        local_rank: number of this process among those of its machine.
        local_count: number of processes on this machine.
        store: the key-value store that all processes share; None for a single process.

    Raises:
        ValueError: a number is out of range, or several processes have no store.

    Example:
        >>> from pathnet.workers import ALONE
        >>> ALONE.count, ALONE.leads, list(ALONE.share_out(3)), ALONE.done
        (1, True, [0, 1, 2], 3)
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    store: Store | None = None
    _calls: int = field(default=0, init=False)
    _done: int = field(default=0, init=False)
    _done_key: str = field(default="done", init=False)

    def __post_init__(self) -> None:
        self.count = check_integer("count", self.count, 1)
        self.rank = check_integer("rank", self.rank, 0, self.count - 1)
        self.local_count = check_integer("local_count", self.local_count, 1, self.count)
        self.local_rank = check_integer("local_rank", self.local_rank, 0, self.local_count - 1)
        if self.store is not None:
            from torch.distributed import Store  # type: ignore[attr-defined]

            if not isinstance(self.store, Store):
                raise ValueError(f"store: expected a torch.distributed.Store, got {described(self.store)}")
        elif self.count > 1:
            raise ValueError(f"store: expected one that {self.count} processes share, got None")

    def __repr__(self) -> str:
        return f"<Process {self.rank} of {self.count}>"

    @property
    def leads(self) -> bool:
        """True in the first process."""
        return self.rank == 0

    def agree(self, decide: Callable[[], Any]) -> Any:
        """Return what the first process decides, in all processes.

        Args:
            decide: called in the first process alone; returns what JSON can hold. Tuples become lists.

        Raises:
            ValueError: ``decide`` raised it, in all processes.
            OSError: ``decide`` raised it, in all processes; or the first process is gone.

        Example:
            >>> from pathnet.workers import ALONE
            >>> ALONE.agree(lambda: [1, 2, 3])
            [1, 2, 3]
        """
        check_callable("decide", decide)
        if self.store is None:
            return json.loads(json.dumps(decide()))
        key = f"{self._next_call()}/agree"
        if self.leads:
            outcome = _outcome(decide)
            self._publish(key, outcome)
        elif self._wait(key, 0):
            outcome = self._published(key)
        else:
            raise OSError(f"workers: the first process is gone; {WHAT_REMAINS}")
        if "error" in outcome:
            error = ERRORS[outcome["error"]](outcome["message"])
            if isinstance(error, OSError):
                error.errno = outcome["errno"]
            raise error
        return json.loads(json.dumps(outcome["value"]))

    def share_out(self, count: int) -> Iterator[int]:
        """Iterate over numbers of units of work, each of which one process alone gets; fast processes get more.

        A unit counts as done when its process asks for the next one.

        Args:
            count: number of units; the numbers are 0 to ``count`` - 1.

        Raises:
            ValueError: ``count`` is no number of units.

        Example:
            >>> from pathnet.workers import ALONE
            >>> [unit**2 for unit in ALONE.share_out(4)]
            [0, 1, 4, 9]
        """
        check_integer("count", count, 0)
        self._done, call = 0, self._next_call()
        self._done_key = f"{call}/done"
        return self._counted(count) if self.store is None else self._drawn(call, count)

    def _counted(self, count: int) -> Iterator[int]:
        for unit in range(count):
            yield unit
            self._done += 1

    def _drawn(self, call: str, count: int) -> Iterator[int]:
        while (unit := self._add(f"{call}/drawn", 1) - 1) < count:
            yield unit
            self._add(self._done_key, 1)

    @property
    def done(self) -> int:
        """Number of units of the latest `share_out` that all processes together have done."""
        return self._done if self.store is None else self._add(self._done_key, 0)

    def gather(self, value: Any, waiting: Callable[[], object] | None = None) -> list[Any]:
        """Return the values of all processes that still run, by rank, in the first process; others do not wait.

        The first process waits for all others, and warns of those that are gone.

        Args:
            value: the value of this process, as JSON can hold it.
            waiting: called now and then in the first process while it waits, to show progress.

        Returns:
            The values in the first process, an empty list in others.

        Raises:
            ValueError: JSON cannot hold the value.

        Example:
            >>> from pathnet.workers import ALONE
            >>> ALONE.gather("part-000000.parquet")
            ['part-000000.parquet']
        """
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"value: expected what JSON can hold, got {described(value)} ({error})") from None
        call = self._next_call()
        if self.store is None:
            return [json.loads(text)]
        self._set(f"{call}/gather/{self.rank}", text)
        if not self.leads:
            return []
        keys = {rank: f"{call}/gather/{rank}" for rank in range(self.count)}
        present = [rank for rank, key in keys.items() if self._wait(key, rank, waiting)]
        if missing := [str(rank) for rank in keys if rank not in present]:
            warnings.warn(
                f"workers: process {', '.join(missing)} of {self.count} is gone; {WHAT_REMAINS}",
                RuntimeWarning,
                stacklevel=2,
            )
        return [json.loads(self._get(keys[rank])) for rank in present]

    def first_to(self, what: str) -> bool:
        """Return whether this process is the first of all to do something; may be called in any order.

        Args:
            what: the name of what is done once.

        Raises:
            ValueError: ``what`` is no string.

        Example:
            >>> from pathnet.workers import ALONE
            >>> ALONE.first_to("greet")
            True
        """
        if not isinstance(what, str):
            raise ValueError(f"what: expected a string, got {described(what)}")
        return self.store is None or self._add(f"once/{what}", 1) == 1

    def _next_call(self) -> str:
        self._calls += 1
        return str(self._calls)

    def _wait(self, key: str, rank: int, waiting: Callable[[], object] | None = None) -> bool:
        """Wait until a process writes a key, and return True; or until it is gone, and return False."""
        pause = SHORTEST_WAIT
        while not self._has(key):
            if self._has(gone(rank)):
                return self._has(key)  # which it may have written just before it ended
            if waiting is not None:
                waiting()
            # A wait within the store could not be interrupted.
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)
        return True

    def _publish(self, key: str, value: Any) -> None:
        """Write a value under a key, in pieces that the store takes."""
        content = zlib.compress(json.dumps(value).encode())
        pieces = range(0, len(content), LONGEST_VALUE)
        for piece, start in enumerate(pieces):
            self._set(f"{key}/{piece}", content[start : start + LONGEST_VALUE])
        self._set(key, str(len(pieces)))

    def _published(self, key: str) -> Any:
        pieces = range(int(self._get(key)))
        return json.loads(zlib.decompress(b"".join(self._get(f"{key}/{piece}") for piece in pieces)))

    def _add(self, key: str, number: int) -> int:
        return int(self._ask(lambda store: store.add(key, number)))

    def _set(self, key: str, value: str | bytes) -> None:
        self._ask(lambda store: store.set(key, value))  # type: ignore[arg-type]

    def _get(self, key: str) -> bytes:
        return bytes(self._ask(lambda store: store.get(key)))

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda store: store.check([key])))

    def _ask(self, question: Callable[[Store], Any]) -> Any:
        assert self.store is not None
        try:
            return question(self.store)
        except RuntimeError:
            raise OSError(f"workers: torchrun has ended; {WHAT_REMAINS}") from None


ALONE = Workers()
"""The single process of a run that nobody shares."""


def check_workers(value: object) -> None:
    """Raise ValueError unless ``value`` is a `Workers`."""
    if not isinstance(value, Workers):
        raise ValueError(f"workers: expected Workers, as pathnet.workers.torchrun returns, got {described(value)}")


def _outcome(decide: Callable[[], Any]) -> dict[str, Any]:
    """Return what ``decide`` returns or raises, as JSON can hold it."""
    try:
        return {"value": decide()}
    except (ValueError, OSError) as error:
        name = "OSError" if isinstance(error, OSError) else "ValueError"
        return {"error": name, "message": str(error), "errno": getattr(error, "errno", None)}


def gone(rank: int) -> str:
    """Return the key that says that a process has ended."""
    return f"gone/{rank}"


def prefix(environment: Mapping[str, str]) -> str:
    """Return the beginning of all keys of the processes that torchrun started together.

    A restarted group must not read what an earlier one wrote: the store may be the same.
    """
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE")
    return "/".join(["pathnet", *(environment.get(name, "") for name in names)])


def shared_store(environment: Mapping[str, str]) -> Store:
    """Return the store of the processes that torchrun started together.

    Raises:
        OSError: torchrun's store does not answer.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    except RuntimeError as error:
        raise OSError(f"workers: the store of torchrun does not answer ({' '.join(str(error).split())})") from None
    return PrefixStore(prefix(environment), store)


def torchrun() -> Workers:
    """Return the processes that ``torchrun`` started together with this one, or `ALONE` without it.

    Raises:
        OSError: torchrun's store does not answer.

    Example:
        >>> from pathnet.workers import torchrun
        >>> torchrun()
        <Process 0 of 1>
    """
    return _torchrun()


@cache
def _torchrun() -> Workers:
    """Join the store once for each process, which numbers its calls."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment or environment["WORLD_SIZE"] == "1":
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, count, local_rank, local_count = (int(environment[name]) for name in names)
    workers = Workers(rank, count, local_rank, local_count, shared_store(environment))
    atexit.register(_leave, workers)
    return workers


def _leave(workers: Workers) -> None:
    """Tell the others that this process ends, so that they do not wait for it."""
    with suppress(OSError):  # torchrun itself has ended
        workers._set(gone(workers.rank), "")
