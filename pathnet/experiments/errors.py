"""Test errors of lesioned networks as rows of a run: each measured once, and looked up by what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathnet import lesion, results
from pathnet.data import Data
from pathnet.experiments.run import Networks, Plan
from pathnet.intervals import bootstrap_means, interval, no_interval
from pathnet.lesion import BatchNormPolicy, Lesion
from pathnet.results import Range
from pathnet.training import Progress

__all__ = ["INTACT", "Drawn", "ErrorCount", "ErrorCounts", "Spread", "measure_errors", "spread"]

TOGETHER = 32

Array = NDArray[np.float64]


class Drawn(NamedTuple):
    """A lesion to be measured.

    Attributes:
        size: how many blocks are deleted, or pairs swapped.
        draw: number of the random draw of this size, from 0.
    """

    size: int
    draw: int
    lesion: Lesion


INTACT = Drawn(0, 0, Lesion())


@dataclass(frozen=True)
class ErrorCount:
    """How many test images one lesioned network got wrong: a row of a run.

    Attributes:
        network: its kind.
        seed: which of the networks of that kind.
        size, draw: see `Drawn`.
        deleted, order, scale: see `pathnet.lesion.Lesion`.
        bn: the policy for batch normalisation.
        images: test images.
        wrong: of those.
    """

    PART: ClassVar[str] = "errors"
    MEASURED: ClassVar[tuple[str, ...]] = ("wrong",)
    RANGES: ClassVar[Mapping[str, Range]] = {"images": Range(1), "wrong": Range(0, "images")}

    network: str
    seed: int
    size: int
    draw: int
    deleted: tuple[int, ...]
    order: tuple[int, ...]
    scale: float
    bn: str
    images: int
    wrong: int

    @property
    def rate(self) -> float:
        """The error rate, in [0, 1]."""
        return self.wrong / self.images

    @property
    def drawn(self) -> Drawn:
        return Drawn(self.size, self.draw, Lesion(self.deleted, self.order, self.scale))


class ErrorCounts:
    """The error counts of a run, by kind of network."""

    def __init__(self, run: results.Run) -> None:
        self.facts: dict[str, list[dict[str, Any]]] = run.fact("networks")
        self.chance = 1 - 1 / run.fact("data", "classes")
        self._rows = run.rows(ErrorCount)

    def of(self, network: str, **values: Any) -> list[ErrorCount]:
        """Those of one kind whose fields have the given values."""
        return [
            row
            for row in self._rows
            if row.network == network and all(getattr(row, name) == value for name, value in values.items())
        ]

    def intact(self, network: str) -> Array:
        """The error rates of the networks as they are, float64 [seeds]."""
        return np.array([row.rate for row in self.of(network, size=0, scale=1.0)])


@dataclass(frozen=True)
class Spread:
    """The mean of ``count`` values and its 95 % interval; NaN where there is too little to tell it from."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        ends = f"{100 * self.low:.3g} to {100 * self.high:.3g}" if np.isfinite(self.low) else no_interval(self.count)
        return f"{100 * self.mean:.3g} % ({ends})"


def spread(values: Sequence[float] | Array) -> Spread:
    """The mean of independent values and its 95 % interval by a percentile bootstrap, where they are enough for one
    (`pathnet.intervals`)."""
    column = np.asarray(values, np.float64)[:, None]
    low, high = interval(bootstrap_means(column, np.ones(column.shape, np.bool_)), len(column))[:, 0]
    return Spread(float(column.mean()), float(low), float(high), len(column))


def measure_errors(
    run: results.Run,
    nets: Networks,
    data: Data,
    plan: Plan,
    asked: Mapping[str, Sequence[Sequence[Drawn]]],
    progress: Progress | None = None,
    bn: BatchNormPolicy | None = None,
) -> None:
    """Measures the errors that the run does not have yet, and writes them, some lesions at a time.

    Args:
        asked: for each kind of network, for each seed, the lesions.
        bn: in place of the plan's.
    """
    bn = bn or plan.bn
    images = plan.images or len(data.test)
    measured = {(row.network, row.seed, row.drawn) for row in run.rows(ErrorCount) if row.bn == bn}
    missing = {
        (kind, seed): [each for each in own if (kind, seed, each) not in measured]
        for kind, seeds in asked.items()
        for seed, own in enumerate(seeds)
    }
    total, done = sum(map(len, missing.values())) * images, 0
    for (kind, seed), own in missing.items():
        for start in range(0, len(own), TOGETHER):
            part = own[start : start + TOGETHER]

            def report(own_done: int, _: int, note: str, before: int = done) -> None:
                if progress is not None:
                    progress(before + own_done, total, note)

            found = lesion.errors(nets[kind][seed], data, [each.lesion for each in part], bn, plan.images, report)
            rows = []
            for (size, draw, each), wrong in zip(part, found.wrong.tolist(), strict=True):
                own_lesion = (each.deleted, each.order, each.scale)
                rows.append(ErrorCount(kind, seed, size, draw, *own_lesion, bn, images, wrong))
            run.add_rows(rows)
            done += len(part) * images
