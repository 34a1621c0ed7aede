from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pathnet
from pathnet import models, paths, results
from pathnet.data import Data, synthetic
from pathnet.experiments import path_gradients
from pathnet.experiments.path_gradients import PathGradients, measure
from pathnet.experiments.run import title
from pathnet.experiments.summary import findings, percent, summarise
from pathnet.results import Measurements

PLAN = PathGradients(batches=6, batch_size=4)


def small_net() -> models.ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(20, 4).eval()


def small_data() -> Data:
    return synthetic(images=32, shape=(3, 8, 8))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Measurements:
    return measure(small_net(), small_data(), PLAN, tmp_path_factory.mktemp("run")).measurements()


def assert_same(one: Measurements, other: Measurements) -> None:
    for field in dataclasses.fields(Measurements):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def made(norms: NDArray[np.float64]) -> Measurements:
    """Measurements of the norms [batches, n]; NaN where there is none."""
    batch, column = np.nonzero(~np.isnan(norms))
    n = norms.shape[1]
    length = (column + 1).astype(np.int16)
    path = np.tril(np.ones((n, n), np.uint8))[column]
    return Measurements(batch.astype(np.int32), length, path, norms[batch, column], ["cpu"] * len(batch))


# Measuring


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
    """Killed with SIGKILL on its fourth batch, when two parts are written and one batch is not."""
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(pathnet.__file__).parent.parent)]!r}
from test_path_gradients import PLAN, small_data, small_net
from pathnet.experiments import path_gradients

def progress(done, total, note):
    path_gradients.PART_SECONDS = 0 if done < 3 else 1e9
    if done == 4:
        name = ".part-000002.parquet.0123456789ab.pathnet-temporary"
        open(os.path.join({str(tmp_path)!r}, "measurements", name), "wb").write(b"PAR1")
        os.kill(os.getpid(), signal.SIGKILL)

