"""The steps that measure: accuracy, sweeps, single paths, scaling, deletions, sums by length. Each returns what it
found, as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

import pathnet
from benchmarks import truth
from benchmarks.cases import Setup, batch, network, path_flops
from benchmarks.competitors import LOOP, Field, check, field, recorder
from benchmarks.outcome import Failed, Found
from benchmarks.timing import Timing, interleaved
from pathnet.models import ResidualNet

__all__ = ["accuracy", "deletions", "paths", "scaling", "sums", "sweep", "whole_sweep"]

TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 2e-2)}
"""Relative errors allowed on a batch's norm and on a sample's, by precision."""

LESION_TOLERANCE = 1e-3
IMAGE_BATCHES = 8
TOO_LONG = 5.0
"""Seconds: a size whose one call would take longer is left out of the scaling."""


def accuracy(setup: Setup) -> Found:
    """Norms against the float64 walk on the same record, by length; paths of each length and a random routing."""
    net, (images, labels) = network(setup), batch(setup)
    rows, wrong = [], []
    for precision, record in _served(setup, net, images, labels).items():
        tape = record(images, labels)
        batch_bound, sample_bound = TOLERANCES[precision]
        for length in setup.lengths:
            routing = pathnet.paths.routing(pathnet.paths.sample(net.n, length, 2))
            errors = truth.errors(tape, routing)
            rows.append({"precision": precision, "length": length, **asdict(errors)})
            if not (errors.batch_norm <= batch_bound and errors.sample_norm <= sample_bound):
                wrong.append(f"{precision} at length {length}")
    found: Found = {"rows": rows, "tolerances": TOLERANCES}
    if wrong:
        raise Failed(f"norms beyond the tolerances: {', '.join(wrong)}", found)
    return found


def sweep(setup: Setup) -> Found:
    """One path of every length on one batch, forward pass included, by every competitor; our parts one by one."""
    checked = _checked(setup)
    net, (images, labels) = network(setup), batch(setup)
    paths = pathnet.paths.one_of_each_length(net.n)
    racing = field(setup, net, images, labels, paths)
    works: dict[str, Callable[[], object]] = {name: own.norms for name, own in racing.competitors.items()}
    served = [precision for precision in setup.precisions if racing.own(precision) in racing.competitors]
    for precision in served:
        record = recorder(setup, net, precision)
        works[f"record {precision}"] = lambda record=record: record(images, labels)  # type: ignore[misc]
        works[f"walk {precision}"] = racing.competitors[racing.own(precision)].walk  # type: ignore[assignment]
    left = torch.randn(setup.matmul, setup.matmul, device=setup.device).bfloat16()
    right = torch.randn(setup.matmul, setup.matmul, device=setup.device).bfloat16()
    works["matrix product"] = lambda: left @ right
    timings = interleaved(setup, works)
    best = min(racing.best_composition, key=lambda name: timings[name].median, default=None)
    product = 2 * setup.matmul**3 / timings["matrix product"].median
    flops = path_flops(net, setup.side, paths) * setup.batch
    found: Found = {
        "check": checked,
        "paths": len(paths),
        "batch": setup.batch,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "unavailable": racing.unavailable,
        "remarks": {name: own.remark for name, own in racing.competitors.items() if own.remark},
        "best_composition": best,
        "extrapolated_to_1000_batches_s": {name: 1000 * timings[name].median for name in racing.competitors},
        "matrix_product_flops_per_s": product,
        "walk_flops": flops,
        "own": {precision: _own(precision, timings, racing, best, flops, product) for precision in served},
    }
    if not served:
        raise Failed("no precision is served", found)
    return found


def _own(
    precision: str, timings: dict[str, Timing], racing: Field, best: str | None, flops: int, product: float
) -> Found:
    own, walk = timings[racing.own(precision)].median, timings[f"walk {precision}"].median
    return {
        "times_faster_than_loop": timings[LOOP].median / own if LOOP in timings else None,
        "times_faster_than_composed": timings[best].median / own if best else None,
        "record_share": timings[f"record {precision}"].median / own,
        "walk_flops_per_s": flops / walk,
        "share_of_matrix_product": flops / walk / product,
    }


def whole_sweep(setup: Setup) -> Found:
    """The paper's sweep by our engine, batch after batch on the clock; paths are drawn beforehand, and that timed."""
    net = network(setup)
    batches = [batch(setup, number) for number in range(IMAGE_BATCHES)]
    began = time.perf_counter()
    paths = [pathnet.paths.one_of_each_length(net.n, batch=number) for number in range(setup.sweep_batches)]
    found: Found = {"drawing_paths_s": time.perf_counter() - began, "precisions": {}}
    for precision, record in _served(setup, net, *batches[0]).items():
        record(*batches[0]).path_gradient_norms(paths[0])
        setup.synchronize()
        norms: list[Tensor] = []
        began = time.perf_counter()
        for number, own in enumerate(paths):
            norms.append(record(*batches[number % IMAGE_BATCHES]).path_gradient_norms(own))
            if number % 50 == 49:
                setup.synchronize()
                if time.perf_counter() - began > setup.seconds:
                    break
        measured = torch.stack(norms).cpu()
        seconds = time.perf_counter() - began
        found["precisions"][precision] = {
            "seconds": seconds,
            "batches": len(norms),
            "measurements": measured.numel(),
            "complete": len(norms) == 1000,
            "seconds_for_1000_batches": seconds * 1000 / len(norms),
            "positive_and_finite": bool(((measured > 0) & measured.isfinite()).all()),
            "mean_norm_by_length": measured.mean(0).tolist(),
        }
    return found


