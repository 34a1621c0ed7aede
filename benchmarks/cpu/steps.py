"""The steps of a run on a processor. Each returns its findings as JSON holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product

import torch

import pathnet
from benchmarks import truth
from benchmarks.adapted.on_processor import any_model
from benchmarks.cases import batch, network
from benchmarks.cpu.budget import LeftOut
from benchmarks.cpu.cases import FULL, deletions
from benchmarks.cpu.competitors import NORM_TOLERANCE, Key, recorder
from benchmarks.cpu.field import Field
from benchmarks.cpu.fitting import modules_walked, straight_line
from benchmarks.cpu.separate import measured_alone
from benchmarks.cpu.sums import sums_by_length
from benchmarks.cpu.training.step import training_step
from benchmarks.outcome import Failed, Findings
from benchmarks.timing import LEAST_ROUNDS
from pathnet import native

__all__ = ["PREPARATION", "SELF_CHECKED", "SHARES", "STEPS"]

LESION_TOLERANCE = 1e-3


def checks(field: Field) -> Findings:
    """Check all competitors against float64 on a small network, and against each other on the timed one."""
    rows = {str(key): asdict(result) for key, result in field.checked.items()}
    findings: Findings = {
        "float64": _finite(rows),
        "timed": list(map(str, field.competitors)),
        "left_out": field.left_out,
    }
    if field.refused:
        refused = (f"{name}, {reason}" for name, reason in field.refused.items())
        raise Failed(f"wrong, hence not timed: {'; '.join(refused)}", findings)
    return findings


def lengths(field: Field) -> Findings:
    """Time one path a call by length, and the forward pass, for all competitors in turn."""
    if not field.competitors:
        raise LeftOut("no competitor is there to be timed")
    kept = _kept_lengths(field)
    works: dict[tuple[Key, int | None], Callable[[], object]] = {}
    for key, competitor in field.competitors.items():
        if competitor.forward is not None:
            works[key, None] = competitor.forward
        for length in kept:
            works[key, length] = partial(competitor.norms, field.paths[length])
    timings = field.budget.timed(works, field.sizes.setup.rounds)
    rows = [
        {**asdict(key), "part": "forward" if length is None else "walk", "length": length, **timing.facts()}
        for (key, length), timing in timings.items()
    ]
    return {"rows": rows, "blocks": field.n, "batch": field.sizes.setup.batch}


def _kept_lengths(field: Field) -> list[int]:
    """Return the lengths that represent all: as many as the time allows, always the shortest and the longest."""
    lengths = list(field.paths)
    # A forward pass takes no longer than one path of the loop, or of another competitor that is slower on it.
    forward = sum(max(field.seconds[key, length] for length in lengths) for key in field.competitors)
    choices = [lengths, [*lengths[:-1:2], lengths[-1]], [lengths[0], lengths[len(lengths) // 2], lengths[-1]]]
    for kept in (*choices, [lengths[0], lengths[-1]]):
        round_ = forward + sum(field.seconds[key, length] for key in field.competitors for length in kept)
        if (LEAST_ROUNDS + 1) * round_ <= field.budget.left:
            break
    if len(kept) < len(lengths):
        field.budget.cut("lengths that represent all", lengths, kept, f"a round of them takes some {round_:.3g} s")
    return kept


def sweep(field: Field) -> Findings:
    """Time one path of each length in one call."""
    paths = pathnet.paths.one_of_each_length(field.n)
    engines = {key: competitor for key, competitor in field.competitors.items() if key.name == "pathnet"}
    works = {key: partial(competitor.norms, paths) for key, competitor in engines.items()}
    timings = field.budget.timed(works, field.sizes.slow_rounds)
    modules, walked = modules_walked(paths)
    rows = [{**asdict(key), **timing.facts()} for key, timing in timings.items()]
    return {"rows": rows, "paths": len(paths), "modules": modules, "modules_walked_once": walked}


def peak_share(field: Field) -> Findings:
    """Compare the backward pass through all modules, without tiles, with the peak of fused multiply-adds."""
    usable = [name for name in native.build_facts()["instruction_sets"] if name != "amx"]
    name = "avx512" if "avx512" in usable else usable[0]
    findings = _alone(field, "peak_share", f"--batch={field.sizes.setup.batch}", environment={"PATHNET_ISA": name})
    if findings["rounds"] < field.sizes.setup.rounds:
        field.budget.cut("rounds", field.sizes.setup.rounds, findings["rounds"], "the process had time for no more")
    return findings


def fits(field: Field) -> Findings:
    """Time the sweep as the number of paths and the batch grow, and fit straight lines."""
    sizes, net = field.sizes, field.net
    record = recorder(net, "running", "float32")
    tape = record(*batch(sizes.setup, size=sizes.fit_batch))
    paths = {
        k * net.n: torch.cat([pathnet.paths.one_of_each_length(net.n, batch=i) for i in range(k)])
        for k in sizes.sweeps
    }
    tapes = {size: record(*batch(sizes.setup, size=size)) for size in sizes.batches}
    few = torch.cat(list(field.paths.values()))
    findings: Findings = {
        "precision": "float32",
        "batch_as_paths_vary": sizes.fit_batch,
        "paths_as_batch_varies": len(few),
    }
    varied: dict[str, dict[int, Callable[[], object]]] = {
        "paths": {count: partial(tape.path_gradient_norms, codes) for count, codes in paths.items()},
        "batch": {size: partial(recorded.path_gradient_norms, few) for size, recorded in tapes.items()},
    }
    for position, (name, works) in enumerate(varied.items()):
        share = field.budget.share(1 / (len(varied) - position))
        try:
            timings = share.timed(works, sizes.slow_rounds, f"rounds as {name} vary")
        except LeftOut as left_out:
            share.cut(f"time as {name} vary", list(works), None, str(left_out))
            continue
        medians = [timing.median for timing in timings.values()]
        findings[name] = {
            "line": asdict(straight_line(list(timings), medians)),
            "rows": [{name: size, **timing.facts()} for size, timing in timings.items()],
        }
    return findings


def memory(field: Field) -> Findings:
    """Measure the growth of a process's peak memory with few paths and with many."""
    (few, many), images = field.sizes.memory_counts, field.sizes.fit_batch
    findings: Findings = {"batch": images, str(few): _alone(field, "memory", str(few), f"--batch={images}")}
    fitting = int(few * (field.budget.left - findings[str(few)]["process_s"]) / findings[str(few)]["walks_s"])
    count = min(many, fitting)
    if count < many:
        because = f"{few} take {findings[str(few)]['walks_s']:.3g} s"
        if count < 2 * few:
            field.budget.cut("memory with many paths", many, None, because)
            return findings
        field.budget.cut("paths whose memory is measured", many, count, because)
    return findings | {str(count): _alone(field, "memory", str(count), f"--batch={images}")}


