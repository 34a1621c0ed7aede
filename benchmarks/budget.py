"""The estimated time of each step of a run on a GPU: ``python -m benchmarks.budget`` prints it.

`benchmarks.kernels` counts kernels in the steps' own shapes, without a GPU. The time to compile one, and to build the
native library, was measured on one core. A step's run time is estimated: rounds times the expected time of one on an
H100, which no GPU has confirmed. A step may take `SLACK` times the estimate. All limits together, with the native
build before them, are the 490 s of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.adapted.cases import ON_GPU
from benchmarks.cases import FULL, Setup

__all__ = [
    "CORES",
    "COSTS",
    "FIRST_NUMBER",
    "FIRST_NUMBER_S",
    "KERNELS",
    "REHEARSAL_LIMIT_S",
    "RUN_S",
    "TESTS",
    "TEST_PROCESSES",
    "first_number_s",
    "limit_s",
    "limits_s",
    "native_s",
    "seconds",
    "table",
]

RUN_S = 490.0

CORES = 16
"""Cores of the machine that the budget is for."""

SLACK = 1.2

KERNEL_S = 1.3
"""Core seconds to compile one Triton kernel: 1.6 measured, less a fifth for source lines, which a run omits."""

POOL_S = 4.0
"""Seconds until the compiling process has imported torch and Triton, and while some of its workers are idle at the
end."""

START_S = 4.0
"""Seconds to start a step's process: Python, torch, CUDA, a network and its statistics."""

NATIVE_CORE_S, NATIVE_LONGEST_S, NATIVE_REST_S = 189.0, 21.0, 6.0
"""Core seconds to build the native library, and seconds of its slowest file, measured; seconds of pip and CMake."""

TESTS, TEST_PROCESSES = {"cuda_tests": 60, "triton_tests": 37}, 8
"""Number of tests of each step; largest number of processes that run them."""

LEAST_LIMIT_S = 10.0
"""Smallest limit of a step, in seconds: reading torch's files from a cold disk takes as long as some steps."""

REHEARSAL_LIMIT_S = 600.0
"""Limit of a rehearsed step on any machine, in seconds."""

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Part:
    """A part of a step: ``rounds`` repeats of ``each_s`` seconds."""

    title: str
    rounds: float
    each_s: float

    @property
    def seconds(self) -> float:
        return self.rounds * self.each_s


@dataclass(frozen=True)
class Cost:
    """The cost of a step.

    Attributes:
        parts: parts of its time on the GPU and in Python.
        kernels: largest number of kernels that it compiles; one step compiles those of all others ahead.
    """

    parts: tuple[Part, ...]
    kernels: int = 0

    @property
    def run_s(self) -> float:
        return START_S + sum(part.seconds for part in self.parts)


def _sweeps(setup: Setup, *batch_s: float) -> tuple[Part, ...]:
    """Return the parts of a sweep by precision: batch after batch, no longer than the setup's seconds."""
    return tuple(
        Part(f"batches of {precision}", 1, min(setup.seconds, setup.sweep_batches * each))
        for precision, each in zip(setup.precisions, batch_s, strict=False)
    )


def _rounds(setup: Setup, each_s: float, warm_up: int = 2) -> float:
    """Return the number of rounds of a comparison by `benchmarks.timing.interleaved`."""
    return warm_up + max(LEAST_ROUNDS, min(setup.rounds, math.ceil(setup.seconds / each_s)))


def costs(setup: Setup) -> dict[str, Cost]:
    """Return the cost of each step, in order.

    Backward passes along 55 paths at batch 128 take 3.4 ms in bfloat16 and 11 ms in float32 by `cuda`, 11.5 ms in BN
    mode ``batch`` by `triton`. A forward and backward pass in PyTorch takes 25 ms (500 launches of 50 us).
    """
    lengths, precisions = len(setup.lengths), len(setup.precisions)
    # 55 passes of the loop, of batched gradients; replays of the composition.
    sweep_round_s = 55 * 0.025 + 1.5 + 0.6
    path_round_s = 0.025 + 0.1 + 0.1
    step_round_s = 6 * 0.03
    return {
        "build": Cost((Part("facts", 1, 0.5),)),
        "cuda_tests": Cost(
            (Part("tests", TESTS["cuda_tests"] / TEST_PROCESSES, 1.0), Part("processes start", 1, 6.0))
        ),
        "accuracy": Cost((Part("float64 backward passes", lengths * precisions, 0.8),)),
        "sweep": Cost(
            (
                Part("check on a small network, captures", 1, 6.0),
                Part("captures and choice of algorithms", 1, 6.0),
                Part("rounds", _rounds(setup, sweep_round_s), sweep_round_s),
            )
        ),
        "compile": Cost((Part("collecting", 1, 5.0),), KERNELS),
        "triton_tests": Cost(
            (Part("tests", TESTS["triton_tests"] / TEST_PROCESSES, 2.0), Part("processes start", 1, 6.0))
        ),
        "whole_sweep": Cost((Part("drawing paths", 1, 1.0), *_sweeps(setup, 0.0045, 0.013))),
        "batch_sweep": Cost((Part("float64 backward passes", precisions, 0.5), *_sweeps(setup, 0.013, 0.03))),
        "running_triton": Cost(
            (
                Part("float64 backward passes", precisions, 0.5),
                Part("rounds", precisions * _rounds(setup, 0.03), 0.03),
            )
        ),
        "training": Cost((Part("captures", 4, 0.5), Part("rounds", _rounds(setup, step_round_s), step_round_s))),
        "paths": Cost(
            (
                Part("check on a small network, captures", 1, 4.0),
                Part("captures and choice of algorithms", lengths, 1.0),
                Part("rounds", lengths * _rounds(setup, path_round_s), path_round_s),
            )
        ),
        "models": Cost((Part("models", len(ON_GPU.cases), 5.0),)),
        "deletions": Cost((Part("rounds", _rounds(setup, 0.55), 55 * 0.01 + 0.02),)),
        "sums": Cost(
            (Part("float64 backward passes", precisions, 0.5), Part("rounds", precisions * _rounds(setup, 0.3), 0.3))
        ),
        "imagenet": Cost((Part("rounds of both modes", 2 * 5, 5 * 0.05), Part("network", 1, 2.0))),
        "scaling": Cost(
            (
                Part("rounds of paths", precisions * 5, 5.5 * 0.06),
                Part("rounds of batches, depths, widths", precisions * 5 * 10, 0.012),
                Part("networks and records", 7 * precisions, 0.3),
            )
        ),
        "host": Cost((Part("launches and replays, on one core", 1, 6.0),)),
        "sanitizer": Cost((Part("memcheck, racecheck", 2, 12.0),)),
        "profile": Cost((Part("ncu", 1, 12.0),)),
        "training_compiled": Cost((Part("compilation", 2, 14.0), Part("rounds", _rounds(setup, 0.05), 0.05))),
    }


