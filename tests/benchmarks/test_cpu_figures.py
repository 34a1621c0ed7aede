"""The figures of a run on a processor, computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cpu import figures, fitting
from benchmarks.cpu.cases import FULL
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def row(name: str, precision: str, part: str, length: int | None, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "bn": "running",
        "precision": precision,
        "part": part,
        "length": length,
        "median_s": seconds,
    }


def test_ratios_by_hand() -> None:
    """Four blocks: the loop takes 10 s a path, the composition 2 s a module, pathnet 1 s a module and 8 s forward."""
    rows = [row("loop", "float32", "walk", length, 10.0) for length in (1, 4)]
    rows += [row("composition", "float32", "walk", length, 2.0 * length) for length in (1, 4)]
    rows += [row("pathnet", "float32", "walk", length, 1.0 * length) for length in (1, 4)]
    rows += [row("composition", "float32", "forward", None, 20.0), row("pathnet", "float32", "forward", None, 8.0)]
    sweep = {"rows": [{"bn": "running", "precision": "float32", "median_s": 5.0}]}
    findings = {
        "lengths": {"rows": rows, "blocks": 4},
        "sweep": sweep,
        "deletions": {"share_of_eager": {"float32": 0.3}},
        "sums": {
            "rows": [
                {
                    "bn": "running",
                    "precision": "float32",
                    "batch": 32,
                    "share": 0.9,
                    "timings": {"sums": {"median_s": 0.6}},
                }
            ]
        },
        "training": {
            "conclusions": {"float32": {"drawn_share": 0.44, "times_faster": 1.9}, "bfloat16": {"epoch_s": 200.0}},
            "drawn": 23,
            "modules": 54,
        },
    }
    by_title = {figure["figure"]: figure for figure in figures.figures(findings)}
    loop = by_title["times faster than the loop, running, float32"]
    assert (loop["walks"], loop["counted"], loop["met"]) == (10 / 2.5, 10 / (2.5 + 8 / 4), False)
    composition = by_title["times faster than the composition, running, float32"]
    assert (composition["walks"], composition["counted"]) == (2.0, (5 + 20 / 4) / (2.5 + 8 / 4))
    together = by_title["times faster than the composition, running, float32, one call"]
    assert (together["walks"], together["counted"]) == (5 / 1.25, (5 + 20 / 4) / (1.25 + 8 / 4))
    assert by_title["deletions, share of eager forward passes, float32"]["met"] is False
    assert by_title["training step with 23 of 54 modules drawn, share of a whole one, float32"]["met"] is True
    assert by_title["training step, times faster than PyTorch's best form, float32"]["met"] is False
    assert by_title["training step, times faster than PyTorch's best form, bfloat16"]["met"] is None
    assert by_title["epoch of CIFAR-10, seconds, extrapolated from a step, bfloat16"]["met"] is True
    share = "exact sums by length, share of as many modules one by one, running, float32, 32 images"
    assert (by_title[share]["walks"], by_title[share]["met"]) == (0.9, True)
    assert by_title["exact sums by length, seconds, running, float32, 32 images"]["met"] is False
    assert by_title["times faster than the loop, running, bfloat16"]["met"] is None
    assert figures.lines_by_length(findings)["composition, running, float32"]["slope"] == pytest.approx(2)


def test_lines_and_means() -> None:
    line = fitting.straight_line([1, 2, 3], [5.0, 7.0, 9.0])
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((2, 3, 1))
    assert fitting.straight_line([1, 2, 3], [1.0, 2.0, 1.0]).r_squared == pytest.approx(0)
    assert fitting.straight_line([1, 2, 3], [2.0, 2.0, 2.0]).r_squared == 1
    # A kink at length 2, such as caches cause.
    assert fitting.mean_over_lengths([1, 2, 4], [1.0, 2.0, 8.0], 4) == pytest.approx(np.mean([1, 2, 5, 8]))


def test_equal_tails_are_walked_once() -> None:
    paths = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 0, 1]])
    assert fitting.modules_walked(paths) == (2 + 3 + 1 + 2, 1 + 1 + 2)


def test_the_sizes_are_those_of_the_goals() -> None:
    setup = FULL.setup
    assert (setup.depth, setup.width, setup.batch, setup.side) == (110, 16, 128, 32)
    assert setup.lengths[0] == 1 and setup.lengths[-1] == 54
    assert FULL.training.drawn == 23 and FULL.compiled
