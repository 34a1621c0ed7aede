"""Figure 8: single deletions in networks trained with stochastic depth and in plain networks (section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.experiments import lesion_single
from pathnet.experiments.drawn_paths import DrawnPaths, drawn_paths
from pathnet.experiments.lesion_single import OF_LEARNED, SingleDeletions, summarise
from pathnet.experiments.run import Claim, Networks, Plan
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "StochasticDepth", "claims", "measure", "stochastic_depth", "summarise"]

NAME = "lesion-stochastic-depth"
OF_PLAIN = 0.75


@dataclass(frozen=True)
class StochasticDepth:
    """The numbers of Figure 8.

    Attributes:
        deletions: error rates without single blocks, by kind of network.
        trained: the paths that stochastic depth trains.
    """

    deletions: Mapping[str, SingleDeletions]
    trained: DrawnPaths


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure the test error of both kinds of network, intact and without each of their blocks.

    Raises:
        ValueError: a network does not accept the data, or the folder holds another run.
    """
    return lesion_single.measure(nets, data, plan, folder, progress, workers, NAME)


def stochastic_depth(run: results.Run) -> StochasticDepth:
    """Summarise single deletions, and draw paths by the survival probabilities of the first network.

    Raises:
        ValueError: not all errors are measured yet.
    """
    survival = run.fact("networks", "stochastic depth", 0, "survival")
    return StochasticDepth(summarise(run), drawn_paths(survival))


def claims(run: results.Run) -> list[Claim]:
    """Test the claims of Figure 8 on a run."""
    for kind in ("residual", "stochastic depth"):
        run.fact("networks", kind)
    deletions = summarise(run)
    where = "section 6, Figure 8"
    plain, stochastic = deletions["residual"], deletions["stochastic depth"]
    learned = plain.learned and stochastic.learned
    means = [100 * nets.increase.mean() for nets in (plain, stochastic)]
    downsampling = [100 * nets.increase[nets.changes_shape].mean() for nets in (plain, stochastic)]
    return [
        Claim(
            "Training with stochastic depth makes a network more resilient to the deletion of single modules.",
            where,
            f"the mean cost of deleting a block is at most {OF_PLAIN:g} times that of plain networks, {OF_LEARNED}",
            f"{means[1]:.2g} points of error against {means[0]:.2g}",
            bool(means[1] <= OF_PLAIN * means[0] and learned),
        ),
        Claim(
            "It reduces the dependence on downsampling blocks.",
            where,
            f"the mean cost of deleting a downsampling block is at most {OF_PLAIN:g} times that of plain networks, "
            f"{OF_LEARNED}",
            f"{downsampling[1]:.2g} points of error against {downsampling[0]:.2g}",
            bool(np.isfinite(downsampling).all() and downsampling[1] <= OF_PLAIN * downsampling[0] and learned),
        ),
    ]
