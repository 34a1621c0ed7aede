"""Confidence intervals: one rule for all that are printed and drawn.

A bootstrap of a few batches gives intervals that are much too narrow: half of the resamples of two batches are one
batch twice. So there is no interval for fewer than ten independent values, nor for equal values, which would give a
bar of no width. Where there is no interval, the text gives the number of values.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pathnet.streams import stream

__all__ = [
    "BOOTSTRAP_DRAWS",
    "FEWEST",
    "bootstrap_means",
    "bracketed",
    "interval",
    "no_interval",
    "paired",
    "wilson",
]

FEWEST = 10
"""Independent values (batches, draws of lesions, networks) below which there is no interval and no standard error."""
BOOTSTRAP_DRAWS = 1000
NORMAL_QUANTILE = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
NO_WIDTH = 1e-12
"""Ends that differ by less, relative to the larger, differ by rounding."""

Array = NDArray[np.float64]


def bootstrap_means(values: Array, measured: NDArray[np.bool_] | NDArray[np.int64]) -> Array:
    """Return the means of rows drawn with replacement from the values [batches, n]: [draws, n].

    Measurements on one batch depend on each other, so whole batches are drawn. There are no draws from fewer
    than `FEWEST` batches.

    Args:
        values: [batches, n], 0 where nothing was measured.
        measured: [batches, n], True where something was measured; or the number of measurements that a value is the
            sum of.
    """
    batches = len(values)
    if batches < FEWEST:
        return np.empty((0, values.shape[1]))
    rng = stream(0, "bootstrap")
    means = []
    for _ in range(BOOTSTRAP_DRAWS):
        times = np.bincount(rng.integers(0, batches, batches), minlength=batches).astype(np.float64)
        means.append((times @ values) / (times @ measured))
    return np.array(means)


def interval(draws: Array, count: NDArray[np.int64] | int) -> Array:
    """Return the 2.5 and 97.5 % quantiles of the [draws, n] along the first axis: [2, n]; NaN where there is no
    interval.

    Args:
        count: [n], the number of independent values that each column is the mean of; or one number for all.
    """
    kept = [column[np.isfinite(column)] for column in draws.T]
    ends = np.array([np.quantile(column, (0.025, 0.975)) if len(column) else [np.nan] * 2 for column in kept])
    low, high = ends.reshape(-1, 2).T
    width = NO_WIDTH * np.maximum(np.abs(low), np.abs(high))
    return np.where((np.asarray(count) >= FEWEST) & (high - low > width), [low, high], np.nan)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    rate, squared = successes / trials, NORMAL_QUANTILE**2
    denominator = 2 * (trials + squared)
    centre = (2 * trials * rate + squared) / denominator
    half = NORMAL_QUANTILE / denominator * math.sqrt(4 * trials * rate * (1 - rate) + squared)
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half


def paired(differences: Array, largest: float) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference between networks that answer the same images.

    The interval is Wald's, with one image added at half weight for each extreme, and one for no difference: for two
    networks, that of Agresti and Min (2005). Where no image shows a difference, it reaches about 2 in so many images.

    Args:
        differences: [images], how much more each image counts as an error of one than of the other.
        largest: largest absolute value that a difference can have.
    """
    images = len(differences) + 2
    mean = differences.sum() / images
    variance = (np.square(differences).sum() + largest**2) / images - mean**2
    half = NORMAL_QUANTILE * math.sqrt(variance / images)
    return max(-largest, float(mean - half)), min(largest, float(mean + half))


def no_interval(count: int, what: str = "value") -> str:
    """Return why there is no interval, such as ``no interval: 3 batches``."""
    equal = "" if count < FEWEST else "equal "
    plural = "es" if what.endswith("ch") else "s"
    return f"no interval: {count} {equal}{what}{'' if count == 1 else plural}"


def bracketed(low: float, high: float, count: int, what: str = "batch") -> str:
    """Return a text such as ``95 % interval 0.2 to 0.3``; or why there is no interval."""
    return f"95 % interval {low:.3g} to {high:.3g}" if np.isfinite(low) else no_interval(count, what)
