"""The competitors: methods to measure norms along paths, with one interface; checked against float64 before
timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import pathnet
from benchmarks.baselines import BatchedGradients, detach_loop, graphed, norms
from benchmarks.cases import Setup, batch, network
from benchmarks.composed import Composed
from pathnet.full_precision import full_precision
from pathnet.models import ResidualNet

__all__ = ["Competitor", "Entrants", "LOOP", "check", "build_entrants", "recorder"]

LOOP = "loop"
CHECK_DEPTH, CHECK_SIDE, CHECK_BATCH = 14, 16, 4
NORM_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float32": 2e-2, "bfloat16": 5e-2}
"""Loose in float32, since another forward pass may flip a ReLU bit; the error of a wrong gradient is as large as the
gradient."""


@dataclass(frozen=True)
class Competitor:
    """One method to measure a batch's norms along fixed paths.

    Attributes:
        norms: runs a forward pass and the backward passes; returns norms [P].
        backward: runs the backward passes alone; returns norms [P]. None if they need a forward pass.
        gradients: runs a forward pass and the backward passes; returns gradients [P, B, C, H, W].
        remark: note for readers of its timing.
    """

    precision: str
    norms: Callable[[], Tensor]
    backward: Callable[[], Tensor] | None
    gradients: Callable[[], Tensor]
    remark: str = ""


@dataclass(frozen=True)
class Entrants:
    """All competitors on one network, batch and set of paths, and the reasons that others are missing."""

    competitors: dict[str, Competitor]
    unavailable: dict[str, str]

    @property
    def best_composition(self) -> list[str]:
        return [name for name in self.competitors if name.startswith("composed")]

    def pathnet(self, precision: str) -> str:
        """Return the name of pathnet's competitor in a precision."""
        return f"pathnet {precision}"


def recorder(setup: Setup, net: ResidualNet, precision: str) -> Callable[[Tensor, Tensor], pathnet.Tape]:
    """Return a recorder of batches through one network, prepared once."""
    return pathnet.Recorder(net, engine=setup.engine, precision=precision)  # type: ignore[arg-type]