def deleted(field: Field) -> Findings:
    """Time the deletion of every block in turn, in one call, against one eager forward pass a deletion and one
    more."""
    net, (images, _) = network(field.sizes.checked), batch(field.sizes.checked)
    findings: Findings = {"error": {}}
    routing = deletions(net.n)
    for precision in NORM_TOLERANCE:
        outputs = recorder(net, "running", precision).routed_outputs(images, routing)
        expected = truth.lesioned_outputs(net, images, routing)
        findings["error"][precision] = error = float((outputs.double() - expected).norm() / expected.norm())
        net = network(field.sizes.checked)
        if not error < LESION_TOLERANCE:
            raise Failed(f"lesioned outputs in {precision} are off by {error:.1g}, hence not timed", findings)
    routing = deletions(field.n)

    @torch.no_grad()
    def eager() -> None:
        field.net(field.images)

    works: dict[str, Callable[[], object]] = {"one eager forward pass": eager}
    for precision in NORM_TOLERANCE:
        record = recorder(field.net, "running", precision)
        works[precision] = partial(record.routed_outputs, field.images, routing)
    timings = field.budget.timed(works, field.sizes.slow_rounds)
    eager_s = (field.n + 1) * timings["one eager forward pass"].median
    return findings | {
        "deletions": field.n,
        "eager_forward_passes": field.n + 1,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "share_of_eager": {precision: timings[precision].median / eager_s for precision in NORM_TOLERANCE},
    }