def paths(setup: Setup) -> Found:
    """One path on one batch, by length and competitor: with its forward pass, and the walk alone."""
    checked = _checked(setup)
    net, (images, labels) = network(setup), batch(setup)
    rows = []
    for length in setup.lengths:
        racing = field(setup, net, images, labels, pathnet.paths.sample(net.n, length, 1))
        works: dict[tuple[str, str], Callable[[], object]] = {}
        for name, own in racing.competitors.items():
            works[name, "forward and walk"] = own.norms
            if own.walk is not None:
                works[name, "walk"] = own.walk
        timings = interleaved(setup, {str(key): work for key, work in works.items()})
        for name, part in works:
            rows.append({"length": length, "name": name, "part": part, **timings[str((name, part))].facts()})
    return {"check": checked, "batch": setup.batch, "rows": rows, "unavailable": racing.unavailable}


def scaling(setup: Setup) -> Found:
    """Our walks alone, as the number of paths, the batch, the depth and the width grow, one at a time."""
    found: Found = {"rows": [], "left_out": []}
    net, (images, labels) = network(setup), batch(setup)
    generator = torch.Generator().manual_seed(0)
    for precision, record in _served(setup, net, images, labels).items():
        tape, per_path = record(images, labels), 0.0
        for count in setup.path_counts:
            codes = torch.randint(0, 2, (count, net.n), generator=generator, dtype=torch.uint8)
            if count * per_path > TOO_LONG:
                found["left_out"].append({"precision": precision, "paths": count, "reason": "too long a call"})
                continue
            row = _walk_row(setup, tape, net, codes, setup.batch)
            per_path = row["median_s"] / count
            found["rows"].append({"varied": "paths", "precision": precision, **row})
        for size in setup.batches:
            own = replace(setup, batch=size)
            row = _walk_row(own, record(*batch(own)), net, pathnet.paths.one_of_each_length(net.n), size)
            found["rows"].append({"varied": "batch", "precision": precision, **row})
    for varied, values in (("depth", setup.depths), ("width", setup.widths)):
        for value in values:
            net = network(setup, **{varied: value})
            for precision in setup.precisions:
                try:
                    tape = recorder(setup, net, precision)(images, labels)
                except ValueError as error:
                    found["left_out"].append({"precision": precision, varied: value, "reason": str(error)[:300]})
                    continue
                row = _walk_row(setup, tape, net, pathnet.paths.one_of_each_length(net.n), setup.batch)
                found["rows"].append({"varied": varied, varied: value, "precision": precision, **row})
    return found


def _walk_row(setup: Setup, tape: pathnet.Tape, net: ResidualNet, codes: Tensor, size: int) -> Found:
    timing = interleaved(setup, {"walk": lambda: tape.path_gradient_norms(codes)}, rounds=3)["walk"]
    return {
        "paths": len(codes),
        "batch": size,
        "paths_per_s": len(codes) / timing.median,
        "flops_per_s": path_flops(net, setup.side, codes) * size / timing.median,
        **timing.facts(),
    }


