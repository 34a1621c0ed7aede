"""Figure 5 (b): blocks of equal shape swapped in random pairs (section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from pathnet import results
from pathnet.data import Data
from pathnet.experiments.by_size import by_tau, smoothness, summarise
from pathnet.experiments.errors import INTACT, Drawn, measure_errors
from pathnet.experiments.run import Claim, Networks, Plan, check_arguments, opened
from pathnet.lesion import Lesion
from pathnet.lesion.networks import block_shapes
from pathnet.models import ResidualNet
from pathnet.streams import stream
from pathnet.training import Progress

__all__ = ["NAME", "claims", "measure", "swapped"]

NAME = "lesion-reorder"


def measure(
    nets: Networks, data: Data, plan: Plan, folder: str | Path, progress: Progress | None = None
) -> results.Run:
    """The test error after 1 to ``plan.swaps`` swaps of two random blocks, ``plan.draws`` draws of each number for
    each network. Downsampling blocks keep their places.

    Raises:
        ValueError: a network does not take the data or has no two blocks that can change places, or the folder holds
            another run.
    """
    check_arguments(nets, data, plan, folder, progress, ("residual",))
    asked = {kind: [_draw(net, seed, data, plan) for seed, net in enumerate(own)] for kind, own in nets.items()}
    settings = {"bn": plan.bn, "images": plan.images, "plan_seed": plan.plan_seed}
    with opened(NAME, nets, data, settings, {"draws": plan.draws, "swaps": plan.swaps}, folder) as run:
        measure_errors(run, nets, data, plan, asked, progress)
        return run


def _draw(net: ResidualNet, seed: int, data: Data, plan: Plan) -> list[Drawn]:
    some, _ = next(data.test_batches(1))
    shapes = block_shapes(net, some.to(next(net.parameters()).device))
    keeps = [entering == leaving for entering, leaving in shapes]
    pairs = [(i, j) for i, j in combinations(range(net.n), 2) if keeps[i] and keeps[j] and shapes[i] == shapes[j]]
    if not pairs:
        raise ValueError(f"net: expected two blocks of equal shape that can change places, got none among {net.n}")
    drawn = [INTACT]
    for size in range(1, plan.swaps + 1):
        for draw in range(plan.draws):
            chosen = stream(plan.plan_seed, "swaps", seed, size, draw).integers(len(pairs), size=size)
            drawn.append(Drawn(size, draw, Lesion(order=swapped(net.n, [pairs[pair] for pair in chosen]))))
    return drawn


def swapped(n: int, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The blocks 0 to n - 1 after the places of each pair have changed their blocks, one pair after the other."""
    order = list(range(n))
    for i, j in pairs:
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of Figure 5 (b) beside this run."""
    paper = "Error rises smoothly as Kendall's tau of the blocks' order with that of training falls."
    found = by_tau(summarise(run))
    return [smoothness(found, paper, "section 4.3, Figure 5 (b)", f"at a tau of {found.tau[-1].mean():.2g}")]
