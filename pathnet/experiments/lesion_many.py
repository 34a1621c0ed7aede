"""Figure 5 (a): several random blocks deleted at once (section 4.2)."""

from __future__ import annotations

from pathlib import Path

from pathnet import results
from pathnet.data import Data
from pathnet.experiments.by_size import smoothness, summarise
from pathnet.experiments.errors import INTACT, Drawn, measure_errors
from pathnet.experiments.run import Claim, Networks, Plan, check_arguments, opened
from pathnet.lesion import Lesion
from pathnet.streams import stream
from pathnet.training import Progress

__all__ = ["NAME", "claims", "measure"]

NAME = "lesion-many"


def measure(
    nets: Networks, data: Data, plan: Plan, folder: str | Path, progress: Progress | None = None
) -> results.Run:
    """The test error without 1 to ``plan.deletions`` blocks, ``plan.draws`` draws of each number for each network.

    Raises:
        ValueError: a network does not take the data, or the folder holds another run.
    """
    check_arguments(nets, data, plan, folder, progress, ("residual",))
    asked = {kind: [_draw(net.n, seed, plan) for seed, net in enumerate(own)] for kind, own in nets.items()}
    settings = {"bn": plan.bn, "images": plan.images, "plan_seed": plan.plan_seed}
    with opened(NAME, nets, data, settings, {"draws": plan.draws, "deletions": plan.deletions}, folder) as run:
        measure_errors(run, nets, data, plan, asked, progress)
        return run


def _draw(n: int, seed: int, plan: Plan) -> list[Drawn]:
    drawn = [INTACT]
    for size in range(1, min(plan.deletions, n) + 1):
        for draw in range(plan.draws):
            chosen = stream(plan.plan_seed, "deletions", seed, size, draw).choice(n, size, replace=False)
            drawn.append(Drawn(size, draw, Lesion(tuple(sorted(chosen.tolist())))))
    return drawn


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of Figure 5 (a) beside this run."""
    paper = "Error rises smoothly with the number of deleted modules, as the valid paths become fewer."
    found = summarise(run)
    return [smoothness(found, paper, "section 4.2, Figure 5 (a)", f"with {found.sizes[-1]} deleted")]
