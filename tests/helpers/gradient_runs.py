"""A small network, data and plans for runs of path gradients, and measurements of known norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathnet import models, results
from pathnet.data import Data, synthetic
from pathnet.experiments.path_gradients import PathGradients, measure
from pathnet.results import Measurements

__all__ = [
    "BLOCKS",
    "EXACT",
    "PLAN",
    "SAMPLED",
    "SIGNED",
    "as_text",
    "measure_small",
    "measurements_of",
    "small_data",
    "small_net",
]

BLOCKS = 9
"""Number of blocks of `small_net`."""
PLAN = PathGradients(batches=6, batch_size=4)
EXACT = PathGradients(batches=5, batch_size=4, engine="reference", method="exact")
SIGNED = dataclasses.replace(EXACT, method="signed", draws=2)
SAMPLED = dataclasses.replace(EXACT, method="sampled")


def small_net() -> models.ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(20, 4).eval()


def small_data() -> Data:
    return synthetic(images=32, shape=(3, 8, 8))


def measure_small(plan: PathGradients, folder: Path, progress: Any = None) -> results.Run:
    """Measure a plan on `small_net` and `small_data`."""
    return measure(small_net(), small_data(), plan, folder, progress)


def as_text(rows: Sequence[Any]) -> list[str]:
    """Return rows as text that is equal if and only if they are equal bit for bit, NaN included."""
    return list(map(str, rows))


def measurements_of(norms: NDArray[np.float64]) -> Measurements:
    """Return measurements with the norms [batches, n]; NaN where there is none."""
    batch, column = np.nonzero(~np.isnan(norms))
    n = norms.shape[1]
    length = (column + 1).astype(np.int16)
    path = np.tril(np.ones((n, n), np.uint8))[column]
    return Measurements(batch.astype(np.int32), length, path, norms[batch, column], ["cpu"] * len(batch))
