"""Straight lines through timings, and means over all lengths from the timed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Line", "mean_over_lengths", "modules_walked", "straight_line"]


@dataclass(frozen=True)
class Line:
    """The line ``y = intercept + slope x`` by least squares; R^2 is the share of the variance of y that it
    explains."""

    slope: float
    intercept: float
    r_squared: float


def straight_line(x: Sequence[float], y: Sequence[float]) -> Line:
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - (intercept + slope * np.asarray(x))
    spread = np.asarray(y) - np.mean(y)
    unexplained = (residuals @ residuals) / (spread @ spread) if spread.any() else 0.0
    return Line(float(slope), float(intercept), float(1 - unexplained))


def mean_over_lengths(lengths: Sequence[int], seconds: Sequence[float], n: int) -> float:
    """Return the mean over all lengths 1 to n, interpolated linearly between timed lengths."""
    return float(np.interp(np.arange(1, n + 1), lengths, seconds).mean())


def modules_walked(paths: Tensor) -> tuple[int, int]:
    """Return the number of residual modules on paths [P, n], and their number if equal tails are shared."""
    active, shared = paths.bool(), 0
    for block in range(paths.shape[1]):
        tails = active[:, block:].unique(dim=0)
        shared += int(tails[:, 0].sum())
    return int(active.sum()), shared
