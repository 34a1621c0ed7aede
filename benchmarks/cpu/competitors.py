"""Who measures norms along single paths on a processor: checked against float64 first, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import get_args

import torch
from torch import Tensor

import pathnet
from benchmarks.baselines import detach_loop, norms
from benchmarks.cases import Setup, batch, network
from benchmarks.cpu.budget import Budget
from benchmarks.cpu.composition import Composition
from pathnet.models import ResidualNet
from pathnet.recording import BatchNormMode

__all__ = ["BUILDERS", "Builder", "Checked", "Competitor", "Key", "check", "composed", "loop", "own", "recorder"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORM_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}
"""Loose in float32, since a forward of its own may flip a ReLU bit; a wrong walk is off by its own size."""


@dataclass(frozen=True)
class Key:
    """Who: ``loop``, ``composition`` or ``pathnet``; in which BN mode and precision."""

    name: str
    bn: BatchNormMode
    precision: str

    def __str__(self) -> str:
        return f"{self.name}, {self.bn}, {self.precision}"


@dataclass(frozen=True)
class Competitor:
    """One way to measure a batch's norms along paths [P, n] of zeros and ones.

    Attributes:
        forward: records the batch anew; None where each path runs the network forward itself.
        norms: the walks alone, [P].
        gradients: the walks alone, [P, B, C, H, W].
    """

    forward: Callable[[], object] | None
    norms: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor], Tensor]


Builder = Callable[[ResidualNet, Tensor, Tensor, bool], Competitor]
"""Makes a competitor of a network, images, labels, and whether torch.compile takes part."""


def loop(net: ResidualNet, images: Tensor, labels: Tensor, compiled: bool) -> Competitor:
    """Always float32 and NCHW: what is first written."""

    def measure(paths: Tensor) -> Tensor:
        return torch.cat([norms(detach_loop(net, images, labels, code)[None]) for code in paths.tolist()])

    def gradients(paths: Tensor) -> Tensor:
        return torch.stack([detach_loop(net, images, labels, code) for code in paths.tolist()])

    return Competitor(None, measure, gradients)


def composed(
    bn: BatchNormMode, precision: str, net: ResidualNet, images: Tensor, labels: Tensor, compiled: bool
) -> Competitor:
    composition = Composition(net, images, labels, bn, PRECISIONS[precision], compiled)
    return Competitor(
        composition.forward,
        lambda paths: torch.stack([composition.norm(code) for code in paths.tolist()]),
        lambda paths: torch.stack([torch.cat(composition.walk(code)) for code in paths.tolist()]),
    )


def recorder(net: ResidualNet, bn: BatchNormMode, precision: str) -> pathnet.Recorder:
    return pathnet.Recorder(net, bn, "cpu", precision)  # type: ignore[arg-type]


def own(
    bn: BatchNormMode, precision: str, net: ResidualNet, images: Tensor, labels: Tensor, compiled: bool
) -> Competitor:
    record = recorder(net, bn, precision)
    tape = record(images, labels)
    # The tape of the first forward pass serves all walks; those timed are the same, and are let go.
    return Competitor(lambda: record(images, labels), tape.path_gradient_norms, tape.path_gradients)


BUILDERS: dict[Key, Builder] = {Key("loop", "running", "float32"): loop} | {
    Key(name, bn, precision): partial(build, bn, precision)
    for (bn, precision), (name, build) in product(
        product(get_args(BatchNormMode), PRECISIONS), (("composition", composed), ("pathnet", own))
    )
}
"""Everyone, in the order of the tables."""


@dataclass(frozen=True)
class Checked:
    """One competitor against float64: its largest relative errors among paths, and whether it may be timed.

    ``seconds`` that its norms took, once it had run, tell how long it will take on the network that is timed.
    """

    norm: float
    gradient: float
    passed: bool
    seconds: float


def check(
    setup: Setup, compiled: bool, builders: Mapping[Key, Builder], budget: Budget | None = None
) -> dict[Key, Checked]:
    """Everyone on a small network against the reference engine in float64: paths of each length and of any.

    Whoever comes when the budget's time is over is not in it.
    """
    net, (images, labels) = network(setup), batch(setup)
    paths = torch.cat([pathnet.paths.one_of_each_length(net.n, batch=k) for k in range(2)])
    found: dict[Key, Checked] = {}
    truths: dict[BatchNormMode, Tensor] = {}
    for key, build in builders.items():
        if budget is not None and budget.left <= 0:
            break
        if key.bn not in truths:
            truths[key.bn] = pathnet.record(net, images, labels, key.bn, "reference", "float64").path_gradients(paths)
        truth = truths[key.bn]
        sizes = truth.flatten(1).norm(dim=1)
        competitor = build(net, images, labels, compiled)
        gradient = float(((competitor.gradients(paths).double() - truth).flatten(1).norm(dim=1) / sizes).max())
        start = time.perf_counter()
        norm = float((competitor.norms(paths).double() / sizes - 1).abs().max())
        seconds = time.perf_counter() - start
        # Not "and": a NaN is above every bound, and below none.
        passed = norm < NORM_TOLERANCE[key.precision] and gradient < GRADIENT_TOLERANCE[key.precision]
        found[key] = Checked(norm, gradient, passed, seconds)
    return found