path_gradients.measure(small_net(), small_data(), PLAN, {str(tmp_path)!r}, progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert results.read(tmp_path).measurements().batch.tolist() == [0] * 9 + [1] * 9
    seen: list[int] = []
    run = measure(small_net(), small_data(), PLAN, tmp_path, lambda done, total, note: seen.append(done))
    assert seen == [3, 4, 5, 6]
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


def test_a_batch_is_fetched_when_the_next_one_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the network is copied once."""
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
    assert events == ["copy", "record", "walk", *2 * ["record", "fetched", "walk"], "fetched"]


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
    monkeypatch.setattr(path_gradients, "PART_SECONDS", 0)
    run = measure(small_net(), small_data(), PLAN, tmp_path)
    assert len(run.parts) == 6
    run.parts[4].unlink()
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
    with pytest.raises(ValueError, match="engine: .* gave a norm of nan on batch 0, length 1"):
        measure(small_net(), small_data(), PLAN, tmp_path)
    assert len(results.read(tmp_path).measurements()) == 0


# Summarising


@pytest.mark.parametrize("n", [3, 12, 54])
@pytest.mark.parametrize("rate", [0.3, 1e-3])
def test_exponential_norms_give_the_exact_rate_and_product(n: int, rate: float) -> None:
    """Frequency times magnitude is then binomial again, with probability rate / (1 + rate)."""
    length = np.arange(1, n + 1)
    summary = summarise(made(np.tile(7 * rate**length, (5, 1))), n)
    assert summary.decay[0] == pytest.approx(rate, rel=1e-12) and np.isnan(summary.decay[1:]).all()
    assert math.exp(summary.log_intercept) == pytest.approx(7, rel=1e-9)
    p = rate / (1 + rate)
    binomial = np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in length])
    np.testing.assert_allclose(summary.product, binomial / binomial.sum(), rtol=1e-9)
    np.testing.assert_allclose(summary.mean, 7 * rate**length, rtol=1e-14)
    assert np.isnan(summary.low).all() and np.isnan(summary.high).all()
    assert (summary.std <= 1e-14 * summary.mean).all()


def test_norms_far_below_the_range_of_float64_squares() -> None:
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=(40, 6))
    plain, tiny = (summarise(made(norms * scale), 6) for scale in (1.0, 1e-200))
    for name in ("mean", "std", "quantile_05", "quantile_50", "quantile_95", "low", "high"):
        np.testing.assert_allclose(getattr(tiny, name), 1e-200 * getattr(plain, name), rtol=1e-12)
    np.testing.assert_allclose(tiny.product, plain.product, rtol=1e-9)
    assert tiny.decay == pytest.approx(plain.decay, rel=1e-9)
    assert (tiny.effective.first, tiny.effective.last) == (plain.effective.first, plain.effective.last)
    steep = summarise(made(np.tile(10.0 ** -(5.0 * np.arange(1, 61)), (3, 1))), 60)
    assert steep.decay[0] == pytest.approx(1e-5, rel=1e-9) and steep.effective.first == steep.effective.last == 1


def test_moments_and_quantiles_of_each_length() -> None:
    norms = np.random.default_rng(1).lognormal(size=(30, 4))
    summary = summarise(made(norms), 4)
    np.testing.assert_allclose(summary.mean, norms.mean(0))
    np.testing.assert_allclose(summary.std, norms.std(0, ddof=1))
    np.testing.assert_allclose(summary.quantile_95, np.quantile(norms, 0.95, axis=0))
    np.testing.assert_allclose(summary.quantile_50, np.median(norms, axis=0))
    assert summary.count.tolist() == [30] * 4 and summary.measurements == 120 and summary.batches == 30
    np.testing.assert_allclose(summary.share, [4 / 16, 6 / 16, 4 / 16, 1 / 16])


def test_the_interval_is_that_of_whole_batches() -> None:
    """The means' interval is 2 x 1.96 standard errors wide. Where all lengths of a batch share one factor, it
    cancels in the rate: resampling single measurements would give the rate an interval of several per cent."""
    rng = np.random.default_rng(2)
    factor = rng.lognormal(sigma=0.5, size=(400, 1))
    summary = summarise(made(factor * 0.5 ** np.arange(1, 9)), 8)
    expected = 2 * 1.96 * factor.std() / 20 * 0.5 ** np.arange(1, 9)
    np.testing.assert_allclose(summary.high - summary.low, expected, rtol=0.15)
    assert np.isnan(summary.decay[1:]).all(), "an interval of no width is none"
    apart = summarise(made(rng.lognormal(sigma=0.5, size=(400, 8)) * 0.5 ** np.arange(1, 9)), 8)
    assert 1e-3 < apart.decay[2] - apart.decay[1] < 5e-2


def test_the_bootstrap_is_the_same_each_time() -> None:
    measurements = made(np.random.default_rng(3).lognormal(size=(20, 5)))
    assert summarise(measurements, 5).as_json() == summarise(measurements, 5).as_json()


def brute_force_run(shares: NDArray[np.float64], most: float) -> int:
    """How many lengths the shortest run has that holds ``most``."""
    n = len(shares)
    runs = [(last - first, first, last) for first in range(n) for last in range(first + 1, n + 1)]
    return min(width for width, first, last in runs if math.fsum(shares[first:last]) >= most - 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_effective_range_is_the_shortest_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    summary = summarise(made(rng.lognormal(sigma=3, size=(2, n))), n)
    effective = summary.effective
    own = summary.product[effective.first - 1 : effective.last]
    assert own.sum() >= 0.95 - 1e-12 and effective.gradient == pytest.approx(own.sum())
    assert len(own) == brute_force_run(summary.product, 0.95)
    lengths = range(effective.first, effective.last + 1)
    assert effective.paths == pytest.approx(sum(math.comb(n, k) for k in lengths) / 2**n)


def test_the_papers_network_of_54_blocks() -> None:
    summary = summarise(made(np.tile(0.3 ** np.arange(1.0, 55), (2, 1))), 54)
    assert (summary.central.first, summary.central.last) == (20, 34) and summary.central.paths > 0.95
    lines = findings(summary)
    assert "lengths 19 to 35 hold 98 % of all paths" in lines[-1]
    assert "5 to 17 hold 0.45 % (paper: 0.45 %)" in lines[-1]
    assert not any("paper" in line for line in findings(summarise(made(np.ones((2, 53))), 53)))


def test_zero_norms_count_in_the_mean_and_are_told() -> None:
    norms = np.tile(0.5 ** np.arange(1.0, 6), (4, 1))
    norms[:2, 1] = 0
    norms[:, 4] = 0
    summary = summarise(made(norms), 5)
    assert summary.zeros == 6 and summary.mean[1] == 0.125 and summary.mean[4] == 0 and summary.product[4] == 0
    # The line is fitted where the logarithm exists: lengths 1, 2, 3, 4 with means 1/2, 1/8, 1/8, 1/16.
    assert math.log2(summary.decay[0]) == pytest.approx(-0.9)
    assert "6 norms are exactly 0" in findings(summary)[-1]


def test_lengths_and_batches_that_are_not_measured() -> None:
    norms = np.tile(0.5 ** np.arange(1.0, 7), (3, 1))
    norms[:, 2] = np.nan
    norms[0, 3] = np.nan
    summary = summarise(made(norms), 6)
    assert summary.count.tolist() == [3, 3, 0, 2, 3, 3] and math.isnan(summary.mean[2]) and summary.product[2] == 0
    assert summary.decay[0] == pytest.approx(0.5)
    assert json.loads(json.dumps(summary.as_json(), allow_nan=False))["mean"][2] is None


@pytest.mark.parametrize("batches", [1, 2, 9])
def test_few_batches_have_no_interval_and_the_text_says_how_many(batches: int) -> None:
    """A bootstrap of two would give one all the same: of a quarter of its resamples each end is one batch twice."""
    norms = np.random.default_rng(0).lognormal(size=(batches, 8)) * 0.5 ** np.arange(1, 9)
    summary = summarise(made(norms), 8)
    assert np.isnan(summary.low).all() and np.isnan(summary.high).all() and np.isnan(summary.decay[1:]).all()
    told = f"no interval: {batches} batch{'es' if batches > 1 else ''}"
    assert any(told in line for line in findings(summary))
    (decay, _) = path_gradients._of_sampled(summary)
    assert told in decay.measured and "nan" not in decay.measured
    enough = summarise(made(np.random.default_rng(0).lognormal(size=(10, 8)) * 0.5 ** np.arange(1, 9)), 8)
    assert (enough.low < enough.mean).all() and enough.decay[1] < enough.decay[0] < enough.decay[2]
    assert not any("no interval" in line for line in findings(enough))


def test_one_batch_has_no_interval_and_one_block_no_rate() -> None:
    one = summarise(made(0.5 ** np.arange(1.0, 5)[None]), 4)
    assert math.isnan(one.low[0]) and math.isnan(one.decay[1]) and one.decay[0] == pytest.approx(0.5)
    assert not any("nan" in line for line in findings(one))
    alone = summarise(made(np.ones((3, 1))), 1)
    assert math.isnan(alone.decay[0]) and (alone.effective.first, alone.effective.last) == (1, 1)
    assert not any("nan" in line for line in findings(alone))


def test_nothing_to_summarise_is_an_error() -> None:
    with pytest.raises(ValueError, match="measurements: expected some norms above zero, got none among 0"):
        summarise(made(np.empty((0, 4))), 4)
    with pytest.raises(ValueError, match="got none among 8"):
        summarise(made(np.zeros((2, 4))), 4)


def test_percentages() -> None:
    assert [percent(share) for share in (0.98017, 0.0045366, 0.5, 1e-14)] == ["98 %", "0.45 %", "50 %", "1e-12 %"]