def build_entrants(setup: Setup, net: ResidualNet, images: Tensor, labels: Tensor, paths: Tensor) -> Entrants:
    """Build all competitors; those that cannot be built are left out with the error."""
    competitors: dict[str, Competitor] = {}
    unavailable: dict[str, str] = {}
    entries: dict[str, Callable[[], dict[str, Competitor]]] = {
        LOOP: lambda: _loop(net, images, labels, paths),
        "composed": lambda: _composed(setup, net, images, labels, paths),
        "batched gradients": lambda: _batched(net, images, labels, paths),
    }
    for precision in setup.precisions:
        entries[f"pathnet {precision}"] = partial(_pathnet, setup, net, images, labels, paths, precision)
    for name, build in entries.items():
        try:
            built = build()
            for competitor in built.values():
                competitor.norms()
            setup.synchronize()
        except (RuntimeError, ValueError) as error:
            unavailable[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            competitors |= built
    return Entrants(competitors, unavailable)


def check(setup: Setup) -> dict[str, dict[str, float | bool]]:
    """Compare every competitor with the reference engine in float64 on a small network; return relative errors.

    TF32 is off here, where numbers are compared, and at PyTorch's default where they are timed.
    """
    small = replace(setup, depth=min(setup.depth, CHECK_DEPTH), side=CHECK_SIDE, batch=CHECK_BATCH)
    net, (images, labels) = network(small), batch(small)
    paths = torch.cat([pathnet.paths.one_of_each_length(net.n, batch=k) for k in range(2)])
    truth = pathnet.record(net, images, labels, engine="reference", precision="float64").path_gradients(paths)
    sizes = truth.flatten(1).norm(dim=1)
    errors: dict[str, dict[str, float | bool]] = {}
    with full_precision():
        for name, competitor in build_entrants(small, net, images, labels, paths).competitors.items():
            # In this order, since a captured graph of backward passes needs a forward pass before it.
            norm = float((competitor.norms().double() / sizes - 1).abs().max())
            difference = (competitor.gradients().double() - truth).flatten(1).norm(dim=1)
            gradient = float((difference / sizes).max())
            passed = norm < NORM_TOLERANCE[competitor.precision]
            passed &= gradient < GRADIENT_TOLERANCE[competitor.precision]
            errors[name] = {"norm": norm, "gradient": gradient, "passed": passed}
    return errors


def _loop(net: ResidualNet, images: Tensor, labels: Tensor, paths: Tensor) -> dict[str, Competitor]:
    codes = paths.tolist()

    def gradients() -> Tensor:
        return torch.stack([detach_loop(net, images, labels, code) for code in codes])

    def measure() -> Tensor:
        return torch.cat([norms(detach_loop(net, images, labels, code)[None]) for code in codes])

    return {LOOP: Competitor("float32", tuned(measure), None, tuned(gradients))}


def _batched(net: ResidualNet, images: Tensor, labels: Tensor, paths: Tensor) -> dict[str, Competitor]:
    batched = BatchedGradients(net, images, labels)

    def gradients() -> Tensor:
        batched.forward()
        return batched.gradients(paths)

    def backward() -> Tensor:
        return norms(batched.gradients(paths))

    def measure() -> Tensor:
        batched.forward()
        return backward()

    return {"batched gradients": Competitor("float32", tuned(measure), tuned(backward), tuned(gradients))}


def _composed(setup: Setup, net: ResidualNet, images: Tensor, labels: Tensor, paths: Tensor) -> dict[str, Competitor]:
    """Build the composition in all its forms, with graphs captured outside of the timed part.

    A graph for each path (or group of paths) flatters it: a new batch has new paths, whose graphs are not captured
    yet.
    """

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return graphed(work) if setup.cuda else work

    with full_precision(), _benchmark_mode():
        composed = Composed(net, images, labels, torch.bfloat16)
        remark = ""
        try:
            forward = capture(composed.forward)
        except RuntimeError as error:
            forward, remark = composed.forward, f"its forward pass runs eagerly: {' '.join(str(error).split())[:200]}"
        forward()
        every = composed.rows(paths)

        def captured_backward(group: Tensor) -> Callable[[], Tensor]:
            rows = composed.rows(group)
            return capture(lambda: norms(composed.gradients(rows, len(group))))

        def groups(size: int) -> Callable[[], Tensor]:
            works = [captured_backward(paths[start : start + size]) for start in range(0, len(paths), size)]
            return lambda: torch.cat([work() for work in works])

        along, codes = composed.module_graphs(capture), paths.tolist()
        backward_passes = {
            "a graph a path": groups(1),
            "a graph a module": lambda: torch.cat([norms(along(code)) for code in codes]),
        }
        if len(paths) > 1:
            backward_passes |= {"groups of 8": groups(8), "all at once": groups(len(paths))}

    def competitor(backward: Callable[[], Tensor]) -> Competitor:
        def measure() -> Tensor:
            with full_precision():
                forward()
                return backward()

        def gradients() -> Tensor:
            with full_precision():
                forward()
                return composed.gradients(every, len(paths)).permute(0, 1, 4, 2, 3)

        return Competitor("bfloat16", tuned(measure), tuned(backward), tuned(gradients), remark)

    return {f"composed, {name}": competitor(backward) for name, backward in backward_passes.items()}


def _pathnet(
    setup: Setup, net: ResidualNet, images: Tensor, labels: Tensor, paths: Tensor, precision: str
) -> dict[str, Competitor]:
    record = recorder(setup, net, precision)
    tape = record(images, labels)
    return {
        f"pathnet {precision}": Competitor(
            precision,
            lambda: record(images, labels).path_gradient_norms(paths),
            lambda: tape.path_gradient_norms(paths),
            lambda: record(images, labels).path_gradients(paths),
        )
    }


@contextmanager
def _benchmark_mode() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def tuned(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the work with cuDNN's benchmark mode on, to give a baseline the best that PyTorch offers."""

    def run() -> Tensor:
        with _benchmark_mode():
            return work()

    return run
