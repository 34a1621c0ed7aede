"""The table of the training step says what its file says."""

from __future__ import annotations

from typing import Any

import pytest
from test_tables import timed

from benchmarks.cpu.figures import figures
from benchmarks.tables import models, training
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def trained() -> dict[str, Any]:
    """Return a file of a processor with made-up training steps."""
    times = {"form": "torch, NCHW, float32", "median_s": 0.75, "parts": {"forward_s": 0.25, "backward_s": 0.5}}
    drawn = {"median_s": 0.125, "seconds": [0.1, 0.15]}
    ours = {**times, "form": "pathnet, float32", "median_s": 0.25, "drawn": drawn, "memory": {"bytes": 512e6}}
    times, ours = ({**row, "by": row["form"].split(",")[0], "precision": "float32"} for row in (times, ours))
    bounds = {"operations": 200e9, "bytes": 4e9, "peak_flops_per_s": 1e12, "copied_bytes_per_s": 40e9}
    conclusions: dict[str, Any] = {
        "float32": {"times_faster": 3.0, "best": "torch, NCHW, float32", "drawn_share": 0.5, "epoch_s": 97.5},
        "bfloat16": {"times_faster": 3.5, "best": "torch, NCHW, bfloat16"},
    }
    errors = {"pathnet, float32": 1e-6, "pathnet, bfloat16": 0.022, "torch, bfloat16": 0.033}
    step = {
        "drawn": 2,
        "modules": 6,
        "batch": 4,
        "amx": False,
        "forms": [times, ours],
        "error": errors,
        "bounds": bounds,
    }
    file = timed(training={**step, "conclusions": conclusions})
    file["figures"] += figures(file["found"])
    file["cuts"] = [{"what": "training step of torch, compiled", "because": "it could not be compiled", "kept": None}]
    return file


def test_the_training_step_stands_form_by_form() -> None:
    text = training.training({"cpu/a.json": trained()})
    assert "| torch, NCHW, float32 | 750 ms | 250 ms | 500 ms |  |  |" in text
    assert "| pathnet, float32 | 250 ms | 250 ms | 500 ms | 125 ms | 512 MB |" in text
    assert "PyTorch's best form | 3 (goal: at least 2) | 3.5 |" in text
    assert "| 0.5 (goal: at most 0.45, **not** met) | not measured |" in text
    assert "| PyTorch's best form | torch, NCHW, float32 | torch, NCHW, bfloat16 |" in text
    assert "| 1e-06 | 0.022 (autocast: 0.033) |" in text
    assert "| GFLOP/s of direct convolutions | 800 |  |" in text
    assert "A step has 200 GFLOP in direct convolutions (200 ms at the measured peak of multiply-adds)" in text
    assert "move 4 GB in float32 (100 ms at the measured rate of a copy)" in text
    assert "Every draw of 2 modules, share of the form's step: pathnet, float32: 40 % and 60 %." in text
    assert "Left out: training step of torch, compiled, since it could not be compiled." in text


def test_the_training_step_stands_in_the_column_of_its_processor() -> None:
    elsewhere = timed(lengths={})
    elsewhere["facts"]["processor"] = "B CPU"
    text = models.speed({"cpu/a.json": timed(lengths={}), "cpu/b.json": elsewhere, "cpu/c.json": trained()})
    assert "| ResNet-110, training step, float32 | PyTorch's best form in float32 | 3 | not measured |" in text
    assert "| ResNet-110, training step, bfloat16 | PyTorch's best form | 3.5 | not measured |" in text
    assert "training step" not in models.speed({"cpu/a.json": timed(lengths={}, training={"share": 0.5})})
