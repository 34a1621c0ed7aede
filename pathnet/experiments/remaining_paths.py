"""Figure 7 and equation 8: the share of the paths of each length that remains when blocks are deleted (section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import paths, results
from pathnet.data import Batches, Data
from pathnet.experiments.claims import Claim, exactly
from pathnet.experiments.run import Networks, Plan, Value, check_arguments, open_run, unfinished
from pathnet.streams import stream
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "RemainingPaths", "claims", "measure", "summarise"]

NAME = "remaining-paths"
BLOCKS = 54
DELETED = (1, 10, 20)
DRAWS = 2000
SHORT, TYPICAL = 10, 27
TIMES = 100.0


@dataclass(frozen=True)
class RemainingPaths:
    """Shares of paths that remain, by number of deleted blocks.

    Attributes:
        blocks: number n of blocks.
        share: share of the paths of each length that remains (equation 8), each float64 [n + 1].
        drawn: share of random paths of each length that avoid the deleted random blocks, each float64 [n + 1].
    """

    blocks: int
    share: dict[int, NDArray[np.float64]]
    drawn: dict[int, NDArray[np.float64]]


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Count the random paths that avoid random deletions among the paper's 54 blocks; no network is needed.

    Raises:
        ValueError: an argument has the wrong type, or the folder holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress)
    with open_run(NAME, {}, source, {"blocks": BLOCKS, "plan_seed": plan.plan_seed}, {}, folder, workers) as run:
        if workers.leads and not run.rows(Value):
            run.add_rows(_draw(plan.plan_seed))
        return run


def _draw(seed: int) -> list[Value]:
    rows = []
    for length in range(BLOCKS + 1):
        through = paths.sample(BLOCKS, length, DRAWS, seed).bool().numpy()
        for deleted in DELETED:
            # The first blocks of a random order of all blocks, for each path: a uniform choice.
            order = stream(seed, "remaining paths", length, deleted).random((DRAWS, BLOCKS)).argsort(1)[:, :deleted]
            left = ~np.take_along_axis(through, order, 1).any(1)
            rows.append(Value("", 0, 0, _quantity(deleted), length, float(left.sum())))
    return rows


def _quantity(deleted: int) -> str:
    return f"left of {DRAWS} with {deleted} deleted"


def summarise(run: results.Run) -> RemainingPaths:
    """Return the shares by equation 8 and those of random paths.

    Raises:
        ValueError: not all random paths are drawn yet.
    """
    blocks = run.fact("blocks")
    left = {(row.quantity, row.index): row.value for row in run.rows(Value)}
    keys = {deleted: [(_quantity(deleted), length) for length in range(blocks + 1)] for deleted in DELETED}
    if not all(key in left for of_lengths in keys.values() for key in of_lengths):
        raise unfinished(run)
    drawn = {deleted: np.array([left[key] for key in of_lengths]) / DRAWS for deleted, of_lengths in keys.items()}
    share = {deleted: paths.remaining_fraction(blocks, deleted).numpy() for deleted in DELETED}
    return RemainingPaths(blocks, share, drawn)


def claims(run: results.Run) -> list[Claim]:
    """Test the claims of Figure 7 on a run."""
    remaining = summarise(run)
    off = [
        (deleted, length)
        for deleted, share in remaining.share.items()
        for length, expected in enumerate(share)
        if _p_value(remaining.drawn[deleted][length], expected) < 1e-4
    ]
    short, typical = (float(remaining.share[DELETED[1]][length]) for length in (SHORT, TYPICAL))
    return [
        Claim(
            "Deleting d of n blocks leaves C(n - d, k) / C(n, k) of the paths of length k.",
            "section 6, equation 8",
            f"the share of {DRAWS} random paths that remain differs significantly (p below 1e-4) at no point",
            f"it differs at {len(off)} of {len(remaining.share) * (remaining.blocks + 1)} points",
            exactly(not off),
        ),
        Claim(
            "Deletions spare short paths and remove long ones.",
            "section 6, Figure 7",
            f"with {DELETED[1]} of {remaining.blocks} blocks deleted, the share of paths of length {SHORT} that "
            f"remain is at least {TIMES:g} times that of length {TYPICAL}",
            f"{short:.3g} against {typical:.3g}: {short / typical:.3g} times",
            exactly(short >= TIMES * typical),
        ),
    ]


def _p_value(drawn: float, expected: float) -> float:
    """Return the p-value of a share of `DRAWS` random paths, from an exact binomial test."""
    return float(scipy.stats.binomtest(round(drawn * DRAWS), DRAWS, min(1.0, float(expected))).pvalue)
