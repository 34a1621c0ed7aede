"""The measurements on one model: paths in one call and one a call, exact sums, recording, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from benchmarks.adapted.subject import Subject
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.cpu.fitting import modules_walked
from benchmarks.outcome import Findings

__all__ = ["Sizes", "measure"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements.

    Attributes:
        paths: numbers of paths in one call; the competitors run the first number.
        single: number of paths that are measured one a call.
        loops: number of paths of the loop, of which each takes as long as any other.
        rounds: number of rounds of all but the largest number of paths, which runs once.
    """

    paths: tuple[int, int]
    single: int
    loops: int
    rounds: int


@dataclass(frozen=True)
class Clocked:
    """A work that ends with a synchronization and keeps the processor seconds of each call, next to the wall's.

    On a machine that others use too, processor seconds vary less.
    """

    work: Callable[[], object]
    synchronize: Callable[[], None]
    processor_s: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        start = time.process_time()
        self.work()
        self.synchronize()
        self.processor_s.append(time.process_time() - start)


def measure(subject: Subject, sizes: Sizes, budget: Budget) -> Findings:
    """Return all findings on one model; measurements that do not fit the budget are left out and listed there."""
    few, many = (subject.paths(count) for count in sizes.paths)
    single = few[: sizes.single]
    findings: Findings = {
        "blocks": subject.n,
        "engine": subject.tape.engine,
        "input": list(subject.inputs.shape),
        "adapt_s": subject.adapt_s,
        "tape_bytes": subject.tape.nbytes,
        "visits": [dict(zip(("paths", "modules", "shared"), visits(paths), strict=True)) for paths in (few, many)],
    }
    norms, kept = subject.tape.path_gradient_norms, subject.kept
    works: dict[str, dict[str, Callable[[], object]]] = {
        "few": {"fifteen lines": partial(kept.norms, few), "pathnet": partial(norms, few)},
        "single": {
            "fifteen lines": partial(kept.norms, single),
            "pathnet": lambda: [norms(path[None]) for path in single],
            "loop": partial(subject.loop, few[: sizes.loops]),
        },
        "sums": {
            "module VJPs": kept.sums,
            "pathnet": partial(subject.tape.gradient_by_length, scaled=True),
        },
        "record": {"forward": subject.forward, "pathnet": subject.record},
        "many": {
            "fifteen lines, first": partial(kept.norms, few),
            "pathnet": partial(norms, many),
            "fifteen lines, last": partial(kept.norms, few),
        },
    }
    parts = {"few": 4.0, "single": 2.0, "sums": 3.0, "record": 1.0, "many": 8.0}
    for name, competing in works.items():
        share = budget.share(parts[name] / sum(parts.values()))
        del parts[name]
        what = f"{subject.case.name}: {name}"
        try:
            findings[name] = _timed(subject, share, competing, 1 if name == "many" else sizes.rounds, what)
        except LeftOut as left_out:
            share.cut(what, 1, None, str(left_out))
    return {**findings, "ratios": _ratios(findings, sizes)}


def visits(paths: torch.Tensor) -> tuple[int, int, int]:
    """Return the number of paths, of residual modules on them, and of those if equal tails are shared."""
    return len(paths), *modules_walked(paths)


def _timed(
    subject: Subject, budget: Budget, works: Mapping[str, Callable[[], object]], rounds: int, what: str
) -> dict[str, Findings]:
    clocked = {name: Clocked(work, subject.synchronize) for name, work in works.items()}
    timings = budget.timed(clocked, rounds, f"rounds of {what}")
    return {
        name: {**timing.facts(), "median_processor_s": float(np.median(clocked[name].processor_s[-rounds:]))}
        for name, timing in timings.items()
    }


def _ratios(findings: Findings, sizes: Sizes) -> dict[str, Findings]:
    """Return the ratios that have goals, by wall and by processor seconds."""
    ratios: dict[str, Findings] = {}
    for clock in ("median_s", "median_processor_s"):

        def seconds(part: str, name: str, clock: str = clock) -> float:
            return float(findings[part][name][clock])

        result: Findings = {}
        if "few" in findings:
            result["few"] = seconds("few", "fifteen lines") / seconds("few", "pathnet")
        if "many" in findings:
            # Path by path the fifteen lines take the same time per module, however many paths there are.
            modules = [entry["modules"] for entry in findings["visits"]]
            each = sum(seconds("many", f"fifteen lines, {when}") for when in ("first", "last")) / 2 / modules[0]
            result["many"] = each * modules[1] / seconds("many", "pathnet")
        if "single" in findings:
            ours = seconds("single", "pathnet")
            result["single"] = seconds("single", "fifteen lines") / ours
            result["single, loop"] = seconds("single", "loop") / sizes.loops / (ours / sizes.single)
        if "sums" in findings:
            result["sums"] = seconds("sums", "pathnet") / seconds("sums", "module VJPs")
        if "record" in findings:
            result["record"] = seconds("record", "pathnet") / seconds("record", "forward")
        ratios["wall" if clock == "median_s" else "processor"] = result
    return ratios
