"""Highway networks (section 2, equation 3): lesions, learned gates, and the parts of the gradient that flow through
skip connections, residual modules and the gates themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pathnet
from pathnet import paths, results
from pathnet.data import Batches, Data
from pathnet.data.batches import sent
from pathnet.experiments import lesion_single
from pathnet.experiments.claims import Claim, at_most, exactly
from pathnet.experiments.errors import Spread, spread
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.experiments.run import Networks, Plan, Value, check_amount, check_arguments, open_run, unfinished
from pathnet.experiments.units import Amounts, Rows, measure_units
from pathnet.full_precision import full_precision
from pathnet.intervals import FEWEST
from pathnet.models import Block, HighwayBlock, ResidualNet
from pathnet.recording import cross_entropy, snapshot
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "PARTS", "Highway", "claims", "measure", "summarise"]

NAME = "highway"
PARTS = ("skip", "residual", "gate")
OPENNESS, BIAS, PATH_NORM = "openness of the gate", "bias of the gate", "norm along a path"
FROZEN, PARTS_OFF, HALF_OFF = "share with gates frozen", "parts less the gradient", "half gates less halved branches"
FLOAT32 = 1e-4

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Highway:
    """Measurements of highway networks of n blocks.

    Attributes:
        openness: for each block, the mean of t over images, pixels and channels, with a 95 % interval over seeds and
            batches.
        bias: float64 [seeds, n], the mean over channels of the learned bias of each gate.
        shares: by part of a block, float64 [n]: the norm of the gradient that flows through this part of the block,
            and through all parts of the other blocks, over the sum of the three norms; the mean over seeds and
            batches.
        path_norms: for the lengths 1 to n, the norm along one path per batch with frozen gates, with a 95 % interval
            of the mean.
        frozen: norm of the gradient with all gates frozen, over the norm of the gradient.
        parts_off: largest relative deviation of the sum of a block's three parts from the gradient.
        half_off: largest relative deviation of a network whose gates are at 1/2 from a residual network with halved
            branches.
        deletions: errors without single blocks.
    """

    openness: list[Spread]
    bias: Array
    shares: dict[str, Array]
    path_norms: list[Spread]
    frozen: Spread
    parts_off: float
    half_off: float
    deletions: SingleDeletions


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure errors of highway networks without single blocks, and on random batches gates and parts of gradients.

    Raises:
        ValueError: a network has no gates or does not accept the data, or the folder holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress, ("highway",))
    for net in nets["highway"]:
        if not all(isinstance(block, HighwayBlock) for block in net):
            raise ValueError("net: expected a highway network, got blocks without gates")
    check_amount("gate_batches", source, plan.gate_batches)
    plan = replace(plan, gate_batch_size=source.batch_size(plan.gate_batch_size))
    settings = {"bn": plan.bn, "images": plan.images, "plan_seed": plan.plan_seed, "batch_size": plan.gate_batch_size}
    with open_run(NAME, nets, source, settings, {"gate_batches": plan.gate_batches}, folder, workers) as run:
        lesion_single.measure_deletions(run, nets, source, plan, progress)
        _measure_gates(run, nets["highway"], source, plan, progress)
        return run


def _measure_gates(
    run: results.Run, nets: Sequence[ResidualNet], data: Data | Batches, plan: Plan, progress: Progress | None
) -> None:
    recorders = [pathnet.Recorder(net, engine="reference") for net in nets]

    def missing() -> list[tuple[int, int]]:
        known = {(row.seed, row.batch) for row in run.rows(Value)}
        return [unit for unit in product(range(len(nets)), range(plan.gate_batches)) if unit not in known]

    def begin(unit: list[int], _: object) -> Callable[[], tuple[Rows, str]]:
        seed, batch = unit
        rows = _batch(recorders[seed], nets[seed], data, plan, seed, batch)
        return lambda: (rows, "batches, gates")

    units, total = run.workers.agree(missing), len(nets) * plan.gate_batches
    measure_units(run, units, begin, Amounts(total, total - len(units), [1] * len(units)), progress)


def _batch(
    recorder: pathnet.Recorder, net: ResidualNet, data: Data | Batches, plan: Plan, seed: int, batch: int
) -> list[Value]:
    """Return all measurements on one batch, which are written together."""
    device = next(net.parameters()).device
    images, labels = (sent(part, device) for part in data.random_batch(plan.gate_batch_size, plan.plan_seed, batch))
    rows: list[Value] = []

    def note(quantity: str, values: list[float]) -> None:
        rows.extend(Value("highway", seed, batch, quantity, i, value) for i, value in enumerate(values))

    note(OPENNESS, _openness(net, images))
    tape = recorder(images, labels)
    all_parts = torch.ones(1, net.n, 3)
    whole, frozen = _gradient(net, images, labels), tape.routed_gradients(all_parts[..., :2])[0]
    note(FROZEN, [float(frozen.norm() / whole.norm())])
    deviations = []
    shares: list[Tensor] = []
    for block in range(net.n):
        routing = all_parts.repeat(3, 1, 1)
        routing[:, block] = torch.eye(3)
        parts = tape.routed_gradients(routing)
        deviations.append(float((parts.sum(0) - whole).norm() / whole.norm()))
        norms = parts.flatten(1).norm(dim=1)
        shares.append(norms / norms.sum())
    note(PARTS_OFF, deviations)
    for part, by_block in zip(PARTS, torch.stack(shares).T.tolist(), strict=True):
        note(part, by_block)
    note(PATH_NORM, tape.path_gradient_norms(paths.one_of_each_length(net.n, plan.plan_seed, batch)).tolist())
    if batch == 0:
        note(
            BIAS,
            [
                float(torch.as_tensor(block.gate.bias).detach().mean())
                for block in net
                if isinstance(block, HighwayBlock)
            ],
        )
        note(HALF_OFF, [_half_off(net, images)])
    return rows


@full_precision()
def _gradient(net: ResidualNet, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient at ``y_0`` through whole blocks, by autograd; the parts must add up to it."""
    frozen = snapshot(net, "running", torch.float32)
    y = y0 = frozen.stem(images).detach().requires_grad_()
    for block in frozen:
        y = checkpoint(block, y, use_reentrant=False)
    return torch.as_tensor(torch.autograd.grad(cross_entropy(frozen.head(y), labels), y0)[0])


