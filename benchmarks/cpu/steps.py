"""The steps of a run on a processor. Each returns what it found, as JSON holds it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import torch

import pathnet
from benchmarks import truth
from benchmarks.cases import batch, network
from benchmarks.cpu.cases import FULL, deletions
from benchmarks.cpu.competitors import NORM_TOLERANCE, Key, recorder
from benchmarks.cpu.field import Field
from benchmarks.cpu.fitting import modules_walked, straight_line
from benchmarks.cpu.sums import sums_by_length
from benchmarks.cpu.training import training_step
from benchmarks.outcome import Failed, Found
from benchmarks.timing import Timing, interleaved
from benchmarks.tools import execute
from pathnet import native

__all__ = ["STEPS"]

LESION_TOLERANCE = 1e-3
ALONE_S = 300.0

Name = TypeVar("Name")


def checks(field: Field) -> Found:
    """Everyone against float64 on a small network, and against each other on the one that is timed."""
    rows = {str(key): asdict(own) for key, own in field.checked.items()}
    found: Found = {"float64": _finite(rows), "timed": list(map(str, field.competitors))}
    if field.refused:
        refused = (f"{name}, {reason}" for name, reason in field.refused.items())
        raise Failed(f"wrong, hence not timed: {'; '.join(refused)}", found)
    return found


def lengths(field: Field) -> Found:
    """One path a call, by length, everyone in turn; and everyone's forward pass."""
    works: dict[tuple[Key, int | None], Callable[[], object]] = {}
    for key, own in field.competitors.items():
        if own.forward is not None:
            works[key, None] = own.forward
        for length, path in field.paths.items():
            works[key, length] = partial(own.norms, path)
    timings = _interleaved(field, works, field.sizes.setup.rounds)
    rows = [
        {**asdict(key), "part": "forward" if length is None else "walk", "length": length, **timing.facts()}
        for (key, length), timing in timings.items()
    ]
    return {"rows": rows, "blocks": field.n, "batch": field.sizes.setup.batch}


def sweep(field: Field) -> Found:
    """One path of each length in one call."""
    paths = pathnet.paths.one_of_each_length(field.n)
    own = {key: competitor for key, competitor in field.competitors.items() if key.name == "pathnet"}
    works = {key: partial(competitor.norms, paths) for key, competitor in own.items()}
    timings = _interleaved(field, works, field.sizes.slow_rounds)
    modules, walked = modules_walked(paths)
    rows = [{**asdict(key), **timing.facts()} for key, timing in timings.items()]
    return {"rows": rows, "paths": len(paths), "modules": modules, "modules_walked_once": walked}


def peak_share(field: Field) -> Found:
    """The walk through all modules, tiles switched off, beside the peak of fused multiply-adds."""
    usable = [name for name in native.build_facts()["instruction_sets"] if name != "amx"]
    name = "avx512" if "avx512" in usable else usable[0]
    return _alone(field, "peak_share", environment={"PATHNET_ISA": name})


def fits(field: Field) -> Found:
    """The sweep's time as the number of paths and the batch grow, and straight lines through it."""
    sizes, net = field.sizes, field.net
    record = recorder(net, "running", "float32")
    tape = record(*batch(sizes.setup, size=sizes.fit_batch))
    paths = {
        k * net.n: torch.cat([pathnet.paths.one_of_each_length(net.n, batch=i) for i in range(k)])
        for k in sizes.sweeps
    }
    tapes = {size: record(*batch(sizes.setup, size=size)) for size in sizes.batches}
    few = torch.cat(list(field.paths.values()))
    found: Found = {"precision": "float32", "batch_as_paths_vary": sizes.fit_batch, "paths_as_batch_varies": len(few)}
    varied: dict[str, dict[int, Callable[[], object]]] = {
        "paths": {count: partial(tape.path_gradient_norms, own) for count, own in paths.items()},
        "batch": {size: partial(own.path_gradient_norms, few) for size, own in tapes.items()},
    }
    for name, works in varied.items():
        timings = _interleaved(field, works, sizes.slow_rounds, warm_up=1)
        medians = [timing.median for timing in timings.values()]
        found[name] = {
            "line": asdict(straight_line(list(timings), medians)),
            "rows": [{name: size, **timing.facts()} for size, timing in timings.items()],
        }
    return found


