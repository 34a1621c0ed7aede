"""Figures 3 and 4: each single block deleted, in residual networks and in a VGG (section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import results
from pathnet.data import Data
from pathnet.experiments.errors import INTACT, Drawn, ErrorCounts, measure_errors
from pathnet.experiments.run import Claim, Networks, Plan, check_arguments, opened, unfinished
from pathnet.lesion import Lesion
from pathnet.training import Progress

__all__ = ["NAME", "OF_LEARNED", "SingleDeletions", "claims", "measure", "measure_deletions", "summarise"]

NAME = "lesion-single"
WHERE = "section 4.1, Figures 3 and 4"
LEARNED = 0.5
OF_LEARNED = f"of networks that make at most {LEARNED:.0%} of the errors of guessing"
OTHERS_MATTER = 0.10
LEFT_OF_VGG = 0.10
DOWNSAMPLING_MATTERS = 2.0


@dataclass(frozen=True)
class SingleDeletions:
    """The errors of one kind of network with each single block deleted.

    Attributes:
        rate: float64 [seeds, n], of the network without block i.
        low, high: float64 [seeds, n], its 95 % interval (Wilson).
        intact: float64 [seeds], of the network as it is.
        downsampling: the blocks that change the shape.
        chance: the error of guessing.
        first: the number of the first block: 2 in a VGG, whose first layer changes the channels.
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
        """Whether every network as it is makes at most half of the errors of guessing; others have little to lose."""
        return bool((self.intact <= LEARNED * self.chance).all())

    @property
    def increase(self) -> NDArray[np.float64]:
        """float64 [n], of the error rate by deleting a block, the mean over seeds."""
        return np.asarray((self.rate - self.intact[:, None]).mean(0))

    @property
    def changes_shape(self) -> NDArray[np.bool_]:
        """bool [n]"""
        return np.isin(np.arange(self.rate.shape[1]), self.downsampling)

    @property
    def left(self) -> NDArray[np.float64]:
        """float64 [n], what is left of the accuracy above chance, the mean over seeds."""
        return np.asarray(((self.chance - self.rate) / (self.chance - self.intact[:, None])).mean(0))


def measure(
    nets: Networks, data: Data, plan: Plan, folder: str | Path, progress: Progress | None = None, name: str = NAME
) -> results.Run:
    """The test error of every network as it is and without each of its blocks.

    Args:
        folder: of a new run, or of one with the same networks, data and plan.
        name: of the experiment.

    Raises:
        ValueError: a network does not take the data, or the folder holds another run.
    """
    check_arguments(nets, data, plan, folder, progress)
    with opened(name, nets, data, {"bn": plan.bn, "images": plan.images}, {}, folder) as run:
        measure_deletions(run, nets, data, plan, progress)
        return run


def measure_deletions(
    run: results.Run, nets: Networks, data: Data, plan: Plan, progress: Progress | None = None
) -> None:
    """Adds what is missing of the errors of all networks as they are and without each of their blocks."""
    asked = {
        kind: [[INTACT, *(Drawn(1, 0, Lesion((i,))) for i in range(net.n))] for net in own]
        for kind, own in nets.items()
    }
    measure_errors(run, nets, data, plan, asked, progress)


def summarise(run: results.Run) -> dict[str, SingleDeletions]:
    """By kind of network.

    Raises:
        ValueError: not all errors are measured yet.
    """
    counts = ErrorCounts(run)
    return {kind: _of(run, counts, kind) for kind in counts.facts}


def _of(run: results.Run, counts: ErrorCounts, kind: str) -> SingleDeletions:
    facts = counts.facts[kind]
    rates, ends = [], []
    for seed, own in enumerate(facts):
        rows = {row.deleted: row for row in counts.of(kind, seed=seed)}
        if len(rows) <= own["blocks"]:
            raise unfinished(run)
        deleted = [rows[i,] for i in range(own["blocks"])]
        rates.append([row.rate for row in deleted])
        ends.append(
            [tuple(scipy.stats.binomtest(row.wrong, row.images).proportion_ci(method="wilson")) for row in deleted]
        )
    low, high = np.moveaxis(np.array(ends), -1, 0)
    downsampling, first = tuple(run.fact("networks", kind, 0, "downsampling")), 2 if kind == "vgg" else 1
    return SingleDeletions(np.array(rates), low, high, counts.intact(kind), downsampling, counts.chance, first)


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of Figures 3 and 4 beside this run."""
    found = summarise(run)
    said = []
    if (residual := found.get("residual")) is not None:
        said += _of_residual(residual)
    if (vgg := found.get("vgg")) is not None:
        said.append(_of_vgg(vgg))
    return said


def _of_residual(found: SingleDeletions) -> list[Claim]:
    others, changing = found.increase[~found.changes_shape], found.increase[found.changes_shape]
    if not len(others):
        return []
    worst = int(np.flatnonzero(~found.changes_shape)[others.argmax()])
    said = [
        Claim(
            "Deleting any one residual module, downsampling ones apart, hardly changes the error of a residual "
            "network.",
            WHERE,
            f"no such block costs more than {100 * OTHERS_MATTER:g} points of error, {OF_LEARNED}",
            f"the worst, block {worst + 1}, costs {100 * others.max():.2g} points, the median one "
            f"{100 * np.median(others):.2g}",
            bool(others.max() <= OTHERS_MATTER and found.learned),
        )
    ]
    if len(changing):
        said.append(
            Claim(
                "Deleting a downsampling block matters more.",
                WHERE,
                f"their mean cost is at least {DOWNSAMPLING_MATTERS:g} times the others'",
                f"{100 * changing.mean():.2g} points against {100 * others.mean():.2g}",
                bool(changing.mean() >= DOWNSAMPLING_MATTERS * others.mean() and changing.mean() > 0),
            )
        )
    return said


def _of_vgg(found: SingleDeletions) -> Claim:
    most = int(found.left.argmax())
    return Claim(
        "Deleting any layer of a VGG takes it to chance.",
        WHERE,
        f"whichever layer is deleted, at most {LEFT_OF_VGG:.0%} is left of the accuracy above chance, {OF_LEARNED}",
        f"{100 * found.left[most]:.2g} % without layer {most + found.first}, {100 * np.median(found.left):.2g} % "
        "in the median",
        bool(found.left.max() <= LEFT_OF_VGG and found.learned),
    )