def deletions(setup: Setup) -> Found:
    """Every block deleted in turn, in one call, against as many eager forward passes of the whole network and one."""
    small = replace(setup, depth=min(setup.depth, 14), batch=4)
    error: dict[str, float] = {}
    refusals: dict[str, str] = {}
    for precision in setup.precisions:
        net, (images, _) = network(small), batch(small)
        try:
            outputs = pathnet.Recorder(net, engine=setup.engine, precision=precision).routed_outputs(
                images, _deletions(net.n)
            )
        except ValueError as refusal:
            refusals[precision] = str(refusal)
            continue
        expected = truth.lesioned_outputs(net, images, _deletions(net.n))
        error[precision] = float((outputs.double() - expected).norm() / expected.norm())
    found: Found = {"error": error, "unavailable": refusals}
    if not error or not max(error.values()) < LESION_TOLERANCE:
        raise Failed("lesioned outputs differ from float64, or no precision is served", found)
    net, (images, _) = network(setup), batch(setup)
    routing = _deletions(net.n)

    @torch.no_grad()
    def eager() -> None:
        for _ in range(net.n + 1):
            net(images)

    works: dict[str, Callable[[], object]] = {"eager forward passes": eager}
    for precision in error:
        own = pathnet.Recorder(net, engine=setup.engine, precision=precision)
        works[f"pathnet {precision}"] = lambda own=own: own.routed_outputs(images, routing)  # type: ignore[misc]
    timings = interleaved(setup, works)
    eagerly = timings["eager forward passes"].median
    return {
        **found,
        "deletions": len(routing),
        "forward_passes": net.n + 1,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "share_of_eager": {precision: timings[f"pathnet {precision}"].median / eagerly for precision in error},
    }


def sums(setup: Setup) -> Found:
    """The exact sums by length beside as many modules walked path by path: one path of each length, a call each."""
    small = replace(setup, depth=min(setup.depth, 20), batch=4)
    found: Found = {"error": {}, "precisions": {}}
    for precision in _served(setup, network(setup), *batch(setup)):
        net = network(small)
        tape = recorder(small, net, precision)(*batch(small))
        codes = pathnet.paths.enumerate_all(net.n)
        every, lengths = truth.walk(tape, pathnet.paths.routing(codes)), codes.sum(1)
        expected = torch.stack([every[lengths == k].sum(0).norm() for k in range(net.n + 1)])
        own = tape.gradient_by_length().flatten(1).norm(dim=1)
        found["error"][precision] = error = float((own / expected - 1).abs().max())
        if not error < TOLERANCES[precision][1]:
            raise Failed(f"sums by length in {precision} are off by {error:.1g}, hence not timed", found)
        tape = recorder(setup, network(setup), precision)(*batch(setup))
        paths = pathnet.paths.one_of_each_length(tape.n)

        def one_by_one(tape: pathnet.Tape = tape, paths: Tensor = paths) -> None:
            for path in paths:
                tape.path_gradient_norms(path[None])

        timings = interleaved(
            setup, {"sums": partial(tape.gradient_by_length, scaled=True), "one by one": one_by_one}
        )
        found["precisions"][precision] = {
            "share": timings["sums"].median / timings["one by one"].median,
            "timings": {name: timing.facts() for name, timing in timings.items()},
        }
    return found


def _deletions(n: int) -> Tensor:
    """float64 [n, n, 2]: row i deletes block i + 1."""
    routing = torch.ones(n, n, 2, dtype=torch.float64)
    routing[torch.arange(n), torch.arange(n), 1] = 0
    return routing


def _served(
    setup: Setup, net: ResidualNet, images: Tensor, labels: Tensor
) -> dict[str, Callable[[Tensor, Tensor], pathnet.Tape]]:
    """A recorder for each precision that the engine has a form for."""
    served, refusals = {}, []
    for precision in setup.precisions:
        record = recorder(setup, net, precision)
        try:
            record(images, labels)
        except ValueError as error:
            refusals.append(str(error))
        else:
            served[precision] = record
    if not served:
        raise Failed("; ".join(refusals), {})
    return served


def _checked(setup: Setup) -> Found:
    found: Found = dict(check(setup))
    wrong = [name for name, own in found.items() if not own["passed"]]
    if wrong:
        raise Failed(f"wrong by themselves, hence not timed: {', '.join(wrong)}", {"check": found})
    return found
