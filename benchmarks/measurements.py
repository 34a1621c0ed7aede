"""The steps that measure: accuracy, sweeps, single paths, scaling, deletions, sums by length.

Each returns its findings as JSON holds them.
"""

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
from benchmarks.competitors import LOOP, Entrants, build_entrants, check, recorder
from benchmarks.outcome import Failed, Findings
from benchmarks.timing import Timing, interleaved
from pathnet.models import ResidualNet

__all__ = ["accuracy", "deletions", "paths", "scaling", "sums", "sweep", "whole_sweep"]

TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 2e-2)}
"""Largest relative errors of a batch's norm and of a sample's, by precision."""

LESION_TOLERANCE = 1e-3
IMAGE_BATCHES = 8
TOO_LONG = 5.0
"""Seconds of a call beyond which a size is left out of the scaling."""


def accuracy(setup: Setup) -> Findings:
    """Compare norms with float64 backward passes on the same record, by length."""
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
    findings: Findings = {"rows": rows, "tolerances": TOLERANCES}
    if wrong:
        raise Failed(f"norms beyond the tolerances: {', '.join(wrong)}", findings)
    return findings


def sweep(setup: Setup) -> Findings:
    """Time one path of every length on one batch, forward pass included, for all competitors; and pathnet's
    parts alone."""
    checked = _checked(setup)
    net, (images, labels) = network(setup), batch(setup)
    paths = pathnet.paths.one_of_each_length(net.n)
    entrants = build_entrants(setup, net, images, labels, paths)
    works: dict[str, Callable[[], object]] = {name: entrant.norms for name, entrant in entrants.competitors.items()}
    served = [precision for precision in setup.precisions if entrants.pathnet(precision) in entrants.competitors]
    for precision in served:
        record = recorder(setup, net, precision)
        works[f"record {precision}"] = lambda record=record: record(images, labels)  # type: ignore[misc]
        works[f"walk {precision}"] = entrants.competitors[entrants.pathnet(precision)].backward  # type: ignore[assignment]
    a = torch.randn(setup.matmul, setup.matmul, device=setup.device).bfloat16()
    b = torch.randn(setup.matmul, setup.matmul, device=setup.device).bfloat16()
    works["matrix product"] = lambda: a @ b
    timings = interleaved(setup, works)
    best = min(entrants.best_composition, key=lambda name: timings[name].median, default=None)
    product = 2 * setup.matmul**3 / timings["matrix product"].median
    flops = path_flops(net, setup.side, paths) * setup.batch
    findings: Findings = {
        "check": checked,
        "paths": len(paths),
        "batch": setup.batch,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "unavailable": entrants.unavailable,
        "remarks": {name: entrant.remark for name, entrant in entrants.competitors.items() if entrant.remark},
        "best_composition": best,
        "extrapolated_to_1000_batches_s": {name: 1000 * timings[name].median for name in entrants.competitors},
        "matrix_product_flops_per_s": product,
        "walk_flops": flops,
        "own": {precision: _comparison(precision, timings, entrants, best, flops, product) for precision in served},
    }
    if not served:
        raise Failed("no precision is served", findings)
    return findings


def _comparison(
    precision: str, timings: dict[str, Timing], entrants: Entrants, best: str | None, flops: int, product: float
) -> Findings:
    total, backward_s = timings[entrants.pathnet(precision)].median, timings[f"walk {precision}"].median
    return {
        "times_faster_than_loop": timings[LOOP].median / total if LOOP in timings else None,
        "times_faster_than_composed": timings[best].median / total if best else None,
        "record_share": timings[f"record {precision}"].median / total,
        "walk_flops_per_s": flops / backward_s,
        "share_of_matrix_product": flops / backward_s / product,
    }


