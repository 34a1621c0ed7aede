"""Test errors of lesioned networks as rows of a run: each is measured once, and looked up by its lesion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathnet import lesion, results
from pathnet.data import Batches, Data
from pathnet.data.passes import Passes
from pathnet.experiments.run import Networks, Plan
from pathnet.experiments.units import Amounts, Rows, measure_units
from pathnet.intervals import bootstrap_means, interval, no_interval
from pathnet.lesion import BatchNormPolicy, Lesion
from pathnet.results import Range
from pathnet.settings import Help, Unit, documented
from pathnet.training import Progress

__all__ = ["INTACT", "DrawnLesion", "ErrorCount", "ErrorCounts", "Spread", "measure_errors", "spread", "text_of"]

TOGETHER = 32
GROUPS_EACH = 4
"""Groups of lesions for each of several processes, so that they end at about the same time."""

Array = NDArray[np.float64]


class DrawnLesion(NamedTuple):
    """A lesion to measure.

    Attributes:
        size: number of deleted blocks, or of swapped pairs.
        draw: number of the random draw of this size, from 0.
        lesion: the lesion.
    """

    size: int
    draw: int
    lesion: Lesion


INTACT = DrawnLesion(0, 0, Lesion())


@documented
@dataclass(frozen=True)
class ErrorCount:
    """Test images that one lesioned network misclassifies: a row of a run."""

    PART: ClassVar[str] = "errors"
    MEASURED: ClassVar[tuple[str, ...]] = ("wrong", "misclassified")
    RANGES: ClassVar[Mapping[str, Range]] = {"images": Range(1), "wrong": Range(0, "images")}

    network: Annotated[str, Help("Kind of the network: residual, highway, vgg or your own.")]
    seed: Annotated[int, Help("Number of the network among those of its kind, from 0.")]
    size: Annotated[int, Help("Number of deleted blocks, or of swapped pairs.")]
    draw: Annotated[int, Help("Number of the random draw of this size, from 0.")]
    deleted: Annotated[tuple[int, ...], Help("Numbers of the deleted blocks, from 0, as they run.")]
    order: Annotated[tuple[int, ...], Help("Numbers of the blocks as they run; empty for the order of training.")]
    scale: Annotated[float, Help("Factor on the residual modules that are kept."), Unit("1")]
    bn: Annotated[str, Help("Policy for batch normalisation.")]
    images: Annotated[int, Help("Number of test images."), Unit("images")]
    wrong: Annotated[int, Help("Number of test images that the network misclassifies."), Unit("images")]
    misclassified: Annotated[
        str,
        Help(
            "Which of the test images these are: character i, from 0, is 1 if image i of those that were measured is "
            "misclassified, and 0 if it is not. Of sequences, the labels that count take the place of images. Empty "
            "in runs of earlier versions."
        ),
    ] = ""

    @property
    def rate(self) -> float:
        """Error rate, in [0, 1]."""
        return self.wrong / self.images

    @property
    def drawn(self) -> DrawnLesion:
        """Lesion of the row."""
        return DrawnLesion(self.size, self.draw, Lesion(self.deleted, self.order, self.scale))


class ErrorCounts:
    """Error counts of a run, by kind of network.

    Attributes:
        facts: recorded facts about the networks, by kind and seed.
        chance: error rate of guessing.
    """

    def __init__(self, run: results.Run) -> None:
        self.facts: dict[str, list[dict[str, Any]]] = run.fact("networks")
        self.chance = 1 - 1 / run.fact("data", "classes")
        self._rows = run.rows(ErrorCount)
        self._folder = run.folder

    def of(self, network: str, **values: Any) -> list[ErrorCount]:
        """Return the error counts of one kind of network whose fields equal ``values``."""
        return [
            row
            for row in self._rows
            if row.network == network and all(getattr(row, name) == value for name, value in values.items())
        ]

    def intact(self, network: str) -> Array:
        """Return the error rates of the intact networks, float64 [seeds]."""
        return np.array([row.rate for row in self.of(network, size=0, scale=1.0)])

    def masks(self, rows: Sequence[ErrorCount]) -> NDArray[np.bool_] | None:
        """Return which images some networks misclassify, bool [rows, images]; None if a row does not say.

        Args:
            rows: error counts on the same images.

        Raises:
            ValueError: a text is not one of ``images`` characters, ``wrong`` of them 1.
        """
        if not all(row.misclassified for row in rows):
            return None
        for row in rows:
            text = row.misclassified
            if (len(text), text.count("1"), text.count("0")) != (row.images, row.wrong, row.images - row.wrong):
                expected = f"{row.images} characters, {row.wrong} of them 1 and the others 0"
                raise ValueError(
                    f"run: {self._folder}: misclassified: expected {expected}, got {len(text)} with "
                    f"{text.count('1')} ones and {text.count('0')} zeros"
                )
        codes = np.frombuffer("".join(row.misclassified for row in rows).encode(), np.uint8)
        return np.asarray(codes.reshape(len(rows), -1) == ord("1"))


@dataclass(frozen=True)
class Spread:
    """The mean of ``count`` values and the ends of its 95 % interval, NaN if there are too few values for one.

    The count is 0 where nothing but the mean is known.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.3g} % ({self._ends})"

    @property
    def points(self) -> str:
        """The mean and its interval as a difference of rates, in points."""
        return f"{100 * self.mean:.3g} points ({self._ends})"

    @property
    def _ends(self) -> str:
        ends = f"{100 * self.low:.3g} to {100 * self.high:.3g}"
        if np.isfinite(self.low):
            return ends
        return no_interval(self.count) if self.count else "no interval: only the mean is known"


