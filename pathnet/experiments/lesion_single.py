"""Figures 3 and 4: each single block deleted, in residual networks and in a VGG (section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from pathnet import results
from pathnet.data import Data
from pathnet.experiments.errors import INTACT, Drawn, ErrorCounts, measure_errors
from pathnet.experiments.run import Claim, Networks, Plan, opened
from pathnet.lesion import Lesion
from pathnet.training import Progress

__all__ = ["NAME", "SingleDeletions", "claims", "measure", "measure_deletions", "summarise"]

NAME = "lesion-single"
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
    """By kind of network."""
    counts = ErrorCounts(run)
    return {kind: _of(counts, kind) for kind in counts.facts}


def _of(counts: ErrorCounts, kind: str) -> SingleDeletions:
    facts = counts.facts[kind]
    rates, ends = [], []
    for seed, own in enumerate(facts):
        rows = {row.deleted: row for row in counts.of(kind, seed=seed)}
        deleted = [rows[i,] for i in range(own["blocks"])]
        rates.append([row.rate for row in deleted])
        ends.append([tuple(binomtest(row.wrong, row.images).proportion_ci(method="wilson")) for row in deleted])
    low, high = np.moveaxis(np.array(ends), -1, 0)
    downsampling, first = tuple(facts[0]["downsampling"]), 2 if kind == "vgg" else 1
    return SingleDeletions(np.array(rates), low, high, counts.intact(kind), downsampling, counts.chance, first)


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of Figures 3 and 4 beside this run."""
    found = summarise(run)
    where = "section 4.1, Figure 3"
    said = []
    if (residual := found.get("residual")) is not None:
        others = residual.increase[~residual.changes_shape]
        worst = int(np.flatnonzero(~residual.changes_shape)[others.argmax()])
        said.append(
            Claim(
                "Deleting any one residual module, downsampling ones apart, hardly changes the error of a residual "
                "network.",
                where,
                f"no such block costs more than {OTHERS_MATTER:.0%} of error",
                f"the worst, block {worst + 1}, costs {100 * others.max():.2g} points, the median one "
                f"{100 * np.median(others):.2g}",
                bool(others.max() <= OTHERS_MATTER),
            )
        )
        if residual.downsampling and len(others):
            downsampling = residual.increase[residual.changes_shape].mean()
            said.append(
                Claim(
                    "Deleting a downsampling block matters more.",
                    where,
                    f"their mean cost is at least {DOWNSAMPLING_MATTERS:g} times the others'",
                    f"{100 * downsampling:.2g} points against {100 * others.mean():.2g}",
                    bool(downsampling >= DOWNSAMPLING_MATTERS * others.mean() and downsampling > 0),
                )
            )
    if (vgg := found.get("vgg")) is not None:
        most = int(vgg.left.argmax())
        said.append(
            Claim(
                "Deleting any layer of a VGG takes it to chance.",
                where,
                f"whichever layer is deleted, at most {LEFT_OF_VGG:.0%} is left of the accuracy above chance",
                f"{100 * vgg.left[most]:.2g} % without layer {most + vgg.first}, {100 * np.median(vgg.left):.2g} % "
                "in the median",
                bool(vgg.left.max() <= LEFT_OF_VGG),
            )
        )
    return said
