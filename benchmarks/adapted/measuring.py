"""The measurements on one model: paths in one call and one a call, exact sums, recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from benchmarks.adapted.cases import Sizes
from benchmarks.adapted.subject import Subject
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.cpu.fitting import modules_walked
from benchmarks.outcome import Findings
from benchmarks.timing import LEAST_ROUNDS

__all__ = ["PARTS", "measure"]

Works = Mapping[str, Callable[[], object]]

PARTS = {"first": 2.0, "few": 5.0, "single": 2.0, "sums": 2.0, "record": 1.0, "many": 5.0}
"""The measurements, and their shares of the time; time that one leaves goes to those after it."""

ONCE = ("first", "many")
"""The measurements of a single round: what happens once, and what takes long enough to average by itself."""


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
    """Return all findings on one model; measurements that do not fit the budget are cut, and listed there."""
    few, many = (subject.paths(count) for count in sizes.paths)
    findings: Findings = {
        "blocks": subject.n,
        "engine": subject.tape.engine,
        "device": subject.device.type,
        "input": list(subject.inputs.shape),
        "adapt_s": subject.adapt_s,
        "adapt_processor_s": subject.adapt_processor_s,
        "tape_bytes": subject.tape.nbytes,
        "visits": [_visits(few), _visits(many)],
    }
    remaining = dict(PARTS)
    for name, works in _works(subject, sizes, few, many).items():
        share = budget.share(remaining[name] / sum(remaining.values()))
        del remaining[name]
        what = f"{subject.case.name}, {name}"
        rounds = 1 if name in ONCE else sizes.rounds
        try:
            findings[name] = _timed(subject, share, works, rounds, _expected_s(subject, sizes, name, findings), what)
        except LeftOut as left_out:
            share.cut(what, 1, None, str(left_out))
    return {**findings, "ratios": _ratios(findings, sizes)}


def _works(subject: Subject, sizes: Sizes, few: Tensor, many: Tensor) -> dict[str, Works]:
    norms, kept, single = subject.tape.path_gradient_norms, subject.kept, few[: sizes.single]
    return {
        # Forward pass, whatever is prepared for a new network, and the paths: all that one has to wait for.
        "first": {
            "fifteen lines": lambda: subject.keep_graphs().norms(few),
            "pathnet": lambda: subject.new_recorder()(subject.inputs, subject.target).path_gradient_norms(few),
        },
        "few": {"fifteen lines": partial(kept.norms, few), "pathnet": partial(norms, few)},
        "single": {
            "fifteen lines": partial(kept.norms, single),
            "pathnet": lambda: [norms(path[None]) for path in single],
            "loop": partial(subject.loop, few[: sizes.loops]),
        },
        "sums": {"module VJPs": kept.sums, "pathnet": partial(subject.tape.gradient_by_length, scaled=True)},
        "record": {"forward": subject.forward, "pathnet": subject.record},
        "many": {
            "fifteen lines, before": partial(kept.norms, few),
            "pathnet": partial(norms, many),
            "fifteen lines, after": partial(kept.norms, few),
        },
    }


def _visits(paths: Tensor) -> dict[str, int]:
    """Return the number of paths, of residual modules on them, and of those modules if equal tails are shared."""
    modules, shared = modules_walked(paths)
    return {"paths": len(paths), "modules": modules, "shared": shared}


def _expected_s(subject: Subject, sizes: Sizes, name: str, findings: Findings) -> float:
    """Return roughly the seconds of one round, from a path of the fifteen lines that is timed now."""
    path = subject.paths(1)
    subject.kept.norms(path)
    start = time.perf_counter()
    subject.kept.norms(path)
    subject.synchronize()
    each = time.perf_counter() - start
    few, many = sizes.paths
    paths = {
        "first": 2 * few,
        "few": 2 * few,
        "single": 2 * sizes.single + 3 * sizes.loops,
        "sums": 2 * subject.n,
        "record": 2,
    }
    if name != "many":
        return each * paths[name]
    ours = findings["few"]["pathnet"]["median_s"] / few if "few" in findings else each
    return each * 2 * few + ours * many


def _timed(
    subject: Subject, budget: Budget, works: Works, rounds: int, expected_s: float, what: str
) -> dict[str, Findings]:
    """Time the works in turn: in all rounds, in the fewest that fit, or in a single one.

    Raises:
        LeftOut: a single one does not fit.
    """
    if rounds > 1 and (1 + min(LEAST_ROUNDS, rounds)) * expected_s > budget.left:
        budget.cut(f"rounds of {what}", rounds, 1, f"one takes some {expected_s:.3g} s")
        rounds = 1
    budget.require(rounds * expected_s, what)
    clocked = {name: Clocked(work, subject.synchronize) for name, work in works.items()}
    timings = budget.timed(clocked, rounds, f"rounds of {what}")
    kept = {name: clocked[name].processor_s[-len(timing.seconds) :] for name, timing in timings.items()}
    return {
        name: {**timing.facts(), "median_processor_s": float(np.median(kept[name]))}
        for name, timing in timings.items()
    }


def _ratios(findings: Findings, sizes: Sizes) -> dict[str, Findings]:
    """Return the ratios that have goals, by wall and by processor seconds."""
    return {
        "wall": _ratios_by("median_s", findings, sizes),
        "processor": _ratios_by("median_processor_s", findings, sizes),
    }


def _ratios_by(clock: str, findings: Findings, sizes: Sizes) -> Findings:
    def seconds(part: str, name: str = "pathnet") -> float:
        return float(findings[part][name][clock])

    ratios: Findings = {}
    if "first" in findings:
        ratios["first"] = seconds("first", "fifteen lines") / seconds("first")
    if "few" in findings:
        ratios["few"] = seconds("few", "fifteen lines") / seconds("few")
    if "many" in findings:
        # Path by path a module takes the fifteen lines the same time, however many paths there are.
        few, many = (entry["modules"] for entry in findings["visits"])
        around = (seconds("many", "fifteen lines, before") + seconds("many", "fifteen lines, after")) / 2
        ratios["many"] = around * many / few / seconds("many")
    if "single" in findings:
        ratios["single"] = seconds("single", "fifteen lines") / seconds("single")
        ratios["loop"] = seconds("single", "loop") / sizes.loops / (seconds("single") / sizes.single)
    if "sums" in findings:
        ratios["sums"] = seconds("sums") / seconds("sums", "module VJPs")
    if "record" in findings:
        ratios["record"] = seconds("record") / seconds("record", "forward")
    return ratios
