"""A sweep of one path of every length, by each competitor: ``python -m pytest benchmarks/bench_paths.py``.

On a GPU where there is one, else the sizes of the rehearsal on the CPU. `benchmarks.gpu` interleaves the same works.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pathnet
from benchmarks.cases import FULL, REHEARSAL, batch, network
from benchmarks.competitors import Field, check, field

SETUP = FULL if torch.cuda.is_available() else REHEARSAL
NAMES = ["loop", "composed, a graph a path", "composed, all at once", "batched gradients"]


@pytest.fixture(scope="module")
def racing() -> Field:
    assert all(own["passed"] for own in check(SETUP).values())
    net = network(SETUP)
    return field(SETUP, net, *batch(SETUP), pathnet.paths.one_of_each_length(net.n))


@pytest.mark.parametrize("name", [*NAMES, *(f"pathnet {precision}" for precision in SETUP.precisions)])
def test_sweep(name: str, racing: Field, benchmark: Any) -> None:
    if name not in racing.competitors:
        pytest.skip(f"{name}: {racing.unavailable}")

    def work() -> None:
        racing.competitors[name].norms()
        SETUP.synchronize()

    benchmark(work)
