"""Measuring runs of sampled path gradients: right, resumed to the same numbers, and refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TESTS
from helpers.gradient_runs import PLAN, small_data, small_net

import pathnet
from pathnet import models, paths, results
from pathnet.data import synthetic
from pathnet.experiments.path_gradients import PathGradients, measure
from pathnet.experiments.run import title
from pathnet.results import Measurements


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Measurements:
    return measure(small_net(), small_data(), PLAN, tmp_path_factory.mktemp("run")).measurements()


def assert_same(measured: Measurements, expected: Measurements) -> None:
    for field in dataclasses.fields(Measurements):
        np.testing.assert_array_equal(getattr(measured, field.name), getattr(expected, field.name))


def test_a_measurement_is_the_norm_along_its_path_on_its_batch(uninterrupted: Measurements) -> None:
    assert len(uninterrupted) == 6 * 9
    for row in (0, 13, 53):
        batch = int(uninterrupted.batch[row])
        images, labels = small_data().random_batch(4, 0, batch)
        tape = pathnet.record(small_net(), images, labels, engine="reference", precision="float64")
        b = torch.from_numpy(uninterrupted.path[row : row + 1])
        assert tape.path_gradient_norms(b).item() == pytest.approx(uninterrupted.norm[row], rel=1e-4)
        assert torch.equal(b[0], paths.one_of_each_length(9, 0, batch)[uninterrupted.length[row] - 1])


def test_a_killed_run_goes_on_to_the_same_measurements(tmp_path: Path, uninterrupted: Measurements) -> None:
    """The run is killed with SIGKILL after its fourth batch, in the midst of writing a part."""
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(TESTS), str(Path(pathnet.__file__).parent.parent)]!r}
from helpers.gradient_runs import PLAN, small_data, small_net
from pathnet.experiments import path_gradients

def progress(done, total, note):
    if done == 4:
        name = ".part-000002.parquet.0123456789ab.pathnet-temporary"
        open(os.path.join({str(tmp_path)!r}, "measurements", name), "wb").write(b"PAR1")
        os.kill(os.getpid(), signal.SIGKILL)

path_gradients.measure(small_net(), small_data(), PLAN, {str(tmp_path)!r}, progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert results.read(tmp_path).measurements().batch.tolist() == [b for b in range(4) for _ in range(9)]
    seen: list[int] = []
    run = measure(small_net(), small_data(), PLAN, tmp_path, lambda done, total, note: seen.append(done))
    assert seen == [5, 6]
    assert_same(run.measurements(), uninterrupted)
    assert not list(tmp_path.rglob("*.pathnet-temporary"))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_what_it_measured(
    tmp_path: Path, uninterrupted: Measurements, failure: type[BaseException]
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise failure

    with pytest.raises(failure):
        measure(small_net(), small_data(), PLAN, tmp_path, stop)
    assert len(results.read(tmp_path).measurements()) == 3 * 9
    assert_same(measure(small_net(), small_data(), PLAN, tmp_path).measurements(), uninterrupted)


def test_a_batch_is_kept_before_the_next_one_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check, too, that the network is copied once."""
    events: list[str] = []

    def noting(kind: type, method: str, event: str) -> None:
        original = getattr(kind, method)

        def noted(*arguments: object) -> object:
            events.append(event)
            return original(*arguments)

        monkeypatch.setattr(kind, method, noted)

    noting(pathnet.Recorder, "__init__", "copy")
    noting(pathnet.Recorder, "__call__", "record")
    noting(pathnet.Tape, "path_gradient_norms", "walk")
    plan = dataclasses.replace(PLAN, batches=3)
    measure(small_net(), small_data(), plan, tmp_path, lambda *_: events.append("fetched"))
    assert events == ["copy", *3 * ["record", "walk", "fetched"]]


