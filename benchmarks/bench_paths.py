"""A sweep of one path of every length by each competitor: ``python -m pytest benchmarks/bench_paths.py``.

It runs on a GPU if there is one, else on the CPU in the sizes of the rehearsal. `benchmarks.gpu` times the same calls
in turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pathnet
from benchmarks.cases import FULL, REHEARSAL, batch, network
from benchmarks.competitors import Entrants, build_entrants, check

SETUP = FULL if torch.cuda.is_available() else REHEARSAL
NAMES = ["loop", "composed, a graph a path", "composed, all at once", "batched gradients"]


@pytest.fixture(scope="module")
def competing() -> Entrants:
    assert all(result["passed"] for result in check(SETUP).values())
    net = network(SETUP)
    return build_entrants(SETUP, net, *batch(SETUP), pathnet.paths.one_of_each_length(net.n))


@pytest.mark.parametrize("name", [*NAMES, *(f"pathnet {precision}" for precision in SETUP.precisions)])
def test_sweep(name: str, competing: Entrants, benchmark: Any) -> None:
    if name not in competing.competitors:
        pytest.skip(f"{name}: {competing.unavailable}")

    def work() -> None:
        competing.competitors[name].norms()
        SETUP.synchronize()

    benchmark(work)
