"""The sizes of a full run on a processor and of its rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.adapted import cases as adapted
from benchmarks.cases import Setup
from benchmarks.cpu.training import cases as training
from pathnet.recording import BatchNormMode, Precision

__all__ = ["FULL", "MINUTES", "SMALL", "Sizes", "codes_of_any_length", "deletions", "with_batch"]

MINUTES = 15.0
"""Time limit of a complete run, on any machine."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run.

    Attributes:
        setup: network, batch, the ``lengths`` that represent all, ``rounds`` of the comparison by length.
        checked: smaller network and batch on which all competitors are checked against float64.
        compiled: whether the composition may use torch.compile.
        slow_rounds: rounds of sweeps, deletions and fits.
        fit_batch: number of samples when the number of paths varies, tails are shared or memory is measured.
        sweeps: numbers of paths of each length in one call.
        batches: numbers of samples of the fit over the batch.
        shared_lengths, shared_counts: lengths and numbers of paths that run together and one by one.
        memory_counts: a small and a large number of paths.
        peak_seconds: seconds of each measurement of the processor's peak.
        sums: BN mode, precision and batch of the exact sums by length.
        training: sizes of the training step.
        models: sizes of the step on the engine for any model.
    """

    setup: Setup
    checked: Setup
    compiled: bool
    slow_rounds: int
    fit_batch: int
    sweeps: tuple[int, ...]
    batches: tuple[int, ...]
    shared_lengths: tuple[int, ...]
    shared_counts: tuple[int, ...]
    memory_counts: tuple[int, int]
    peak_seconds: float
    sums: tuple[tuple[BatchNormMode, Precision, int], ...]
    training: training.Sizes
    models: adapted.Sizes


_CHECKED = replace(cases.REHEARSAL, depth=14, width=16, side=16, batch=4)

FULL = Sizes(
    setup=replace(cases.FULL, device="cpu", engine="cpu", lengths=(1, 5, 11, 17, 27, 38, 54), rounds=5),
    checked=_CHECKED,
    compiled=True,
    slow_rounds=3,
    fit_batch=16,
    sweeps=(1, 2, 3, 4),
    batches=(16, 32, 64, 128),
    shared_lengths=(3, 11, 27, 45),
    shared_counts=(1, 16, 54, 256),
    memory_counts=(16, 512),
    peak_seconds=0.5,
    sums=(
        ("running", "float32", 32),
        ("running", "bfloat16", 32),
        ("running", "float32", 128),
        ("running", "bfloat16", 128),
        ("batch", "float32", 32),
    ),
    training=training.FULL,
    models=adapted.FULL,
)

SMALL = Sizes(
    setup=replace(cases.REHEARSAL, lengths=(1, 3, 6), rounds=3),
    checked=replace(_CHECKED, width=4, side=8),
    compiled=False,
    slow_rounds=1,
    fit_batch=2,
    sweeps=(1, 2, 3),
    batches=(1, 2, 3),
    shared_lengths=(2, 4),
    shared_counts=(1, 4),
    memory_counts=(2, 20),
    peak_seconds=0.02,
    sums=(("running", "float32", 2), ("batch", "bfloat16", 2)),
    training=training.SMALL,
    models=adapted.SMALL,
)


def with_batch(sizes: Sizes, batch: int) -> Sizes:
    """Return the sizes with batches of ``batch`` images, and all other numbers of images in proportion."""

    def scaled(images: int) -> int:
        return max(1, images * batch // sizes.setup.batch)

    return replace(
        sizes,
        setup=replace(sizes.setup, batch=batch),
        fit_batch=scaled(sizes.fit_batch),
        batches=tuple(sorted(set(map(scaled, sizes.batches)))),
        sums=tuple((bn, precision, scaled(images)) for bn, precision, images in sizes.sums),
    )


def codes_of_any_length(n: int, count: int) -> Tensor:
    """Return uint8 [count, n], paths drawn uniformly from all 2^n."""
    return torch.randint(0, 2, (count, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def deletions(n: int) -> Tensor:
    """Return routings, float64 [n, n, 2]; routing i deletes block i + 1."""
    routing = torch.ones(n, n, 2, dtype=torch.float64)
    routing[torch.arange(n), torch.arange(n), 1] = 0
    return routing