@torch.no_grad()
def _openness(net: ResidualNet, images: Tensor) -> list[float]:
    """Return the mean of t for each block."""
    frozen = snapshot(net, "running", torch.float32)
    y, openness = frozen.stem(images), []
    for block in frozen:
        assert isinstance(block, HighwayBlock)
        openness.append(float(block.openness(y).mean()))
        y = block(y)
    return openness


class _Halved(Block):
    """A block ``y = (s(x) + f(x)) / 2`` with the branches of a highway block."""

    def __init__(self, block: HighwayBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        skip, residual = pathnet.models.PreactBlock.branches(self.block, x)
        return 0.5 * skip + 0.5 * residual


@torch.no_grad()
def _half_off(net: ResidualNet, images: Tensor) -> float:
    """Return the relative deviation of a network with all gates at 1/2 from one with halved branches, in float64.

    This is equation 3 with t = 1/2.
    """
    even = copy.deepcopy(net).double().eval()
    blocks = [block for block in even if isinstance(block, HighwayBlock)]
    for block in blocks:
        nn.init.zeros_(block.gate.weight)
        nn.init.zeros_(block.gate.bias)  # type: ignore[arg-type]
    expected = ResidualNet(even.stem, [_Halved(block) for block in blocks], even.head)(images.double())
    return float((even(images.double()) - expected).norm() / expected.norm())


def summarise(run: results.Run) -> Highway:
    """Summarise the measurements over seeds and batches.

    Raises:
        ValueError: the gates of some network are not measured yet.
    """
    rows = run.rows(Value)
    n, seeds = run.fact("networks", "highway", 0, "blocks"), len(run.fact("networks", "highway"))
    if len({row.seed for row in rows}) < seeds:
        raise unfinished(run)

    def of(quantity: str, index: int) -> list[float]:
        return [row.value for row in rows if row.quantity == quantity and row.index == index]

    return Highway(
        [spread(of(OPENNESS, block)) for block in range(n)],
        np.array([of(BIAS, block) for block in range(n)]).reshape(n, seeds).T,
        {part: np.array([np.mean(of(part, block)) for block in range(n)]) for part in PARTS},
        [spread(of(PATH_NORM, length)) for length in range(n)],
        spread(of(FROZEN, 0)),
        max(row.value for row in rows if row.quantity == PARTS_OFF),
        max(row.value for row in rows if row.quantity == HALF_OFF),
        lesion_single.summarise(run)["highway"],
    )


def claims(run: results.Run) -> list[Claim]:
    """Test the claims about highway networks on a run."""
    summary = summarise(run)
    where = "section 2, equation 3"
    openness, low, high = np.array([[block.mean, block.low, block.high] for block in summary.openness]).T
    if summary.openness[0].count >= FEWEST:  # a gate that never moves, such as a shut one, has no interval of its own
        low, high = (np.where(np.isnan(ends), openness, ends) for ends in (low, high))
    # Gates are measured on the same batches, so the mean of the ends is no narrower than an interval of the mean.
    mean = Spread(openness.mean(), low.mean(), high.mean(), summary.openness[0].count)
    return [
        Claim(
            "Up to the factor 1/2, a residual network is a highway network whose gates are all at 1/2.",
            where,
            "the relative deviation from a network with halved branches is at most 1e-10 in float64",
            f"{summary.half_off:.2g}",
            exactly(summary.half_off <= 1e-10),
        ),
        Claim(
            "The gradient through a block has three parts: skip connection, residual module, and the gate itself.",
            where,
            f"the three parts add up to the gradient within {FLOAT32:g} in float32",
            f"{summary.parts_off:.2g} in the worst case; with all gates frozen, the gradient keeps {summary.frozen} "
            "of its norm",
            exactly(summary.parts_off <= FLOAT32),
        ),
        Claim(
            "Gates biased to carry prefer short paths.",
            where,
            "the mean openness of the learned gates is less than 1/2",
            f"{mean} in the mean, {100 * openness.min():.3g} to {100 * openness.max():.3g} % by block: a path then "
            f"passes through {openness.sum():.3g} of {len(openness)} modules",
            at_most(mean.low, mean.high, 0.5),
        ),
    ]