def test_a_batch_in_flight_is_kept_when_the_next_one_fails(
    tmp_path: Path, uninterrupted: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = pathnet.Recorder.__call__, list[int]()

    def fail(recorder: pathnet.Recorder, *batch: torch.Tensor) -> pathnet.Tape:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(recorder, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathnet.Recorder, "__call__", fail)
        measure(small_net(), small_data(), PLAN, tmp_path)
    assert len(results.read(tmp_path).measurements()) == 2 * 9
    assert_same(measure(small_net(), small_data(), PLAN, tmp_path).measurements(), uninterrupted)


def test_a_lost_part_is_measured_again_and_nothing_else(
    tmp_path: Path, uninterrupted: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    monkeypatch.setattr(import_module("pathnet.results.writing"), "PART_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        measure(small_net(), small_data(), PLAN, tmp_path, stop)
    parts = results.read(tmp_path).parts
    assert len(parts) == 6
    parts[4].unlink()
    seen: list[int] = []
    again = measure(small_net(), small_data(), PLAN, tmp_path, lambda done, total, note: seen.append(done))
    assert seen == [6]
    assert_same(again.measurements(), uninterrupted)


def test_more_batches_extend_a_run_and_fewer_lose_nothing(tmp_path: Path, uninterrupted: Measurements) -> None:
    measure(small_net(), small_data(), dataclasses.replace(PLAN, batches=2), tmp_path)
    assert_same(measure(small_net(), small_data(), PLAN, tmp_path).measurements(), uninterrupted)
    fewer = measure(small_net(), small_data(), dataclasses.replace(PLAN, batches=1), tmp_path)
    assert_same(fewer.measurements(), uninterrupted)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["batches"] == 6 and facts["results"]["batches"] == 6


def test_the_identity_is_the_plan_the_network_and_the_data(tmp_path: Path) -> None:
    net = small_net()
    identity = measure(net, small_data(), PLAN, tmp_path).identity
    plan = {field.name for field in dataclasses.fields(PathGradients)} - {"batches", "method", "draws"}
    assert set(identity) == plan | {"experiment", "model", "data"}
    assert identity["model"] == {"hash": models.fingerprint(net), "config": net.config, "blocks": 9}
    assert title(identity) == "synthetic; preact_resnet, depth 20, width 4, 9 blocks"
    with pytest.raises(ValueError, match="holds another run .batch_size: expected 5, found 4"):
        measure(net, small_data(), dataclasses.replace(PLAN, batch_size=5), tmp_path)
    with pytest.raises(ValueError, match="holds another run .data.hash"):
        measure(net, synthetic(images=32, shape=(3, 8, 8), seed=1), PLAN, tmp_path)
    with torch.no_grad():
        net.stem_weight().mul_(2)
    with pytest.raises(ValueError, match="holds another run .model.hash"):
        measure(net, small_data(), PLAN, tmp_path)


def test_what_cannot_be_measured_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for change, message in (
        ({"batch_size": 33}, "batch_size: expected 1 to 32"),
        ({"engine": "abacus"}, "engine: expected auto, .* got 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(small_net(), small_data(), dataclasses.replace(PLAN, **change), folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data: expected images of 3 channels .* got 1 in synthetic"):
        measure(small_net(), synthetic(images=32, shape=(1, 8, 8)), PLAN, folder)
    with pytest.raises(ValueError, match=r"data: expected at most 5 classes .* got 10 in synthetic"):
        measure(models.preact_resnet(8, 4, num_classes=5).eval(), small_data(), PLAN, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "change", [{"batches": 0}, {"batch_size": 0}, {"seed": -1}, {"bn": "frozen"}, {"at": "y1"}, {"precision": "int8"}]
)
def test_bad_plans_are_named(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}: expected .*, got"):
        PathGradients(**change)  # type: ignore[arg-type]


def test_a_norm_that_is_not_finite_is_never_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tape: pathnet.Tape, b: torch.Tensor) -> torch.Tensor:
        return torch.full((len(b),), math.nan, dtype=torch.float64)

    monkeypatch.setattr(pathnet.Tape, "path_gradient_norms", broken)
    with pytest.raises(ValueError, match=r"engine: expected finite norms, got nan from .* \(batch 0, length 1\)"):
        measure(small_net(), small_data(), PLAN, tmp_path)
    assert len(results.read(tmp_path).measurements()) == 0
