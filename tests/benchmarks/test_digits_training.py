"""The comparison of networks trained by fused kernels with those trained by PyTorch's operators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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
    [([0.8, 0.8, 0.8], True), ([0.95, 0.9, 0.8], True), ([0.91, 0.9, 0.9], False), ([0.6, 0.7, 0.7], False)],
    ids=str,
)
def test_the_mean_must_lie_in_the_range_of_pytorchs_operators(fused: list[float], within: bool) -> None:
    rows = digits_training.comparisons(entries(fused))
    assert [row["measure"] for row in rows] == list(digits_training.MEASURES)
    assert all(row["within"] == within and row["seeds"] == 3 for row in rows)
    assert rows[0]["eager"] == {"mean": pytest.approx(0.8), "least": 0.7, "most": 0.9}


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
    monkeypatch.setattr(digits_training, "trainings", lambda *_: iter(entries([0.6, 0.7, 0.7])))
    assert digits_training.main(["--out", str(tmp_path), "--seeds", "3"]) == 1
    (file,) = tmp_path.iterdir()
    recorded = results.read_object(file)
    assert recorded["kind"] == "training" and len(recorded["trainings"]) == 6
    assert (
        "| test accuracy, float32 | 80 % (70 % to 90 %) | 66.7 % (60 % to 70 %) | **no** |" in capsys.readouterr().out
    )
