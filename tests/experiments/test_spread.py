"""Means, their intervals, and how texts and figures say that there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pathnet.experiments.errors import Spread, spread
from pathnet.figures import style
from pathnet.figures.lesions import band


def test_the_interval_of_a_mean_is_that_of_all_resamples() -> None:
    """Eight of ten values are 0 and two are 1, so the mean of a resample is binomial. A thousand draws come close to
    its quantiles."""
    values = [0.0] * 8 + [1.0] * 2
    estimate = spread(values)
    assert estimate.mean == pytest.approx(0.2) and estimate.count == 10
    low, high = stats.binom(10, 0.2).ppf((0.025, 0.975)) / 10
    assert estimate.low == pytest.approx(low, abs=0.1) and estimate.high == pytest.approx(high, abs=0.1)
    assert spread(values) == estimate
    normal = np.random.default_rng(0).normal(5, 2, 400)
    half = 1.96 * normal.std() / 20
    assert (spread(normal).low, spread(normal).high) == pytest.approx(
        (normal.mean() - half, normal.mean() + half), abs=0.1 * half
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.25], "25 % (no interval: 1 value)"),
        ([0.1, 0.2], "15 % (no interval: 2 values)"),
        (list(np.linspace(0, 1, 9)), "50 % (no interval: 9 values)"),
        ([0.5] * 3, "50 % (no interval: 3 values)"),
        ([0.9] * 40, "90 % (no interval: 40 equal values)"),
    ],
    ids=lambda value: str(len(value)),
)
def test_few_values_or_equal_ones_have_no_interval_and_the_text_says_so(values: list[float], text: str) -> None:
    estimate = spread(values)
    assert math.isnan(estimate.low) and math.isnan(estimate.high) and str(estimate) == text


def test_an_interval_is_told_in_per_cent() -> None:
    assert str(Spread(0.123, 0.1, 0.1464, 20)) == "12.3 % (10 to 14.6)"


@pytest.mark.parametrize("batches", [1, 2, 9])
def test_figures_of_few_batches_have_no_band_and_the_legend_says_why(batches: int) -> None:
    _, (axes,) = style.panels("", 1)
    band(axes, np.arange(3), [spread(np.linspace(0.1, 0.9, batches))] * 3)
    ((handle,), (label,)) = axes.get_legend_handles_labels()
    assert label == f"no interval: {batches} value{'s' if batches > 1 else ''}"
    assert not any(np.isfinite(path.vertices).any() for path in handle.get_paths())
