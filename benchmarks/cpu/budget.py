"""The time that a run may take, what of it is left, and what was cut to keep within it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from benchmarks.timing import LEAST_ROUNDS, Timing

__all__ = ["Budget", "LeftOut"]

Name = TypeVar("Name")


class LeftOut(Exception):
    """A measurement does not fit into the time that is left: recorded, and no failure."""


class Budget:
    """A number of seconds from now on.

    Attributes:
        seconds: in all.
        step: whose time it is.
        whole: the budget that this is a share of.
        cuts: what was made smaller or left out, one list for all shares of a budget: ``step``, ``what``, ``wanted``,
            ``kept`` (None where it was left out) and ``because``.
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
    def taken(self) -> float:
        """Seconds since it began."""
        return self.clock() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left; below zero where it was not kept."""
        return self.seconds - self.taken

    def share(self, part: float, step: str = "") -> Budget:
        """A part, from 0 to 1, of what is left now."""
        return Budget(self.left * part, self.clock, step or self.step, self.cuts, self.whole)

    def cut(self, what: str, wanted: object, kept: object, because: str) -> None:
        """Records that less is measured than a run without limits would measure."""
        self.cuts.append({"step": self.step, "what": what, "wanted": wanted, "kept": kept, "because": because})

    def require(self, seconds: float, what: str) -> None:
        """
        Raises:
            LeftOut: what takes so long, as far as can be told, does not fit.
        """
        if seconds > self.left:
            raise LeftOut(f"{what} would take some {seconds:.3g} s, and {max(0.0, self.left):.3g} s are left for it")

    def timed(
        self, works: Mapping[Name, Callable[[], object]], rounds: int, what: str = "rounds"
    ) -> dict[Name, Timing]:
        """Times all works in turn, as many rounds of at most ``rounds`` as fit; every second one goes backwards.

        A round before them warms up and tells how long one takes. Where a single round is wanted, that is it: a work
        so long averages by itself. The fewest that are taken are three, of which the median is not moved by one
        disturbance, or ``rounds`` where that is less. Once begun, these may take more than this share, but not more
        than is left of the whole.

        Raises:
            LeftOut: the fewest do not fit, which may show before all works had their turn.
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
            return {name: Timing(own) for name, own in seconds.items()}
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
        return {name: Timing(own) for name, own in seconds.items()}

    def _once(self, work: Callable[[], object]) -> float:
        start = self.clock()
        work()
        return self.clock() - start
