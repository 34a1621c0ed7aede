"""The comparison of networks trained by fused kernels with those trained by PyTorch's operators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy

from benchmarks import digits_training, results
from pathnet import data, native, training
from pathnet.study import PRESETS

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def entries(fused: list[float]) -> list[dict[str, Any]]:
    values = {"none": [0.9, 0.7, 0.8], "cpu": fused}
    return [
        {"precision": "float32", "engine": engine, "seed": seed, **dict.fromkeys(digits_training.MEASURES, value)}
        for engine, column in values.items()
        for seed, value in enumerate(column)
    ]


@pytest.mark.parametrize(
    ("fused", "within"),
    [([0.8, 0.8, 0.8], True), ([0.95, 1.0, 1.1], True), ([1.2, 1.2, 1.1], False), ([0.4, 0.4, 0.5], False)],
    ids=str,
)
def test_the_mean_must_lie_in_the_spread_of_pytorchs_operators(fused: list[float], within: bool) -> None:
    rows = digits_training.comparisons(entries(fused))
    assert [row["measure"] for row in rows] == list(digits_training.MEASURES)
    assert all(row["within"] == within and row["seeds"] == 3 for row in rows)
    # 0.8 -+ 4.303 * 0.1 * sqrt(2 / 3)
    assert rows[0]["spread"] == pytest.approx((0.4487, 1.1513), abs=1e-4)
    assert rows[0]["eager"] == {"mean": pytest.approx(0.8), "least": 0.7, "most": 0.9}


def test_the_spread_holds_95_percent_of_the_means_of_further_values() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (4000, 10))
    held = 0
    for values in draws:
        low, high = digits_training.spread_of_means(values[:5].tolist(), 5)
        held += low <= values[5:].mean() <= high
    assert scipy.stats.binomtest(held, len(draws), 0.95).pvalue > 1e-3


def test_both_engines_begin_with_equal_weights_and_end_close_after_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = []

    def train(*arguments: Any, engine: str) -> Any:
        engines.append(engine)
        return training.train(*arguments, engine=engine)

    monkeypatch.setattr(digits_training, "train", train)
    study = replace(PRESETS["digits"], depth=8, width=4)
    images = data.synthetic(images=64, classes=10, shape=(1, 8, 8))
    trained = list(digits_training.trainings(study, images, epochs=1, seeds=1))
    assert [(entry["precision"], entry["engine"]) for entry in trained] == [
        (precision, engine) for precision in digits_training.PRECISIONS for engine in digits_training.ENGINES
    ]
    assert engines == ["none", "cpu"] * 2
    for eager, fused in (trained[:2], trained[2:]):
        tolerance = 1e-5 if eager["precision"] == "float32" else 1e-2
        assert fused["train_loss"] == pytest.approx(eager["train_loss"], rel=tolerance)
        assert fused["test_loss"] == pytest.approx(eager["test_loss"], rel=tolerance)


def test_a_mean_outside_fails_and_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits_training, "trainings", lambda *_: iter(entries([0.3, 0.4, 0.4])))
    assert digits_training.main(["--out", str(tmp_path), "--seeds", "3"]) == 1
    (file,) = tmp_path.iterdir()
    recorded = results.read_object(file)
    assert recorded["kind"] == "training" and len(recorded["trainings"]) == 6
    assert "| 80 % (70 % to 90 %) | 44.9 % to 115 % | 36.7 % (30 % to 40 %) | **no** |" in capsys.readouterr().out
