"""Measurement of candidates for one computation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["fastest"]

TRIALS = 5
ADVANTAGE = 0.95
"""Share of the time of the candidates before it that a candidate must stay below: those before it are simpler."""


def fastest(
    candidates: Sequence[Callable[[], Any]],
    device: torch.device,
    work: Sequence[int] | None = None,
    trials: int = TRIALS,
) -> int:
    """Return the number of the fastest candidate, measured in turns, so that a busy machine slows them all.

    A later one must be faster than `ADVANTAGE` times the best before it.

    Args:
        work: how much each candidate does, by which its time is divided; None where they do the same.
        trials: number of turns.
    """
    times = [float("inf")] * len(candidates)
    amounts = work if work is not None else [1] * len(candidates)
    for candidate in candidates:
        candidate()
    for _ in range(trials):
        for number, (candidate, amount) in enumerate(zip(candidates, amounts, strict=True)):
            times[number] = min(times[number], _seconds(candidate, device) / amount)
    best = 0
    for number, time_of in enumerate(times):
        if time_of < ADVANTAGE * times[best]:
            best = number
    return best


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        # Of this thread, since other processes may hold the processor for a while.
        begin = time.thread_time()
        work()
        return time.thread_time() - begin
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin
