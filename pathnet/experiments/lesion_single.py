"""Figures 3 and 4: each single block deleted, in residual networks and in a VGG (section 4.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.experiments.claims import Claim, Verdict, all_of, at_least, at_most
from pathnet.experiments.errors import INTACT, DrawnLesion, ErrorCounts, Spread, measure_errors
from pathnet.experiments.run import Networks, Plan, check_arguments, open_run, unfinished
from pathnet.intervals import paired, wilson
from pathnet.lesion import Lesion
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = [
    "NAME",
    "OF_LEARNED",
    "SingleDeletions",
    "claims",
    "contrast",
    "if_learned",
    "measure",
    "measure_deletions",
    "summarise",
]

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
        images: number of test images; None if it is not known.
        misclassified: bool [seeds, 1 + n, images], which images each network misclassifies, first the intact one;
            None if that is not known, as in runs of earlier versions.
    """

    rate: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    intact: NDArray[np.float64]
    downsampling: tuple[int, ...]
    chance: float
    first: int
    images: int | None = None
    misclassified: NDArray[np.bool_] | None = None

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

    @property
    def left_ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of the 95 % intervals of ``left``, float64 [n] each: the extremes over the ends of both rates.

        NaN where an intact network may be at chance, so that nothing bounds the share.
        """
        above = [self.chance - rate for rate in (self.low, self.high)]
        below_chance = self.intact_ends[1] < self.chance
        scales = [np.where(below_chance, self.chance - ends, np.nan)[:, None] for ends in self.intact_ends]
        corners = [of_rate / scale for of_rate in above for scale in scales]
        return np.asarray(np.min(corners, 0).mean(0)), np.asarray(np.max(corners, 0).mean(0))

    @property
    def intact_ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of the 95 % intervals of ``intact`` (Wilson), float64 [seeds] each; NaN without ``images``."""
        if self.images is None:
            return np.full_like(self.intact, np.nan), np.full_like(self.intact, np.nan)
        ends = np.array([wilson(round(rate * self.images), self.images) for rate in self.intact.tolist()])
        return ends[:, 0], ends[:, 1]

    def cost(self, blocks: NDArray[np.bool_]) -> Spread:
        """Return the mean increase of the error rate over the deletions of some blocks, see `contrast`.

        Args:
            blocks: mask of the blocks, bool [n].
        """
        return contrast((1.0, self, blocks))


def contrast(*terms: tuple[float, SingleDeletions, NDArray[np.bool_]]) -> Spread:
    """Return a weighted sum of mean costs of deletions, in error rate, with its 95 % interval.

    The interval is over test images, for these networks. Networks that answer the same images tend to err on the same
    ones, so it is that of each image's own sum (`pathnet.intervals.paired`). It is NaN where some summary does not
    say which images are misclassified.

    Args:
        terms: for each mean cost its weight, the deletions, and the mask of the blocks, bool [n], that the mean is
            taken over. All are measured on the same images.
    """
    mean = sum(weight * float(deletions.increase[blocks].mean()) for weight, deletions, blocks in terms)
    costs, of_intact = [], defaultdict[int, float](float)
    for weight, deletions, blocks in terms:
        if deletions.misclassified is None:
            return Spread(mean, np.nan, np.nan, 0)
        lesioned, intact = deletions.misclassified[:, 1:][:, blocks], deletions.misclassified[:, 0]
        costs.append(weight * (lesioned.mean((0, 1)) - intact.mean(0)))
        of_intact[id(deletions)] += weight
    # Terms of the same networks share intact ones, whose weights may cancel. All weights together add up to 0.
    largest = (sum(abs(weight) for weight, _, _ in terms) + sum(map(abs, of_intact.values()))) / 2
    return Spread(mean, *paired(np.sum(costs, 0), largest), len(costs[0]))


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
    rates, ends, lesioned = [], [], []
    for seed, network in enumerate(facts):
        rows = {row.deleted: row for row in counts.of(kind, seed=seed)}
        if len(rows) <= network["blocks"]:
            raise unfinished(run)
        deleted = [rows[i,] for i in range(network["blocks"])]
        lesioned += [rows[()], *deleted]
        rates.append([row.rate for row in deleted])
        ends.append([wilson(row.wrong, row.images) for row in deleted])
    low, high = np.moveaxis(np.array(ends), -1, 0)
    downsampling, first = tuple(run.fact("networks", kind, 0, "downsampling")), 1 if kind == "vgg" else 0
    masks = counts.masks(lesioned)
    return SingleDeletions(
        np.array(rates),
        low,
        high,
        counts.intact(kind),
        downsampling,
        counts.chance,
        first,
        deleted[0].images,
        None if masks is None else masks.reshape(len(facts), -1, masks.shape[1]),
    )


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
    plain, downsampling = ~deletions.changes_shape, deletions.changes_shape
    if not plain.any():
        return []
    costs = {block: deletions.cost(np.arange(len(plain)) == block) for block in np.flatnonzero(plain).tolist()}
    worst = max(costs, key=lambda block: costs[block].mean)
    median = np.median([cost.mean for cost in costs.values()])
    low, high = (max(getattr(cost, end) for cost in costs.values()) for end in ("low", "high"))
    tested = [
        Claim(
            "Deleting any one residual module, except a downsampling one, hardly changes the error of a residual "
            "network.",
            WHERE,
            f"no such block costs more than {100 * PLAIN_MATTER:g} points of error, {OF_LEARNED}",
            f"the worst, block {worst}, costs {costs[worst].points}, the median block {100 * median:.2g}",
            if_learned(at_most(low, high, PLAIN_MATTER), deletions),
        )
    ]
    if downsampling.any():
        changing, other, times = deletions.cost(downsampling), deletions.cost(plain), DOWNSAMPLING_MATTERS
        more = contrast((1.0, deletions, downsampling), (-times, deletions, plain))
        tested.append(
            Claim(
                "Deleting a downsampling block matters more.",
                WHERE,
                f"it costs error, and the mean cost is at least {times:g} times that of the others, {OF_LEARNED}",
                f"{changing.points} against {other.points}; less {times:g} times the latter, {more.points}",
                if_learned(
                    all_of(
                        at_least(changing.low, changing.high, 0.0),
                        at_least(more.low, more.high, 0.0),
                    ),
                    deletions,
                ),
            )
        )
    return tested


def _claim_of_vgg(deletions: SingleDeletions) -> Claim:
    left, (low, high) = deletions.left, deletions.left_ends
    most = int(left.argmax())
    return Claim(
        "Deleting any layer of a VGG takes it to chance.",
        WHERE,
        f"whichever layer is deleted, at most {LEFT_OF_VGG:.0%} of the accuracy above chance is left, {OF_LEARNED}",
        f"{Spread(left[most], low[most], high[most], deletions.images or 0)} is left without layer "
        f"{most + deletions.first}, {100 * np.median(left):.2g} % in the median",
        if_learned(at_most(low.max(), high.max(), LEFT_OF_VGG), deletions),
    )


def if_learned(verdict: Verdict, *deletions: SingleDeletions) -> Verdict:
    """Return a verdict on networks, which is open unless all of them have learned."""
    return verdict if all(of_kind.learned for of_kind in deletions) else "open"
