"""The exact sums by length against the same number of modules path by path.

The sums over all 2^n paths take n (n + 1) / 2 modules, as many as one path of each length. Both run the same kernels
and return the same number of gradients or norms, so the ratio is the cost of carrying all coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import pathnet
from benchmarks import truth
from benchmarks.cases import batch, network
from benchmarks.cpu.budget import LeftOut
from benchmarks.cpu.competitors import NORM_TOLERANCE, recorder
from benchmarks.cpu.field import Field
from benchmarks.outcome import Failed, Findings

__all__ = ["sums_by_length"]


def sums_by_length(field: Field) -> Findings:
    """Check and time the sums in the BN modes, precisions and batches of the sizes."""
    findings: Findings = {"blocks": field.n, "error": {}, "rows": []}
    for bn in ("running", "batch"):
        for precision, tolerance in NORM_TOLERANCE.items():
            error = _error(field, bn, precision)
            findings["error"][f"{bn}, {precision}"] = str(error) if error != error else error
            if not error < tolerance:
                raise Failed(f"sums by length, {bn}, {precision}, are off by {error:.1g}, hence not timed", findings)
    images = [size for _, _, size in field.sizes.sums]
    for position, (bn, precision, size) in enumerate(field.sizes.sums):
        share = field.budget.share(size / sum(images[position:]))
        tape = recorder(field.net, bn, precision)(*batch(field.sizes.setup, size=size))
        paths = pathnet.paths.one_of_each_length(field.n)

        def one_by_one(measure: Callable[[torch.Tensor], object], paths: torch.Tensor = paths) -> None:
            for path in paths:
                measure(path[None])

        works: dict[str, Callable[[], object]] = {
            "sums": partial(tape.gradient_by_length, scaled=True),
            "one by one": partial(one_by_one, partial(tape.path_gradients, scaled=True)),
            "norms": partial(tape.squared_norms_by_length, 1),
            "norms one by one": partial(one_by_one, tape.path_gradient_norms),
        }
        which = f"{bn}, {precision}, {size} images"
        try:
            timings = share.timed(works, field.sizes.slow_rounds, f"rounds of {which}")
        except LeftOut as left_out:
            share.cut(f"sums by length, {which}", 1, None, str(left_out))
            continue
        findings["rows"].append(
            {
                "bn": bn,
                "precision": precision,
                "batch": size,
                "share": timings["sums"].median / timings["one by one"].median,
                "norms_share": timings["norms"].median / timings["norms one by one"].median,
                "timings": {name: timing.facts() for name, timing in timings.items()},
            }
        )
    return findings


def _error(field: Field, bn: str, precision: str) -> float:
    """Return the largest relative error of the norm of a length's sum, against float64 sums over all single paths."""
    net = network(field.sizes.checked)
    tape = recorder(net, bn, precision)(*batch(field.sizes.checked))
    codes = pathnet.paths.enumerate_all(net.n)
    exact = truth.gradients if bn == "running" else truth.gradients_through_statistics
    grads, lengths = exact(tape, pathnet.paths.routing(codes)), codes.sum(1)
    expected = torch.stack([grads[lengths == k].sum(0).norm() for k in range(net.n + 1)])
    measured = tape.gradient_by_length().flatten(1).norm(dim=1)
    return float((measured / expected - 1).abs().max())
