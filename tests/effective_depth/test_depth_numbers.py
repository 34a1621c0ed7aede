"""Numbers of the effective depth, and the share of time that they cost."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import SMALL
from helpers.oracles import detach_loop
from torch import Tensor

from pathnet import EffectiveDepth, paths
from pathnet.effective_depth import read
from pathnet.effective_depth.callback import _shortest_run
from pathnet.engines import reference

ALWAYS = math.inf
"""Share of the time that lets every step be measured."""


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[4]], ids=lambda case: case.id)
def test_depth_run_and_half_are_those_of_all_single_paths(case: Any, bn: Any, tmp_path: Path) -> None:
    net, (batch, labels) = case.net(), case.images()
    row = EffectiveDepth((batch, labels), tmp_path / "depth.csv", net, bn=bn, engine="reference")(0)
    assert row is not None
    sums = [torch.zeros(1, dtype=torch.float64)] * (net.n + 1)
    for path in paths.enumerate_all(net.n):
        length = int(path.sum())
        sums[length] = sums[length] + detach_loop(net, batch, labels, path, bn)
    norms, full = np.array([gradient.norm().item() for gradient in sums]), sum(sums)
    shares = norms / norms.sum()
    assert row.depth == pytest.approx((np.arange(net.n + 1) * shares).sum(), rel=1e-4)
    runs = [(j - i, i, j) for i in range(net.n + 1) for j in range(i, net.n + 1) if shares[i : j + 1].sum() >= 0.95]
    assert (row.last - row.first, row.first, row.last) in runs and row.last - row.first == min(runs)[0]
    explained = np.cumsum([float((gradient * full).sum() / (full * full).sum()) for gradient in sums])
    assert row.half == int(np.argmax(explained >= 0.5))
    assert row.loss > 0 and row.seconds > 0 and read(tmp_path / "depth.csv") == [row]


@pytest.mark.parametrize(
    ("shares", "run"),
    [
        ([0.5, 0.5], (0, 1)),
        ([0.0, 0.0, 1.0, 0.0], (2, 2)),
        ([0.04, 0.5, 0.45, 0.01], (1, 2)),
        ([0.48, 0.48, 0.04, 0.0], (0, 1)),
        ([0.2, 0.2, 0.2, 0.2, 0.2], (0, 4)),
    ],
)
def test_the_shortest_run(shares: list[float], run: tuple[int, int]) -> None:
    assert _shortest_run(shares) == run


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.filterwarnings("ignore:share")
def test_measuring_takes_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int, share: float
) -> None:
    """Count time in backward passes through one module for one image."""
    case = dataclasses.replace(SMALL[0], batch=8)
    net, (batch, labels) = case.net(), case.images()
    clock = [0.0]
    through = reference._through

    def counted(block: Any, x: Tensor, grads: Any, *further: Any) -> Any:
        clock[0] += len(grads[0]) * len(x)
        return through(block, x, grads, *further)

    monkeypatch.setattr(reference, "_through", counted)
    monkeypatch.setattr("pathnet.effective_depth.callback._now", lambda: clock[0])
    callback = EffectiveDepth((batch, labels), tmp_path / "depth.csv", net, every, share, engine="reference")
    # A step of training on 32 images, each module backward twice what one to the input alone is.
    step_work, training_work, measuring, steps = 32 * net.n * 2.0, 0.0, [], []
    for step in range(200):
        before = clock[0]
        row = callback(step)
        if row is not None:
            measuring.append(clock[0] - before)
            steps.append(step)
            assert row.seconds == measuring[-1]
            if len(steps) > 1:
                assert sum(measuring) <= share * training_work
        else:
            assert clock[0] == before, "a step between cost something"
        clock[0] += step_work
        training_work += step_work
    # n (n + 1) modules' worth of one branch each: every length comes out of a block by its skip and by its module.
    assert set(measuring) == {len(batch) * net.n * (net.n + 1)}
    assert steps[0] == 0 and all(step % every == 0 for step in steps)
    allowed = max(every, measuring[0] / step_work / share)
    assert len(steps) >= 0.9 * 200 / (math.ceil(allowed / every) * every)


@pytest.mark.parametrize("begin", [0, 40])
def test_the_first_skipped_step_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begin: int) -> None:
    """A measurement takes 6 s, a step 1 s: a share of 0.1 allows one in 60 steps."""
    clock = [0.0]
    monkeypatch.setattr("pathnet.effective_depth.callback._now", lambda: clock[0])

    def slow(self: EffectiveDepth, net: Any) -> tuple[float, int, int, int, float]:
        clock[0] += 6
        return 1.0, 1, 1, 1, 1.0

    monkeypatch.setattr(EffectiveDepth, "_measure", slow)
    callback = EffectiveDepth(SMALL[0].images(), tmp_path / "depth.csv", SMALL[0].net(), every=20, share=0.1)
    measured = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(begin, begin + 301):
            if callback(step) is not None:
                measured.append(step - begin)
            clock[0] += 1
    assert measured == [0, 120, 180, 240, 300]
    assert [(warning.category, warning.filename) for warning in seen] == [(RuntimeWarning, __file__)]
    assert str(seen[0].message) == (
        f"share: step {begin + 20} is not measured, since a measurement takes 6 s: 0.1 of the training's time allows "
        "one in about 60 steps; share=float('inf') measures at every multiple of 20"
    )


def test_the_default_leaves_at_least_hundred_steps_between(tmp_path: Path) -> None:
    net, batch = SMALL[0].net(), SMALL[0].images()
    callback = EffectiveDepth(batch, tmp_path / "depth.csv", net, share=ALWAYS)
    assert [step for step in range(1, 301) if callback(step) is not None] == [100, 200, 300]


def test_other_processes_than_the_first_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    callback = EffectiveDepth(SMALL[0].images(), tmp_path / "depth.csv", SMALL[0].net())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert callback(0) is None and not list(tmp_path.iterdir())
    monkeypatch.setattr("os.access", lambda *_: pytest.fail("asked of a disk that may be another machine's"))
    EffectiveDepth(SMALL[0].images(), tmp_path / "depth.csv", SMALL[0].net())