def sharing(field: Field) -> Findings:
    """Time paths of one length in one call, which shares equal tails, and in a call each, which shares nothing."""
    sizes, rows, each = field.sizes, list[Findings](), 0.0
    tape = recorder(field.net, "running", "float32")(*batch(sizes.setup, size=sizes.fit_batch))

    def one_by_one(paths: torch.Tensor) -> None:
        for path in paths:
            tape.path_gradient_norms(path[None])

    # Few paths first: their time predicts that of many.
    for count, length in product(sizes.shared_counts, sizes.shared_lengths):
        paths = pathnet.paths.sample(field.n, length, count)
        modules, walked = modules_walked(paths)
        works: dict[str, Callable[[], object]] = {
            "together": partial(tape.path_gradient_norms, paths),
            "one_by_one": partial(one_by_one, paths),
        }
        # Many paths in a call average by themselves.
        rounds = sizes.slow_rounds if count * length < 1000 else 1
        try:
            field.budget.require(2 * min(rounds, LEAST_ROUNDS) * each * modules, "they")
            timings = field.budget.timed(works, rounds, f"rounds of {count} paths of length {length}")
        except LeftOut as left_out:
            field.budget.cut(f"{count} paths of length {length}, together and one by one", 1, None, str(left_out))
            continue
        each = timings["one_by_one"].median / modules
        rows.append(
            {
                "length": length,
                "paths": count,
                "times_faster_together": timings["one_by_one"].median / timings["together"].median,
                "modules": modules,
                "modules_walked_once": walked,
                **{name: timing.facts() for name, timing in timings.items()},
            }
        )
    rows.sort(key=lambda row: (row["length"], row["paths"]))
    return {"batch": sizes.fit_batch, "precision": "float32", "rows": rows}


STEPS: dict[str, Callable[[Field], Findings]] = {
    "checks": checks,
    "lengths": lengths,
    "sweep": sweep,
    "peak_share": peak_share,
    "fits": fits,
    "memory": memory,
    "deletions": deleted,
    "sharing": sharing,
    "sums": sums_by_length,
    "training": training_step,
    "models": any_model,
}


SELF_CHECKED = {"training", "models"}
"""Steps that check all that they time; the others rely on the checks of the competitors."""

SHARES = {
    "checks": 24,
    "lengths": 24,
    "sweep": 4,
    "peak_share": 6,
    "fits": 8,
    "memory": 6,
    "deletions": 4,
    "sharing": 9,
    "sums": 16,
    "training": 12,
    "models": 18,
}
"""Shares of the time; time that a step leaves goes to those after it."""

PREPARATION = dict.fromkeys(STEPS, 0.0) | {"peak_share": 2, "memory": 2, "deletions": 1, "sums": 3, "training": 2}
"""Preparation of a step before its timings, in times of the check of one competitor on the small network."""


def _alone(field: Field, *arguments: str, environment: Mapping[str, str] | None = None) -> Findings:
    """Return the findings of `benchmarks.cpu.alone` in a process of its own."""
    small = field.unlimited != FULL
    return measured_alone(field.budget, "benchmarks.cpu.alone", *arguments, small=small, environment=environment)


def _finite(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float | str]]:
    """Return the rows with NaN as a string, since JSON has no NaN."""
    return {name: {k: v if v == v else "nan" for k, v in row.items()} for name, row in rows.items()}