def whole_sweep(setup: Setup) -> Findings:
    """Time the paper's sweep by pathnet's engine, batch after batch, and apart from it the drawing of its paths."""
    net = network(setup)
    batches = [batch(setup, number) for number in range(IMAGE_BATCHES)]
    began = time.perf_counter()
    paths = [pathnet.paths.one_of_each_length(net.n, batch=number) for number in range(setup.sweep_batches)]
    findings: Findings = {"drawing_paths_s": time.perf_counter() - began, "precisions": {}}
    for precision, record in _served(setup, net, *batches[0]).items():
        record(*batches[0]).path_gradient_norms(paths[0])
        setup.synchronize()
        norms: list[Tensor] = []
        began = time.perf_counter()
        for number, codes in enumerate(paths):
            norms.append(record(*batches[number % IMAGE_BATCHES]).path_gradient_norms(codes))
            if number % 50 == 49:
                setup.synchronize()
                if time.perf_counter() - began > setup.seconds:
                    break
        measured = torch.stack(norms).cpu()
        seconds = time.perf_counter() - began
        findings["precisions"][precision] = {
            "seconds": seconds,
            "batches": len(norms),
            "measurements": measured.numel(),
            "complete": len(norms) == 1000,
            "seconds_for_1000_batches": seconds * 1000 / len(norms),
            "positive_and_finite": bool(((measured > 0) & measured.isfinite()).all()),
            "mean_norm_by_length": measured.mean(0).tolist(),
        }
    return findings


def paths(setup: Setup) -> Findings:
    """Time one path on one batch, by length and competitor: with its forward pass, and the backward pass alone."""
    checked = _checked(setup)
    net, (images, labels) = network(setup), batch(setup)
    rows = []
    for length in setup.lengths:
        entrants = build_entrants(setup, net, images, labels, pathnet.paths.sample(net.n, length, 1))
        works: dict[tuple[str, str], Callable[[], object]] = {}
        for name, competitor in entrants.competitors.items():
            works[name, "forward and walk"] = competitor.norms
            if competitor.backward is not None:
                works[name, "walk"] = competitor.backward
        timings = interleaved(setup, {str(key): work for key, work in works.items()})
        for name, part in works:
            rows.append({"length": length, "name": name, "part": part, **timings[str((name, part))].facts()})
    return {"check": checked, "batch": setup.batch, "rows": rows, "unavailable": entrants.unavailable}


def scaling(setup: Setup) -> Findings:
    """Time pathnet's backward passes alone as number of paths, batch, depth and width grow, one at a time."""
    findings: Findings = {"rows": [], "left_out": []}
    net, (images, labels) = network(setup), batch(setup)
    generator = torch.Generator().manual_seed(0)
    for precision, record in _served(setup, net, images, labels).items():
        tape, per_path = record(images, labels), 0.0
        for count in setup.path_counts:
            codes = torch.randint(0, 2, (count, net.n), generator=generator, dtype=torch.uint8)
            if count * per_path > TOO_LONG:
                findings["left_out"].append({"precision": precision, "paths": count, "reason": "too long a call"})
                continue
            row = _backward_row(setup, tape, net, codes, setup.batch)
            per_path = row["median_s"] / count
            findings["rows"].append({"varied": "paths", "precision": precision, **row})
        for size in setup.batches:
            sizes = replace(setup, batch=size)
            row = _backward_row(sizes, record(*batch(sizes)), net, pathnet.paths.one_of_each_length(net.n), size)
            findings["rows"].append({"varied": "batch", "precision": precision, **row})
    for varied, values in (("depth", setup.depths), ("width", setup.widths)):
        for value in values:
            net = network(setup, **{varied: value})
            for precision in setup.precisions:
                try:
                    tape = recorder(setup, net, precision)(images, labels)
                except ValueError as error:
                    findings["left_out"].append({"precision": precision, varied: value, "reason": str(error)[:300]})
                    continue
                row = _backward_row(setup, tape, net, pathnet.paths.one_of_each_length(net.n), setup.batch)
                findings["rows"].append({"varied": varied, varied: value, "precision": precision, **row})
    return findings


