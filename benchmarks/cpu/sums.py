"""The exact sums by length beside the same number of modules walked path by path.

n (n + 1) / 2 modules make the sums over all 2^n paths; as many are on one path of each length. Both walk the same
kernels and give the same number of results, gradients or their norms, so that the ratio shows what carrying all
coefficients costs or saves.
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
from benchmarks.outcome import Failed, Found

__all__ = ["sums_by_length"]


def sums_by_length(field: Field) -> Found:
    """All combinations of BN mode and precision that are timed elsewhere too, each at the batches of the sizes."""
    found: Found = {"blocks": field.n, "error": {}, "rows": []}
    for bn in ("running", "batch"):
        for precision, tolerance in NORM_TOLERANCE.items():
            error = _error(field, bn, precision)
            found["error"][f"{bn}, {precision}"] = str(error) if error != error else error
            if not error < tolerance:
                raise Failed(f"sums by length, {bn}, {precision}, are off by {error:.1g}, hence not timed", found)
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
        found["rows"].append(
            {
                "bn": bn,
                "precision": precision,
                "batch": size,
                "share": timings["sums"].median / timings["one by one"].median,
                "norms_share": timings["norms"].median / timings["norms one by one"].median,
                "timings": {name: timing.facts() for name, timing in timings.items()},
            }
        )
    return found


def _error(field: Field, bn: str, precision: str) -> float:
    """The largest relative error of the norm of a length's sum, against float64 sums over every single path."""
    net = network(field.sizes.checked)
    tape = recorder(net, bn, precision)(*batch(field.sizes.checked))
    codes = pathnet.paths.enumerate_all(net.n)
    walk = truth.walk if bn == "running" else truth.walk_through_statistics
    every, lengths = walk(tape, pathnet.paths.routing(codes)), codes.sum(1)
    expected = torch.stack([every[lengths == k].sum(0).norm() for k in range(net.n + 1)])
    own = tape.gradient_by_length().flatten(1).norm(dim=1)
    return float((own / expected - 1).abs().max())
