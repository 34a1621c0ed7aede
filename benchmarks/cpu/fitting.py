"""Straight lines through timings, and means over lengths of which only some were timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Line", "mean_over_lengths", "modules_walked", "straight_line"]


@dataclass(frozen=True)
class Line:
    """``y = intercept + slope x`` by least squares; R^2 is the share of the variance of y that it explains."""

    slope: float
    intercept: float
    r_squared: float


def straight_line(x: Sequence[float], y: Sequence[float]) -> Line:
    slope, intercept = np.polyfit(x, y, 1)
    left = np.asarray(y) - (intercept + slope * np.asarray(x))
    spread = np.asarray(y) - np.mean(y)
    unexplained = (left @ left) / (spread @ spread) if spread.any() else 0.0
    return Line(float(slope), float(intercept), float(1 - unexplained))


def mean_over_lengths(lengths: Sequence[int], seconds: Sequence[float], n: int) -> float:
    """The mean over all lengths 1 to n, those between two timed ones on the straight line between them."""
    return float(np.interp(np.arange(1, n + 1), lengths, seconds).mean())


def modules_walked(paths: Tensor) -> tuple[int, int]:
    """The residual modules on paths [P, n], and how many of them are left if equal tails are walked once."""
    taken, walked = paths.bool(), 0
    for block in range(paths.shape[1]):
        tails = taken[:, block:].unique(dim=0)
        walked += int(tails[:, 0].sum())
    return int(taken.sum()), walked
