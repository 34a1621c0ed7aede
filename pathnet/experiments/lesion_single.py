"""Figures 3 and 4: each single block deleted, in residual networks and in a VGG (section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.experiments.errors import INTACT, DrawnLesion, ErrorCounts, measure_errors
from pathnet.experiments.run import Claim, Networks, Plan, check_arguments, open_run, unfinished
from pathnet.lesion import Lesion
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "OF_LEARNED", "SingleDeletions", "claims", "measure", "measure_deletions", "summarise"]

NAME = "lesion-single"
WHERE = "section 4.1, Figures 3 and 4"
LEARNED = 0.5
OF_LEARNED = f"in networks that make at most {LEARNED:.0%} of the errors of guessing"
PLAIN_MATTER = 0.10
LEFT_OF_VGG = 0.10
DOWNSAMPLING_MATTERS = 2.0


@dataclass(frozen=True)
class SingleDeletions:
    """Error rates of one kind of network with each single block deleted.

    Attributes:
        rate: float64 [seeds, n], error rate without block i.
        low, high: float64 [seeds, n], ends of its 95 % interval (Wilson).
        intact: float64 [seeds], error rate of the intact network.
        downsampling: the blocks that change the shape.
        chance: error rate of guessing.
        first: number of the first block: 0, or 1 in a VGG, whose first layer (0) changes the number of channels.
    """

    rate: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    intact: NDArray[np.float64]
    downsampling: tuple[int, ...]
    chance: float
    first: int

    @property
    def learned(self) -> bool:
        """True if every intact network makes at most half of the errors of guessing; others have little to lose."""
        return bool((self.intact <= LEARNED * self.chance).all())

    @property
    def increase(self) -> NDArray[np.float64]:
        """Increase of the error rate when a block is deleted, the mean over seeds: float64 [n]."""
        return np.asarray((self.rate - self.intact[:, None]).mean(0))

    @property
    def changes_shape(self) -> NDArray[np.bool_]:
        """Mask of the downsampling blocks: bool [n]."""
        return np.isin(np.arange(self.rate.shape[1]), self.downsampling)

    @property
    def left(self) -> NDArray[np.float64]:
        """Share of the accuracy above chance that is left without a block, the mean over seeds: float64 [n]."""
        return np.asarray(((self.chance - self.rate) / (self.chance - self.intact[:, None])).mean(0))


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
    name: str = NAME,
) -> results.Run:
    """Measure the test error of every network, intact and without each of its blocks.

    Args:
        nets: networks by kind.
        data: the data set; or a caller's own batches, an iterable that is read into memory or `pathnet.data.Batches`.
        plan: the policy for batch normalisation and the number of images.
        folder: folder of a new run, or of one with the same networks, data and plan.
        progress: called with (images done, images in total, a note).
        workers: the processes that measure together.
        name: name of the experiment.

    Raises:
        ValueError: a network does not accept the data, or the folder holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress)
    if not nets:
        raise ValueError("networks: expected networks of at least one kind, got none")
    with open_run(name, nets, source, {"bn": plan.bn, "images": plan.images}, {}, folder, workers) as run:
        measure_deletions(run, nets, source, plan, progress)
        return run


def measure_deletions(
    run: results.Run, nets: Networks, data: Data | Batches, plan: Plan, progress: Progress | None = None
) -> None:
    """Measure the errors that the run lacks, of all networks intact and without each of their blocks."""
    lesions = {
        kind: [[INTACT, *(DrawnLesion(1, 0, Lesion((i,))) for i in range(net.n))] for net in seeds]
        for kind, seeds in nets.items()
    }
    measure_errors(run, nets, data, plan, lesions, progress)


def summarise(run: results.Run) -> dict[str, SingleDeletions]:
    """Summarise single deletions by kind of network.

    Raises:
        ValueError: not all errors are measured yet.
    """
    counts = ErrorCounts(run)
    return {kind: _summarise_kind(run, counts, kind) for kind in counts.facts}


def _summarise_kind(run: results.Run, counts: ErrorCounts, kind: str) -> SingleDeletions:
    facts = counts.facts[kind]
    rates, ends = [], []
    for seed, network in enumerate(facts):
        rows = {row.deleted: row for row in counts.of(kind, seed=seed)}
        if len(rows) <= network["blocks"]:
            raise unfinished(run)
        deleted = [rows[i,] for i in range(network["blocks"])]
        rates.append([row.rate for row in deleted])
        ends.append(
            [tuple(scipy.stats.binomtest(row.wrong, row.images).proportion_ci(method="wilson")) for row in deleted]
        )
    low, high = np.moveaxis(np.array(ends), -1, 0)
    downsampling, first = tuple(run.fact("networks", kind, 0, "downsampling")), 1 if kind == "vgg" else 0
    return SingleDeletions(np.array(rates), low, high, counts.intact(kind), downsampling, counts.chance, first)


def claims(run: results.Run) -> list[Claim]:
    """Test the claims of Figures 3 and 4 on a run."""
    deletions = summarise(run)
    tested = []
    if (residual := deletions.get("residual")) is not None:
        tested += _claims_of_residual(residual)
    if (vgg := deletions.get("vgg")) is not None:
        tested.append(_claim_of_vgg(vgg))
    return tested


def _claims_of_residual(deletions: SingleDeletions) -> list[Claim]:
    plain, downsampling = (deletions.increase[mask] for mask in (~deletions.changes_shape, deletions.changes_shape))
    if not len(plain):
        return []
    worst = int(np.flatnonzero(~deletions.changes_shape)[plain.argmax()])
    tested = [
        Claim(
            "Deleting any one residual module, except a downsampling one, hardly changes the error of a residual "
            "network.",
            WHERE,
            f"no such block costs more than {100 * PLAIN_MATTER:g} points of error, {OF_LEARNED}",
            f"the worst, block {worst}, costs {100 * plain.max():.2g} points, the median block "
            f"{100 * np.median(plain):.2g}",
            bool(plain.max() <= PLAIN_MATTER and deletions.learned),
        )
    ]
    if len(downsampling):
        tested.append(
            Claim(
                "Deleting a downsampling block matters more.",
                WHERE,
                f"the mean cost of such a block is at least {DOWNSAMPLING_MATTERS:g} times that of the others",
                f"{100 * downsampling.mean():.2g} points against {100 * plain.mean():.2g}",
                bool(downsampling.mean() >= DOWNSAMPLING_MATTERS * plain.mean() and downsampling.mean() > 0),
            )
        )
    return tested


def _claim_of_vgg(deletions: SingleDeletions) -> Claim:
    left = deletions.left
    most = int(left.argmax())
    return Claim(
        "Deleting any layer of a VGG takes it to chance.",
        WHERE,
        f"whichever layer is deleted, at most {LEFT_OF_VGG:.0%} of the accuracy above chance is left, {OF_LEARNED}",
        f"{100 * left[most]:.2g} % is left without layer {most + deletions.first}, {100 * np.median(left):.2g} % in "
        "the median",
        bool(left.max() <= LEFT_OF_VGG and deletions.learned),
    )
