"""Findings and claims about exact sums and signed draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gradient_runs import EXACT, small_data
from matplotlib.text import Text

import pathnet
from pathnet import models, results
from pathnet.experiments import path_gradients
from pathnet.experiments.by_length import ExactSum
from pathnet.experiments.comparison import Comparison, Signed, compare
from pathnet.experiments.findings import cancelled, findings_of
from pathnet.experiments.path_gradients import measure
from pathnet.figures import sums
from pathnet.paper import claims
from pathnet.signed import judge


def exact_run(folder: Path, share: Sequence[float], batches: int = 1, spread: float = 0.0) -> results.Run:
    """Write a run of 10 blocks whose lengths explain the given shares of the gradient.

    Args:
        folder: that of the run.
        share: the share of each of the lengths 0 to 10.
        batches: number of batches.
        spread: the share of length 0 is larger by it on even batches, and smaller on odd ones.
    """
    model = {"hash": "abc", "config": {"model": "residual"}, "blocks": 10}
    identity = {"experiment": path_gradients.NAME, "model": model, "data": {"name": "made up", "hash": "abc"}}
    with results.writing(folder, identity, {}, {"started": ""}) as run:
        rows = [
            ExactSum(batch, k, abs(explained), 0.5, 0.5, explained, abs(1 - sum(share[: k + 1])), 1.0, "cpu")
            for batch in range(batches)
            for k, explained in enumerate(share + spread * np.eye(11)[0] * (-1) ** batch)
        ]
        run.add_rows(rows)
        return run


@pytest.mark.parametrize(
    ("share", "spread", "verdict"),
    [
        ([0.1, 0.2, 0.3, 0.3, 0.06, 0.04, 0, 0, 0, 0, 0], 1e-3, "held"),
        ([0.1, 0.2, 0.3, 0.3, 0.04, 0.06, 0, 0, 0, 0, 0], 1e-3, "did not hold"),
        ([0.1, 0.2, 0.3, 0.3, 0.2, -0.3, 0.2, 0, 0, 0, 0], 1e-3, "did not hold"),
        ([0.1, 0.2, 0.3, 0.3, 0.06, 0.04, 0, 0, 0, 0, 0], 0.1, "open"),
    ],
    ids=["short ones", "long ones", "only at first", "too few batches to tell"],
)
def test_the_claim_is_that_short_paths_explain_the_gradient(
    share: Sequence[float], spread: float, verdict: str, tmp_path: Path
) -> None:
    (claim,) = claims(exact_run(tmp_path, share, 20, spread))
    assert claim.verdict == verdict and claim.paper == "Almost all of the gradient comes from short paths."
    assert "lengths up to 4 of 10 explain" in claim.measured and "at least 95%" in claim.bound
    (alone,) = claims(exact_run(tmp_path / "alone", share))
    assert alone.verdict == "open" and "no interval: 1 batch" in alone.measured


def test_findings_say_what_was_found(whole: results.Run) -> None:
    result = compare(whole)
    lines = findings_of(result)
    assert result.exact is not None
    most = result.exact.first_to_explain(0.95)
    assert lines[0].startswith(f"exact sums over all 2^9 paths, on 5 batches: lengths up to {most} explain")
    among = cancelled(result)
    assert among is not None and any(
        f"{among.least:.3g} to {among.most:.3g} times the norm of" in line for line in lines
    )
    assert lines[0].endswith("(no interval: 5 batches)")
    few = "10 signed draws on 5 batches, too few for a standard error"
    assert any(line.startswith(f"{few}; not to be trusted at lengths") for line in lines)
    assert any("there are too few draws" in line for line in lines)
    assert findings_of(Comparison(9)) == []


def test_of_a_network_with_gates_the_gradient_is_that_with_frozen_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, plan = models.highway(8, 4).eval(), dataclasses.replace(EXACT, batches=1)
    for block in net:  # gates that look at their input, so that something flows through them
        torch.nn.init.normal_(block.gate.weight)
    run = measure(net, small_data(), plan, tmp_path)
    assert measure(net, small_data(), plan, tmp_path).facts["identity"]["model"]["gates"] is True
    result, tape = compare(run), pathnet.record(net, *small_data().random_batch(4, 0, 0), engine="reference")
    assert result.exact is not None
    frozen = tape.routed_gradients(torch.ones(1, 3, 2))[0]
    assert result.exact.full_norm == pytest.approx(frozen.norm().item(), rel=1e-6)
    assert abs(tape.gradient().norm() / frozen.norm() - 1) > 0.01
    (claim,), lines, kept = claims(run), findings_of(result), list[Any]()
    monkeypatch.setattr(sums, "saved", lambda figure, stem: kept.append(figure) or [])
    sums.figure_sums(result, "title", tmp_path)
    shown = [text.get_text() for text in kept[0].findobj(Text)]
    sentences = [line for line in (*lines, claim.bound, claim.measured, *shown) if "gradient" in line]
    assert len(sentences) == 8 and sentences.pop(2).startswith(
        "no path contains the part of the gradient that flows through the gates"
    )
    assert all(line.count("gradient") == line.count("gradient with frozen gates") == 1 for line in sentences)
    assert not any("gates" in line for line in findings_of(dataclasses.replace(result, gates=False)))


def test_alignment_is_told_apart_from_a_heavy_tail() -> None:
    """Two hundred draws of uniform size have no tail, but aligned paths would need more, except at the ends."""
    draws = np.random.default_rng(0).uniform(0.9, 1.1, (200, 55))
    unknown = Comparison(54, signed=Signed(200, judge(draws), draws.mean(0)))
    lines = findings_of(unknown)
    assert lines[0] == "200 signed draws on 200 batches; not to be trusted at lengths 3 to 51"
    assert "without exact sums, it cannot be ruled out that the paths are so aligned" in lines[1] and len(lines) == 2
    counts = np.array([float(comb(54, k)) for k in range(55)])
    aligned = Comparison(54, signed=Signed(200, judge(draws, counts), draws.mean(0)))
    assert "lengths 3 to 51: the paths are so aligned" in findings_of(aligned)[1]
    apart = Comparison(54, signed=Signed(200, judge(draws, 0.1 * counts), draws.mean(0)))
    assert findings_of(apart) == ["200 signed draws on 200 batches"]
