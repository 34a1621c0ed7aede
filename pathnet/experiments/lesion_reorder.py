"""Figure 5 (b): blocks of equal shape swapped in random pairs (section 4.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.data.batches import sent
from pathnet.experiments.by_size import by_tau, smoothness, summarise
from pathnet.experiments.claims import Claim
from pathnet.experiments.errors import INTACT, DrawnLesion, measure_errors
from pathnet.experiments.run import Networks, Plan, check_arguments, open_run
from pathnet.lesion import Lesion
from pathnet.lesion.networks import block_shapes
from pathnet.models import ResidualNet
from pathnet.streams import stream
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "claims", "measure", "swapped"]

NAME = "lesion-reorder"


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure the test error after 1 to ``plan.swaps`` random swaps of two blocks, for ``plan.draws`` draws of each.

    Downsampling blocks keep their places.

    Raises:
        ValueError: a network does not accept the data or has no two blocks that can change places, or the folder
            holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress, ("residual",))
    lesions = {
        kind: [_draw(net, seed, source, plan) for seed, net in enumerate(seeds)] for kind, seeds in nets.items()
    }
    settings = {"bn": plan.bn, "images": plan.images, "plan_seed": plan.plan_seed}
    with open_run(NAME, nets, source, settings, {"draws": plan.draws, "swaps": plan.swaps}, folder, workers) as run:
        measure_errors(run, nets, source, plan, lesions, progress)
        return run


def _draw(net: ResidualNet, seed: int, data: Data | Batches, plan: Plan) -> list[DrawnLesion]:
    image, _ = next(data.test_batches(1))
    shapes = block_shapes(net, sent(image, next(net.parameters()).device))
    keeps = [entering == leaving for entering, leaving in shapes]
    pairs = [(i, j) for i, j in combinations(range(net.n), 2) if keeps[i] and keeps[j] and shapes[i] == shapes[j]]
    if not pairs:
        raise ValueError(f"net: expected two blocks of equal shape that can change places, got none among {net.n}")
    drawn = [INTACT]
    for size in range(1, plan.swaps + 1):
        for draw in range(plan.draws):
            chosen = stream(plan.plan_seed, "swaps", seed, size, draw).integers(len(pairs), size=size)
            drawn.append(DrawnLesion(size, draw, Lesion(order=swapped(net.n, [pairs[pair] for pair in chosen]))))
    return drawn


def swapped(n: int, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Return the order of blocks 0 to n - 1 after swapping the places of each pair, one pair after another."""
    order = list(range(n))
    for i, j in pairs:
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def claims(run: results.Run) -> list[Claim]:
    """Test the claim of Figure 5 (b) on a run."""
    paper = "Error rises smoothly as Kendall's tau between the order of the blocks and that of training falls."
    tenths = by_tau(summarise(run))
    return [smoothness(tenths, paper, "section 4.3, Figure 5 (b)", f"at a tau of {tenths.tau[-1].mean():.2g}")]
