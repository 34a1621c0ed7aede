"""The competitors on a processor, which measure norms along single paths; checked against float64 before timing."""

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

__all__ = ["BUILDERS", "Builder", "Checked", "Competitor", "Key", "check", "composed", "engine", "loop", "recorder"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORM_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}
"""Loose in float32, since another forward pass may flip a ReLU bit; the error of a wrong gradient is as large as the
gradient."""


@dataclass(frozen=True)
class Key:
    """The name of a competitor (``loop``, ``composition`` or ``pathnet``), its BN mode and precision."""

    name: str
    bn: BatchNormMode
    precision: str

    def __str__(self) -> str:
        return f"{self.name}, {self.bn}, {self.precision}"


@dataclass(frozen=True)
class Competitor:
    """One method to measure a batch's norms along paths [P, n] of zeros and ones.

    Attributes:
        forward: records the batch again; None if each path runs its own forward pass.
        norms: runs the backward passes alone; returns norms [P].
        gradients: runs the backward passes alone; returns gradients [P, B, C, H, W].
    """

    forward: Callable[[], object] | None
    norms: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor], Tensor]


Builder = Callable[[ResidualNet, Tensor, Tensor, bool], Competitor]
"""Function that builds a competitor from a network, images, labels, and whether torch.compile may be used."""


def loop(net: ResidualNet, images: Tensor, labels: Tensor, compiled: bool) -> Competitor:
    """Build the loop that one writes first, always float32 and NCHW."""

    def measure(paths: Tensor) -> Tensor:
        return torch.cat([norms(detach_loop(net, images, labels, code)[None]) for code in paths.tolist()])

    def gradients(paths: Tensor) -> Tensor:
        return torch.stack([detach_loop(net, images, labels, code) for code in paths.tolist()])

    return Competitor(None, measure, gradients)


def composed(
    bn: BatchNormMode, precision: str, net: ResidualNet, images: Tensor, labels: Tensor, compiled: bool
) -> Competitor:
    """Build the best composition of plain PyTorch."""
    composition = Composition(net, images, labels, bn, PRECISIONS[precision], compiled)
    return Competitor(
        composition.forward,
        lambda paths: torch.stack([composition.norm(code) for code in paths.tolist()]),
        lambda paths: torch.stack([torch.cat(composition.gradients(code)) for code in paths.tolist()]),
    )


def recorder(net: ResidualNet, bn: BatchNormMode, precision: str) -> pathnet.Recorder:
    return pathnet.Recorder(net, bn, "cpu", precision)  # type: ignore[arg-type]


def engine(
    bn: BatchNormMode, precision: str, net: ResidualNet, images: Tensor, labels: Tensor, compiled: bool
) -> Competitor:
    """Build pathnet with the cpu engine."""
    record = recorder(net, bn, precision)
    tape = record(images, labels)
    # The tape of the first forward pass serves all backward passes; the tapes of timed forward passes are discarded.
    return Competitor(lambda: record(images, labels), tape.path_gradient_norms, tape.path_gradients)


BUILDERS: dict[Key, Builder] = {Key("loop", "running", "float32"): loop} | {
    Key(name, bn, precision): partial(build, bn, precision)
    for (bn, precision), (name, build) in product(
        product(get_args(BatchNormMode), PRECISIONS), (("composition", composed), ("pathnet", engine))
    )
}
"""All competitors, in the order of the tables."""


@dataclass(frozen=True)
class Checked:
    """One competitor against float64: its largest relative errors among paths, and whether it may be timed.

    ``seconds``, the time of its norms after a first run, predicts its time on the timed network.
    """

    norm: float
    gradient: float
    passed: bool
    seconds: float


def check(
    setup: Setup, compiled: bool, builders: Mapping[Key, Builder], budget: Budget | None = None
) -> dict[Key, Checked]:
    """Compare all competitors with the reference engine in float64 on a small network, on paths of each length.

    Competitors left when the budget's time is over are missing from the result.
    """
    net, (images, labels) = network(setup), batch(setup)
    paths = torch.cat([pathnet.paths.one_of_each_length(net.n, batch=k) for k in range(2)])
    checked: dict[Key, Checked] = {}
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
        # Compared with <, because a NaN must not pass.
        passed = norm < NORM_TOLERANCE[key.precision] and gradient < GRADIENT_TOLERANCE[key.precision]
        checked[key] = Checked(norm, gradient, passed, seconds)
    return checked
