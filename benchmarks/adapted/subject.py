"""One timed model with its competitors, checked against float64 before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

import pathnet
from benchmarks.adapted.cases import Case, Structure, structure
from benchmarks.adapted.rivals import KeptGraphs, detach_loop, sums_along
from benchmarks.outcome import Failed, Findings
from pathnet.full_precision import full_precision

__all__ = ["TOLERANCE", "Subject"]

TOLERANCE = 1e-4
"""Largest relative error of a gradient in float32, against float64. There are no ReLUs, whose bits rounding flips."""

CHECKED_PATHS = 4
POINTS = (-1.0, 0.5, 2.0)
"""Coefficients of the residual modules at which the polynomial of the sums by length is evaluated."""


class Subject:
    """A model, adapted, with a recorded batch.

    Attributes:
        parts: the model's parts as its author knows them, for the competitors.
        adapt_s, adapt_processor_s: seconds of each `pathnet.adapt`; in a new process the first includes imports.
    """

    def __init__(self, case: Case, engine: str, device: str = "cpu", adaptations: int = 1) -> None:
        self.case, self.device = case, torch.device(device)
        self.model, (self.inputs, self.target) = case.model(device), case.batch(device)
        self.parts: Structure = structure(self.model)
        self.adapt_s: list[float] = []
        self.adapt_processor_s: list[float] = []
        for _ in range(adaptations):
            start, began = time.perf_counter(), time.process_time()
            # A copy of its own, since the adapted network sets what gradients its model's parameters take.
            net = pathnet.adapt(case.model(device), self.inputs)
            self.adapt_s.append(time.perf_counter() - start)
            self.adapt_processor_s.append(time.process_time() - began)
        self.net, self.engine = net, engine
        self.recorder = self.new_recorder()
        self.tape = self.record()
        self.n = self.tape.n

    def new_recorder(self) -> pathnet.Recorder:
        return pathnet.Recorder(self.net, engine=self.engine)

    def record(self) -> pathnet.Tape:
        return self.recorder(self.inputs, self.target)

    def forward(self) -> Tensor:
        """Run the whole model, head included, without a graph."""
        with torch.no_grad():
            return torch.as_tensor(self.model(self.inputs))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def keep_graphs(self) -> KeptGraphs:
        return KeptGraphs(self.parts, self.inputs, self.target)

    @cached_property
    def kept(self) -> KeptGraphs:
        return self.keep_graphs()

    def paths(self, count: int) -> Tensor:
        """Return uint8 [count, n], drawn uniformly from all 2^n."""
        return torch.randint(0, 2, (count, self.n), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def loop(self, paths: Tensor) -> Tensor:
        """Return the norms [P] along paths by the usual loop."""
        return torch.stack(
            [detach_loop(self.parts, self.inputs, self.target, path).norm() for path in paths.tolist()]
        )

    def check(self) -> Findings:
        """Compare all competitors with float64 `detach` loops; return their largest relative errors.

        Raises:
            Failed: a competitor is wrong.
        """
        paths = self.paths(CHECKED_PATHS)
        with full_precision():
            double = structure(self.case.model(str(self.device)).double())
            inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
            truth = torch.stack([detach_loop(double, inputs, self.target, path) for path in paths.tolist()])
            gradients: dict[str, Callable[[], Tensor]] = {
                "pathnet, one call": lambda: self.tape.path_gradients(paths),
                "pathnet, a call a path": lambda: torch.cat([self.tape.path_gradients(path[None]) for path in paths]),
                "fifteen lines": lambda: torch.stack([self.kept.gradient(path) for path in paths.tolist()]),
            }
            errors = {name: _error(compute(), truth) for name, compute in gradients.items()}
            sizes = truth.flatten(1).norm(dim=1)
            for name, norms in (
                ("norms of pathnet", self.tape.path_gradient_norms(paths)),
                ("norms of the fifteen lines", self.kept.norms(paths)),
                ("norms of the loop", self.loop(paths)),
            ):
                errors[name] = _error(norms, sizes)
            sums = self.tape.gradient_by_length()
            powers = torch.tensor(POINTS, dtype=sums.dtype, device=sums.device)[:, None] ** torch.arange(
                self.n + 1, dtype=sums.dtype, device=sums.device
            )
            evaluated = torch.einsum("xk,k...->x...", powers, sums)
            expected = torch.stack([sums_along(double, inputs, self.target, point) for point in POINTS])
            errors["sums by length"] = _error(evaluated, expected)
        # Compared with <, because a NaN must not pass.
        wrong = [f"{name} by {error:.1g}" for name, error in errors.items() if not error < TOLERANCE]
        if wrong:
            raise Failed(f"{self.case.name}: wrong, hence not timed: {', '.join(wrong)}", {"errors": errors})
        return {"paths": CHECKED_PATHS, "errors": errors, "tolerance": TOLERANCE}


def _error(measured: Tensor, truth: Tensor) -> float:
    """Return the largest relative error of the first dimension's entries."""
    measured, truth = measured.double().reshape(len(truth), -1), truth.reshape(len(truth), -1)
    return float(((measured - truth).norm(dim=1) / truth.norm(dim=1)).max())