KERNELS = 650
"""Largest number of kernels that a run compiles; `benchmarks.kernels` counts them."""

COSTS = costs(FULL)

FIRST_NUMBER = Cost(
    (
        Part("Triton's driver module, by the C compiler", 1, 1.0),
        Part("launchers of Triton 3.6, by the C compiler", 50 / CORES, 0.5),
        Part("float64 backward passes of the check, on the CPU", 1, 0.5),
        Part("captures, modules loaded, the backward passes", 1, 1.5),
    ),
    kernels=50,
)
"""The cost of a user's first number, of ResNet-110 in BN mode ``batch`` and bfloat16, with an empty cache.

Its kernels are those of the engine's self-check, which are the network's own."""

FIRST_NUMBER_S = 20.0
"""Limit for it, in seconds."""

USERS_KERNEL_S = 1.6
"""Core seconds to compile a kernel with source lines, as users do."""


def compiling_s(kernels: int, cores: int = CORES, kernel_s: float = KERNEL_S) -> float:
    """Return the seconds to compile ``kernels`` kernels."""
    return 0.0 if kernels == 0 else POOL_S + kernels * kernel_s / cores


def first_number_s(cores: int = CORES) -> float:
    """Return the seconds until a user has a first number."""
    return FIRST_NUMBER.run_s + compiling_s(FIRST_NUMBER.kernels, cores, USERS_KERNEL_S)


def native_s(cores: int = CORES) -> float:
    """Return the seconds to build the native library."""
    return NATIVE_REST_S + max(NATIVE_LONGEST_S, NATIVE_CORE_S / cores)


def seconds(step: str, cores: int = CORES) -> float:
    """Return the estimated seconds of a step."""
    return COSTS[step].run_s + compiling_s(COSTS[step].kernels, cores)


def limit_s(step: str, cores: int = CORES) -> float:
    """Return the seconds after which a step is stopped."""
    return max(LEAST_LIMIT_S, SLACK * seconds(step, cores))


def limits_s() -> float:
    """Return all limits together, with the native build."""
    return native_s() + sum(map(limit_s, COSTS))


def table(kernels: dict[str, int], first_kernels: int) -> Table:
    """Return the budget as a table, with the number of kernels that each step needs first, and of a user's first
    number."""
    title = (
        f"Budget on {CORES} cores: {KERNEL_S} core seconds per kernel, estimated run seconds, limits {SLACK} x both"
    )
    budget = Table("step", "new kernels", "compile, s", "run, s", "limit, s", "parts of the run seconds", title=title)
    budget.add_row("native build", "", "", "", f"{native_s():.1f}", f"{NATIVE_CORE_S:.0f} core seconds")
    for step, cost in COSTS.items():
        compiled = f"{compiling_s(cost.kernels):.1f}" if cost.kernels else ""
        new = str(kernels.get(step, ""))
        budget.add_row(step, new, compiled, f"{cost.run_s:.1f}", f"{limit_s(step):.1f}", _parts(cost))
    compiled = f"{sum(compiling_s(cost.kernels) for cost in COSTS.values()):.1f}"
    run = f"{sum(cost.run_s for cost in COSTS.values()):.1f}"
    budget.add_row("sum", str(sum(kernels.values())), compiled, run, f"{limits_s():.1f}", f"of {RUN_S:.0f} s")
    first = f"{compiling_s(FIRST_NUMBER.kernels, CORES, USERS_KERNEL_S):.1f}", f"{FIRST_NUMBER.run_s:.1f}"
    budget.add_row("a user's first number", str(first_kernels), *first, f"{FIRST_NUMBER_S:.1f}", _parts(FIRST_NUMBER))
    return budget


def _parts(cost: Cost) -> str:
    return ", ".join(f"{part.title} {part.rounds:.3g} x {part.each_s:.3g}" for part in cost.parts)


def main() -> None:
    from benchmarks.kernels import counted

    Console(width=150).print(table(*counted()))


if __name__ == "__main__":
    main()
