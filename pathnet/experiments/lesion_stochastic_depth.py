"""Figure 8: single deletions in networks trained with stochastic depth and in plain networks (section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.experiments import lesion_single
from pathnet.experiments.claims import Claim, Verdict, at_least, at_most
from pathnet.experiments.drawn_paths import DrawnPaths, drawn_paths
from pathnet.experiments.lesion_single import OF_LEARNED, SingleDeletions, contrast, if_learned, summarise
from pathnet.experiments.run import Networks, Plan
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
    tested = [
        Claim(
            "Training with stochastic depth makes a network more resilient to the deletion of single modules.",
            where,
            f"the mean cost of deleting a block is at most {OF_PLAIN:g} times that of plain networks, {OF_LEARNED}",
            *_compared(plain, stochastic, np.ones_like(plain.changes_shape)),
        )
    ]
    if plain.changes_shape.any():
        tested.append(
            Claim(
                "It reduces the dependence on downsampling blocks.",
                where,
                f"the mean cost of deleting a downsampling block is at most {OF_PLAIN:g} times that of plain "
                f"networks, {OF_LEARNED}",
                *_compared(plain, stochastic, plain.changes_shape),
            )
        )
    return tested


def _compared(plain: SingleDeletions, stochastic: SingleDeletions, blocks: NDArray[np.bool_]) -> tuple[str, Verdict]:
    """Return the mean costs of deleting one of some blocks in words, and whether those of ``stochastic`` are less."""
    cost, of_plain = stochastic.cost(blocks), plain.cost(blocks)
    more = contrast((1.0, stochastic, blocks), (-OF_PLAIN, plain, blocks))
    verdict = at_most(more.low, more.high, 0.0)
    if at_least(of_plain.low, of_plain.high, 0.0) != "held":
        verdict = "open"  # deletions that cost plain networks nothing leave nothing to reduce
    words = f"{cost.points} against {of_plain.points}; less {OF_PLAIN:g} times the latter, {more.points}"
    return words, if_learned(verdict, plain, stochastic)
