"""Comparable timings: warmed up, interleaved, ended by a synchronization, with medians and quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.cases import Setup

__all__ = ["Timing", "interleaved"]

LEAST_ROUNDS = 3
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def facts(self) -> dict[str, object]:
        low, median, high = np.quantile(self.seconds, [0.25, 0.5, 0.75]).tolist()
        return {"median_s": median, "quartiles_s": [low, high], "rounds": len(self.seconds)}


def interleaved(
    setup: Setup, candidates: Mapping[str, Callable[[], object]], rounds: int | None = None, warm_up: int = WARM_UP
) -> dict[str, Timing]:
    """Time all candidates in turn, round after round, so that a drift of the clock affects all of them alike.

    Every second round runs in reverse order. Rounds stop early, though not before the third, after the setup's
    seconds.
    """
    for work in candidates.values():
        for _ in range(warm_up):
            work()
    setup.synchronize()
    names, seconds = list(candidates), {name: list[float]() for name in candidates}
    began = time.perf_counter()
    for round_ in range(rounds or setup.rounds):
        if round_ >= LEAST_ROUNDS and time.perf_counter() - began > setup.seconds:
            break
        for name in names if round_ % 2 == 0 else reversed(names):
            setup.synchronize()
            start = time.perf_counter()
            candidates[name]()
            setup.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(repeats) for name, repeats in seconds.items()}
