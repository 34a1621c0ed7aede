"""Figure 7 and equation 8: the share of the paths of each length that is left when blocks are deleted (section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import paths, results
from pathnet.data import Data
from pathnet.experiments.run import Claim, Networks, Plan, Value, check_arguments, opened, unfinished
from pathnet.streams import stream
from pathnet.training import Progress

__all__ = ["NAME", "RemainingPaths", "claims", "measure", "summarise"]

NAME = "remaining-paths"
BLOCKS = 54
DELETED = (1, 10, 20)
DRAWS = 2000
SHORT, TYPICAL = 10, 27
TIMES = 100.0


@dataclass(frozen=True)
class RemainingPaths:
    """By number of deleted blocks.

    Attributes:
        blocks: n.
        share: float64 [n + 1] each, of the paths of every length that is left (equation 8).
        drawn: float64 [n + 1] each, of that many random paths that avoided as many random blocks.
    """

    blocks: int
    share: dict[int, NDArray[np.float64]]
    drawn: dict[int, NDArray[np.float64]]


def measure(
    nets: Networks, data: Data, plan: Plan, folder: str | Path, progress: Progress | None = None
) -> results.Run:
    """Counts which random paths avoid random deletions, for the paper's 54 blocks; no network is needed."""
    check_arguments(nets, data, plan, folder, progress)
    with opened(NAME, {}, data, {"blocks": BLOCKS, "plan_seed": plan.plan_seed}, {}, folder) as run:
        if not run.rows(Value):
            run.add_rows(_draw(plan.plan_seed))
        return run


def _draw(seed: int) -> list[Value]:
    rows = []
    for length in range(BLOCKS + 1):
        through = paths.sample(BLOCKS, length, DRAWS, seed).bool().numpy()
        for deleted in DELETED:
            # The first of a random order of all blocks, for each path: a uniform choice.
            order = stream(seed, "remaining paths", length, deleted).random((DRAWS, BLOCKS)).argsort(1)[:, :deleted]
            left = ~np.take_along_axis(through, order, 1).any(1)
            rows.append(Value("", 0, 0, _quantity(deleted), length, float(left.sum())))
    return rows


def _quantity(deleted: int) -> str:
    return f"left of {DRAWS} with {deleted} deleted"


def summarise(run: results.Run) -> RemainingPaths:
    """What equation 8 says beside what was drawn.

    Raises:
        ValueError: nothing is drawn yet.
    """
    blocks = run.fact("blocks")
    left = {(row.quantity, row.index): row.value for row in run.rows(Value)}
    asked = {deleted: [(_quantity(deleted), length) for length in range(blocks + 1)] for deleted in DELETED}
    if not all(key in left for keys in asked.values() for key in keys):
        raise unfinished(run)
    drawn = {deleted: np.array([left[key] for key in keys]) / DRAWS for deleted, keys in asked.items()}
    share = {deleted: paths.remaining_fraction(blocks, deleted).numpy() for deleted in DELETED}
    return RemainingPaths(blocks, share, drawn)


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of Figure 7 beside this run."""
    found = summarise(run)
    off = [
        (deleted, length)
        for deleted, share in found.share.items()
        for length, own in enumerate(share)
        if scipy.stats.binomtest(round(found.drawn[deleted][length] * DRAWS), DRAWS, min(1.0, float(own))).pvalue
        < 1e-4
    ]
    short, typical = (float(found.share[DELETED[1]][length]) for length in (SHORT, TYPICAL))
    return [
        Claim(
            "Deleting d of n blocks leaves C(n - d, k) / C(n, k) of the paths of length k.",
            "section 5, equation 8",
            f"the share of {DRAWS} random paths left differs nowhere significantly (p below 1e-4)",
            f"it differs at {len(off)} of {len(found.share) * (found.blocks + 1)} points",
            not off,
        ),
        Claim(
            "Deletions leave short paths and take long ones.",
            "section 5, Figure 7",
            f"with {DELETED[1]} of {found.blocks} blocks deleted, {TIMES:g} times as large a share of the paths of "
            f"length {SHORT} is left as of length {TYPICAL}",
            f"{short:.3g} against {typical:.3g}: {short / typical:.3g} times",
            short >= TIMES * typical,
        ),
    ]