def _backward_row(setup: Setup, tape: pathnet.Tape, net: ResidualNet, codes: Tensor, size: int) -> Findings:
    timing = interleaved(setup, {"walk": lambda: tape.path_gradient_norms(codes)}, rounds=3)["walk"]
    return {
        "paths": len(codes),
        "batch": size,
        "paths_per_s": len(codes) / timing.median,
        "flops_per_s": path_flops(net, setup.side, codes) * size / timing.median,
        **timing.facts(),
    }


def deletions(setup: Setup) -> Findings:
    """Time the deletion of every block in turn, in one call, against one eager forward pass a deletion and one
    more."""
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
    findings: Findings = {"error": error, "unavailable": refusals}
    if not error or not max(error.values()) < LESION_TOLERANCE:
        raise Failed("lesioned outputs differ from float64, or no precision is served", findings)
    net, (images, _) = network(setup), batch(setup)
    routing = _deletions(net.n)

    @torch.no_grad()
    def eager() -> None:
        for _ in range(net.n + 1):
            net(images)

    works: dict[str, Callable[[], object]] = {"eager forward passes": eager}
    for precision in error:
        record = pathnet.Recorder(net, engine=setup.engine, precision=precision)
        works[f"pathnet {precision}"] = lambda record=record: record.routed_outputs(images, routing)  # type: ignore[misc]
    timings = interleaved(setup, works)
    eager_s = timings["eager forward passes"].median
    return {
        **findings,
        "deletions": len(routing),
        "forward_passes": net.n + 1,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "share_of_eager": {precision: timings[f"pathnet {precision}"].median / eager_s for precision in error},
    }


def sums(setup: Setup) -> Findings:
    """Time the exact sums by length against as many modules path by path: one path of each length, a call each."""
    small = replace(setup, depth=min(setup.depth, 20), batch=4)
    findings: Findings = {"error": {}, "precisions": {}}
    for precision in _served(setup, network(setup), *batch(setup)):
        net = network(small)
        tape = recorder(small, net, precision)(*batch(small))
        codes = pathnet.paths.enumerate_all(net.n)
        grads, lengths = truth.gradients(tape, pathnet.paths.routing(codes)), codes.sum(1)
        expected = torch.stack([grads[lengths == k].sum(0).norm() for k in range(net.n + 1)])
        measured = tape.gradient_by_length().flatten(1).norm(dim=1)
        findings["error"][precision] = error = float((measured / expected - 1).abs().max())
        if not error < TOLERANCES[precision][1]:
            raise Failed(f"sums by length in {precision} are off by {error:.1g}, hence not timed", findings)
        tape = recorder(setup, network(setup), precision)(*batch(setup))
        paths = pathnet.paths.one_of_each_length(tape.n)

        def one_by_one(tape: pathnet.Tape = tape, paths: Tensor = paths) -> None:
            for path in paths:
                tape.path_gradient_norms(path[None])

        timings = interleaved(
            setup, {"sums": partial(tape.gradient_by_length, scaled=True), "one by one": one_by_one}
        )
        findings["precisions"][precision] = {
            "share": timings["sums"].median / timings["one by one"].median,
            "timings": {name: timing.facts() for name, timing in timings.items()},
        }
    return findings


def _deletions(n: int) -> Tensor:
    """Return routings, float64 [n, n, 2]; routing i deletes block i + 1."""
    routing = torch.ones(n, n, 2, dtype=torch.float64)
    routing[torch.arange(n), torch.arange(n), 1] = 0
    return routing


def _served(
    setup: Setup, net: ResidualNet, images: Tensor, labels: Tensor
) -> dict[str, Callable[[Tensor, Tensor], pathnet.Tape]]:
    """Return a recorder for each precision that the engine supports."""
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


def _checked(setup: Setup) -> Findings:
    findings: Findings = dict(check(setup))
    wrong = [name for name, result in findings.items() if not result["passed"]]
    if wrong:
        raise Failed(f"wrong by themselves, hence not timed: {', '.join(wrong)}", {"check": findings})
    return findings