def memory(field: Field) -> Found:
    """By how much the peak of a process's memory grows as a few paths are walked, and as many are."""
    counts = field.sizes.memory_counts
    return {"batch": field.sizes.fit_batch} | {str(count): _alone(field, "memory", str(count)) for count in counts}


def deleted(field: Field) -> Found:
    """Every block deleted in turn, in one call, against one eager forward pass of the network a deletion and one."""
    net, (images, _) = network(field.sizes.checked), batch(field.sizes.checked)
    found: Found = {"error": {}}
    routing = deletions(net.n)
    for precision in NORM_TOLERANCE:
        outputs = recorder(net, "running", precision).routed_outputs(images, routing)
        expected = truth.lesioned_outputs(net, images, routing)
        found["error"][precision] = error = float((outputs.double() - expected).norm() / expected.norm())
        net = network(field.sizes.checked)
        if not error < LESION_TOLERANCE:
            raise Failed(f"lesioned outputs in {precision} are off by {error:.1g}, hence not timed", found)
    routing = deletions(field.n)

    @torch.no_grad()
    def eager() -> None:
        field.net(field.images)

    works: dict[str, Callable[[], object]] = {"one eager forward pass": eager}
    for precision in NORM_TOLERANCE:
        record = recorder(field.net, "running", precision)
        works[precision] = partial(record.routed_outputs, field.images, routing)
    timings = _interleaved(field, works, field.sizes.slow_rounds, warm_up=1)
    eagerly = (field.n + 1) * timings["one eager forward pass"].median
    return found | {
        "deletions": field.n,
        "eager_forward_passes": field.n + 1,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "share_of_eager": {precision: timings[precision].median / eagerly for precision in NORM_TOLERANCE},
    }


def sharing(field: Field) -> Found:
    """Paths of one length in one call, which walks equal tails once, and in a call each, which shares nothing."""
    sizes, rows = field.sizes, []
    tape = recorder(field.net, "running", "float32")(*batch(sizes.setup, size=sizes.fit_batch))

    def one_by_one(paths: torch.Tensor) -> None:
        for path in paths:
            tape.path_gradient_norms(path[None])

    for length in sizes.shared_lengths:
        for count in sizes.shared_counts:
            paths = pathnet.paths.sample(field.n, length, count)
            works: dict[str, Callable[[], object]] = {
                "together": partial(tape.path_gradient_norms, paths),
                "one_by_one": partial(one_by_one, paths),
            }
            # Many paths in a call average by themselves.
            timings = _interleaved(field, works, sizes.slow_rounds if count * length < 1000 else 1)
            modules, walked = modules_walked(paths)
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
    return {"batch": sizes.fit_batch, "precision": "float32", "rows": rows}


STEPS: dict[str, Callable[[Field], Found]] = {
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
}


def _interleaved(
    field: Field, works: Mapping[Name, Callable[[], object]], rounds: int, warm_up: int = 0
) -> dict[Name, Timing]:
    """By any key; whoever was checked, on the very work that is timed, is warm already."""
    names = {str(index): name for index, name in enumerate(works)}
    candidates = {index: works[name] for index, name in names.items()}
    timings = interleaved(field.sizes.setup, candidates, rounds, warm_up)
    return {name: timings[index] for index, name in names.items()}


def _alone(field: Field, *arguments: str, environment: Mapping[str, str] | None = None) -> Found:
    """What `benchmarks.cpu.alone` finds in a process of its own, on as many threads as this one."""
    size = [] if field.sizes == FULL else ["--small"]
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.cpu.alone", *arguments, *threads, *size]
    done = execute(command, ALONE_S, environment)
    if done.status != 0:
        ended = "was stopped" if done.status is None else f"ended with status {done.status}"
        raise Failed(f"the process {' '.join(arguments)} {ended}", {"output": done.tail})
    return dict(json.loads(done.output.splitlines()[-1]))


def _finite(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float | str]]:
    """NaN as a word, which JSON has no number for."""
    return {name: {k: v if v == v else "nan" for k, v in row.items()} for name, row in rows.items()}
