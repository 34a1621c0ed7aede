"""Figure 5 (a): several random blocks deleted at once (section 4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.experiments.by_size import smoothness, summarise
from pathnet.experiments.claims import Claim
from pathnet.experiments.errors import INTACT, DrawnLesion, measure_errors
from pathnet.experiments.run import Networks, Plan, check_arguments, open_run
from pathnet.lesion import Lesion
from pathnet.streams import stream
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "claims", "measure"]

NAME = "lesion-many"


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure the test error without 1 to ``plan.deletions`` blocks, for ``plan.draws`` draws of each.

    Raises:
        ValueError: a network does not accept the data, or the folder holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress, ("residual",))
    lesions = {kind: [_draw(net.n, seed, plan) for seed, net in enumerate(seeds)] for kind, seeds in nets.items()}
    settings = {"bn": plan.bn, "images": plan.images, "plan_seed": plan.plan_seed}
    with open_run(
        NAME, nets, source, settings, {"draws": plan.draws, "deletions": plan.deletions}, folder, workers
    ) as run:
        measure_errors(run, nets, source, plan, lesions, progress)
        return run


def _draw(n: int, seed: int, plan: Plan) -> list[DrawnLesion]:
    drawn = [INTACT]
    for size in range(1, min(plan.deletions, n) + 1):
        for draw in range(plan.draws):
            chosen = stream(plan.plan_seed, "deletions", seed, size, draw).choice(n, size, replace=False)
            drawn.append(DrawnLesion(size, draw, Lesion(tuple(sorted(chosen.tolist())))))
    return drawn


def claims(run: results.Run) -> list[Claim]:
    """Test the claim of Figure 5 (a) on a run."""
    paper = "Error rises smoothly with the number of deleted modules, as fewer and fewer paths remain valid."
    errors = summarise(run)
    return [smoothness(errors, paper, "section 4.2, Figure 5 (a)", f"with {errors.sizes[-1]} blocks deleted")]