def spread(values: Sequence[float] | Array) -> Spread:
    """Return the mean of independent values and its 95 % interval by a percentile bootstrap.

    There is no interval for too few values (`pathnet.intervals`).
    """
    column = np.asarray(values, np.float64)[:, None]
    low, high = interval(bootstrap_means(column, np.ones(column.shape, np.bool_)), len(column))[:, 0]
    return Spread(float(column.mean()), float(low), float(high), len(column))


def measure_errors(
    run: results.Run,
    nets: Networks,
    data: Data | Batches,
    plan: Plan,
    lesions: Mapping[str, Sequence[Sequence[DrawnLesion]]],
    progress: Progress | None = None,
    bn: BatchNormPolicy | None = None,
) -> None:
    """Measure the errors that the run lacks, and write them, some lesions at a time.

    Args:
        run: the run to add to.
        nets, data, plan: the arguments of the driver.
        lesions: the lesions, by kind of network and seed.
        progress: called with (images done, images in total, a note).
        bn: policy for batch normalisation; the plan's by default.
    """
    bn = bn or plan.bn
    images = Passes(data, 1, plan.images).samples or 0
    units = run.workers.agree(lambda: _missing(run, lesions, bn))

    def begin(unit: list[Any], report: Callable[[int, str], None]) -> Callable[[], tuple[Rows, str]]:
        kind, seed, numbers = unit
        part, note = [lesions[kind][seed][number] for number in numbers], ""

        def noted(done: int, _: int, words: str) -> None:
            nonlocal note
            note = words
            report(done, words)

        cuts = [drawn.lesion for drawn in part]
        masks = lesion.errors(nets[kind][seed], data, cuts, bn, plan.images, noted).misclassified
        rows = [
            ErrorCount(
                kind, seed, size, draw, cut.deleted, cut.order, cut.scale, bn, images, int(mask.sum()), text_of(mask)
            )
            for (size, draw, cut), mask in zip(part, masks, strict=True)
        ]
        return lambda: (rows, note)

    sizes = [len(numbers) * images for _, _, numbers in units]
    measure_units(run, units, begin, Amounts(sum(sizes), 0, sizes), progress)


def text_of(mask: NDArray[np.bool_]) -> str:
    """Return a mask of images as a text of zeros and ones."""
    return (mask + np.uint8(ord("0"))).tobytes().decode("ascii")


def _missing(
    run: results.Run, lesions: Mapping[str, Sequence[Sequence[DrawnLesion]]], bn: BatchNormPolicy
) -> list[tuple[str, int, list[int]]]:
    """Return the lesions that the run lacks in groups: kind and seed of a network, and numbers of its lesions."""
    measured = {(row.network, row.seed, row.drawn) for row in run.rows(ErrorCount) if row.bn == bn}
    missing = [
        (kind, seed, [number for number, drawn in enumerate(planned) if (kind, seed, drawn) not in measured])
        for kind, seeds in lesions.items()
        for seed, planned in enumerate(seeds)
    ]
    together = TOGETHER
    if (processes := run.workers.count) > 1:
        most = -(-sum(len(numbers) for _, _, numbers in missing) // (GROUPS_EACH * processes))
        together = max(1, min(TOGETHER, most))
    return [
        (kind, seed, numbers[start : start + together])
        for kind, seed, numbers in missing
        for start in range(0, len(numbers), together)
    ]
