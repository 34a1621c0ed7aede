"""Section 3, equations 4 to 6: a residual network unraveled into its paths equals the network.

The nested expression of equation 6 repeats the modules on every branch of a binary tree, and its value equals the
network's output. The sum over the 2^n paths equals it only if the network is affine. With ReLU bits and batch
normalisation frozen at one point, every module is an affine map, and paths start at the input and at the constant of
each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathnet import models, results
from pathnet.checks import described
from pathnet.data import Batches, Data
from pathnet.experiments.claims import Claim, exactly
from pathnet.experiments.run import Networks, Plan, Value, check_arguments, open_run, unfinished
from pathnet.models import Block, ResidualNet
from pathnet.streams import stream
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "claims", "measure", "nested", "paths_sum"]

NAME = "unraveled"
NESTED_BLOCKS = 3
MOST_BLOCKS = 6
WIDTH = 4
IMAGES = 4
ROUNDING = 1e-10

NESTED, PATHS = "nested expression, relative deviation", "sum over paths, relative deviation"


def nested(blocks: Sequence[Block], y0: Tensor) -> Tensor:
    """Return ``y_n`` by equation 6, as a tree of 2^n leaves; branches share no computation."""
    if not blocks:
        return y0
    last = blocks[-1]
    return last.join(last.skip(nested(blocks[:-1], y0)) + last.residual(nested(blocks[:-1], y0)))


@torch.no_grad()
def paths_sum(blocks: Sequence[Block], y0: Tensor) -> Tensor:
    """Return ``y_n`` as the sum over all paths of the network with ReLU bits and BN frozen at ``y0``.

    At the input x of a block, each branch h maps any y to ``J_h y + (h(x) - J_h x)``. The sum has one term for each
    path from the input, through Jacobians only, and one for each path from the constant of each branch.

    Args:
        blocks: n blocks in evaluation mode, joined by additions only.
        y0: [B, C, H, W], the input of the first block.
    """
    points = [y0]
    for block in blocks:
        points.append(torch.as_tensor(block(points[-1])))

    def along(path: Sequence[int], first: int, value: Tensor) -> Tensor:
        """Send ``value`` from the input of block ``first`` (from 0) along the branches of a path."""
        for i, through_module in enumerate(path, first):
            branch = blocks[i].residual if through_module else blocks[i].skip
            value = torch.func.jvp(branch, (points[i],), (value,))[1]
        return value

    n = len(blocks)
    total = torch.stack([along(path, 0, y0) for path in product((0, 1), repeat=n)]).sum(0)
    for i, block in enumerate(blocks):
        x = points[i]
        for branch in (block.skip, block.residual):
            constant = branch(x) - torch.func.jvp(branch, (x,), (x,))[1]
            total = total + torch.stack(
                [along(path, i + 1, constant) for path in product((0, 1), repeat=n - i - 1)]
            ).sum(0)
    return total


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure the deviation of both forms from the network, in float64, for 1 to 6 blocks with random weights.

    Raises:
        ValueError: an argument has the wrong type, or the folder holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress)
    images = _images(source).double()
    whole = _network(images.shape[1], plan.plan_seed)
    with open_run(NAME, {}, source, {"plan_seed": plan.plan_seed}, {}, folder, workers) as run:
        if workers.leads:
            _measure(run, images, whole)
        return run


def _measure(run: results.Run, images: Tensor, whole: ResidualNet) -> None:
    known = {(row.quantity, row.index) for row in run.rows(Value)}
    rows = []
    y0 = whole.stem(images).detach()
    for n in range(1, MOST_BLOCKS + 1):
        blocks = list(whole)[:n]
        y_n = y0
        for block in blocks:
            y_n = block(y_n).detach()
        for quantity, form in ((NESTED, nested), (PATHS, paths_sum)):
            if (quantity, n) not in known:
                off = float((form(blocks, y0) - y_n).norm() / y_n.norm())
                rows.append(Value("", 0, 0, quantity, n, off))
    run.add_rows(rows)


def _images(data: Data | Batches) -> Tensor:
    images, _ = next(data.test_batches(IMAGES))
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"data: expected images, floating-point [B, C, H, W], got {described(images)}")
    return images[:IMAGES].cpu()


def _network(channels: int, seed: int) -> ResidualNet:
    """Return six basic blocks, two of which change the shape, with random statistics and affine parameters."""
    rng = stream(seed, "unraveled")
    net = models.preact_resnet(2 * MOST_BLOCKS + 2, WIDTH, in_channels=channels).double().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_floating_point():
                    spread = torch.from_numpy(rng.normal(0, 0.3, tuple(tensor.shape)))
                    tensor.data.copy_(1 + spread.abs() if name == "running_var" else spread)
    return net.requires_grad_(False)


def claims(run: results.Run) -> list[Claim]:
    """Test the claims of section 3 on a run."""
    rows = run.rows(Value)
    of_nested = {row.index: row.value for row in rows if row.quantity == NESTED}
    of_paths = [row.value for row in rows if row.quantity == PATHS]
    if NESTED_BLOCKS not in of_nested or not of_paths:
        raise unfinished(run)
    three, worst = of_nested[NESTED_BLOCKS], max(of_paths)
    bound = f"the relative deviation of y_n is at most {ROUNDING:g} in float64"
    return [
        Claim(
            "The nested expression of a network of three blocks, which follows 2^3 paths, equals the network.",
            "section 3, equations 4 to 6",
            bound,
            f"{three:.2g}",
            exactly(three <= ROUNDING),
        ),
        Claim(
            "With ReLU bits and BN frozen, the network equals the sum over its 2^n paths and the paths from biases.",
            "section 3, Figure 1",
            f"{bound}, for every n up to {MOST_BLOCKS}",
            f"{worst:.2g} in the worst case",
            exactly(worst <= ROUNDING),
        ),
    ]
