"""Times of competitors in one run: rounds that go through all of them, so that a noisy moment hits each alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

__all__ = ["Timing", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def interleaved(
    competitors: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, Timing]:
    """Calls every competitor once a round, after a warm-up, and waits for the device after each."""
    for call in competitors.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, call in competitors.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return Timing(median, lower, upper, len(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
