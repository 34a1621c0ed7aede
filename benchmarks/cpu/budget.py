"""The time limit of a run, and the cuts that keep the run within it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from benchmarks.timing import LEAST_ROUNDS, Timing

__all__ = ["Budget", "LeftOut"]

Name = TypeVar("Name")


class LeftOut(Exception):
    """A measurement does not fit into the remaining time: recorded, and not a failure."""


class Budget:
    """A number of seconds from now on.

    Attributes:
        seconds: total number of seconds.
        step: step that the time belongs to.
        whole: budget that this is a share of.
        cuts: sizes that were reduced or left out, one list for all shares of a budget: ``step``, ``what``,
        ``wanted``,
            ``kept`` (None if left out) and ``because``.
    """

    def __init__(
        self,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
        step: str = "",
        cuts: list[dict[str, Any]] | None = None,
        whole: Budget | None = None,
    ) -> None:
        self.seconds, self.clock, self.step, self.whole = seconds, clock, step, whole or self
        self.cuts: list[dict[str, Any]] = [] if cuts is None else cuts
        self._began = clock()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._began

    @property
    def left(self) -> float:
        """Remaining seconds; negative if the budget was exceeded."""
        return self.seconds - self.spent

    def share(self, part: float, step: str = "") -> Budget:
        """Return a budget of a part, from 0 to 1, of the remaining seconds."""
        return Budget(self.left * part, self.clock, step or self.step, self.cuts, self.whole)

    def cut(self, what: str, wanted: object, kept: object, because: str) -> None:
        """Record that a size is smaller than in a run without limits."""
        self.cuts.append({"step": self.step, "what": what, "wanted": wanted, "kept": kept, "because": because})

    def require(self, seconds: float, what: str) -> None:
        """Check that ``what``, which takes about that many seconds, fits into the remaining time.

        Raises:
            LeftOut: it does not fit.
        """
        if seconds > self.left:
            raise LeftOut(f"{what} would take some {seconds:.3g} s, and {max(0.0, self.left):.3g} s are left for it")

    def timed(
        self, works: Mapping[Name, Callable[[], object]], rounds: int, what: str = "rounds"
    ) -> dict[Name, Timing]:
        """Time all works in turn, in as many rounds of at most ``rounds`` as fit, every second one in reverse order.

        A round before them warms up and predicts the time of one. If a single round is requested, that is the one:
        such long works average by themselves. The minimum is three rounds, whose median withstands one disturbance,
        or ``rounds`` if fewer. Once begun, these may exceed this share, but not the remaining seconds of the whole.

        Raises:
            LeftOut: the minimum does not fit; this may be known before all works had their turn.
        """
        least = min(LEAST_ROUNDS, rounds)
        seconds: dict[Name, list[float]] = {name: [] for name in works}
        began = self.clock()
        for name, work in works.items():
            seconds[name].append(self._once(work))
            if rounds > 1:
                spent = self.clock() - began
                self.require(least * spent, f"{what}: the fewest are {least}, each of them")
        if rounds == 1:
            return {name: Timing(repeats) for name, repeats in seconds.items()}
        slowest = self.clock() - began
        seconds, names, done = {name: [] for name in works}, list(works), 0
        while done < rounds:
            if slowest > (self.whole if done < least else self).left:
                if done < least:
                    raise LeftOut(f"{what}: {done} were taken when the time was over; the fewest are {least}")
                break
            start = self.clock()
            for name in names if done % 2 == 0 else reversed(names):
                seconds[name].append(self._once(works[name]))
            slowest, done = max(slowest, self.clock() - start), done + 1
        if done < rounds:
            self.cut(what, rounds, done, f"one takes some {slowest:.3g} s")
        return {name: Timing(repeats) for name, repeats in seconds.items()}

    def _once(self, work: Callable[[], object]) -> float:
        start = self.clock()
        work()
        return self.clock() - start
