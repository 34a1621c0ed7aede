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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pathnet.checks import check_callable, check_integer, described

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["ALONE", "Workers", "torchrun"]

SHORTEST_WAIT, LONGEST_WAIT = 0.002, 0.1
"""Seconds between two looks at the store, first and at most."""
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

    def __post_init__(self) -> None:
        check_integer("count", self.count, 1)
        check_integer("rank", self.rank, 0, self.count - 1)
        check_integer("local_count", self.local_count, 1, self.count)
        check_integer("local_rank", self.local_rank, 0, self.local_count - 1)
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
            self.store.set(key, json.dumps(_outcome(decide)))
        elif not self._wait(key, 0):
            raise OSError(
                "workers: the first process is gone; what was measured is kept, the same command measures the rest"
            )
        outcome = json.loads(self.store.get(key))
        if "error" in outcome:
            error = ERRORS[outcome["error"]](outcome["message"])
            if isinstance(error, OSError):
                error.errno = outcome["errno"]
            raise error
        return outcome["value"]

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
        self._done = 0
        call = self._next_call()
        return iter(self._counted(count)) if self.store is None else self._drawn(self.store, call, count)

    def _counted(self, count: int) -> Iterator[int]:
        for unit in range(count):
            yield unit
            self._done += 1

    def _drawn(self, store: Store, call: str, count: int) -> Iterator[int]:
        while (unit := store.add(f"{call}/taken", 1) - 1) < count:
            yield unit
            self._done = store.add(f"{call}/done", 1)
        self._done = store.add(f"{call}/done", 0)

    @property
    def done(self) -> int:
        """Number of units that all processes together had done when this one last asked for its next one."""
        return self._done

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes that still run, by rank, in the first process; others do not wait.

        The first process waits for all others, and warns of those that are gone.

        Args:
            value: the value of this process, as JSON can hold it.

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
        self.store.set(f"{call}/gather/{self.rank}", text)
        if not self.leads:
            return []
        keys = {rank: f"{call}/gather/{rank}" for rank in range(self.count)}
        present = [rank for rank, key in keys.items() if self._wait(key, rank)]
        if gone := [str(rank) for rank in keys if rank not in present]:
            warnings.warn(
                f"workers: process {', '.join(gone)} of {self.count} is gone; the same command measures what it left",
                RuntimeWarning,
                stacklevel=2,
            )
        return [json.loads(self.store.get(keys[rank])) for rank in present]

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
        return self.store is None or self.store.add(f"once/{what}", 1) == 1

    def _next_call(self) -> str:
        self._calls += 1
        return str(self._calls)

    def _wait(self, key: str, rank: int) -> bool:
        """Wait until a process writes a key, and return True; or until it is gone, and return False."""
        assert self.store is not None
        pause = SHORTEST_WAIT
        while not self.store.check([key]):
            if self.store.check([gone(rank)]):
                # It may have written the key just before it ended.
                return bool(self.store.check([key]))
            # A wait within the store could not be interrupted.
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)
        return True


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
    from torch.distributed import DistError, PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://"))
    except DistError as error:
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
    assert workers.store is not None
    try:
        workers.store.set(gone(workers.rank), "")
    except RuntimeError:  # torchrun itself has ended
        return
