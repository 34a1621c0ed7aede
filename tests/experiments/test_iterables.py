"""Experiments on a caller's own batches: the rows of a data set with the same batches, resumed and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import shaken
from helpers.context_nets import scaled_inputs, scaled_net
from helpers.lesioned import labelled_by
from torch import Tensor

from pathnet import models, paper, results
from pathnet.data import Batches, Data, synthetic
from pathnet.experiments import highway, lesion_single, path_gradients, remaining_paths, unraveled
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.path_gradients import PathGradients
from pathnet.experiments.run import Networks, Plan, Value
from pathnet.models import ResidualNet

PLAN = Plan(draws=2, deletions=2, swaps=2, modules=2, batches=3, exact_batches=1, gate_batches=1, gate_batch_size=5)
GRADIENTS = PathGradients(batches=3, batch_size=5, engine="reference")


@pytest.fixture(scope="module")
def nets() -> Networks:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 2)).eval()
    torch.manual_seed(1)
    gated = shaken(models.highway(8, 2)).eval()
    return {"residual": [net], "effective": [net], "stochastic depth": [net], "highway": [gated]}


@pytest.fixture(scope="module")
def data(nets: Networks) -> Data:
    return labelled_by(nets["residual"][0], synthetic(images=80, shape=(3, 6, 6)))


def batches_of(data: Data, size: int = 5) -> Batches:
    training = [data.random_batch(size, 0, batch) for batch in range(3)]
    return Batches(data.test_batches(8), training)


def kinds(name: str, nets: Networks) -> Networks:
    return {kind: seeds for kind, seeds in nets.items() if (kind == "highway") == (name == "highway")}


def content(run: results.Run) -> Any:
    norms = run.measurements().norm.tolist() if run.experiment == "path-gradients" else []
    return run.rows(ErrorCount), run.rows(Value), norms


@pytest.mark.parametrize("name", sorted(paper.EXPERIMENTS))
def test_every_experiment_measures_on_batches_what_it_measures_on_data(
    nets: Networks, data: Data, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unraveled, "MOST_BLOCKS", 3)
    monkeypatch.setattr(remaining_paths, "BLOCKS", 6)
    monkeypatch.setattr(remaining_paths, "DELETED", (1,))
    if name == "path-gradients":
        plan = dataclasses.replace(PLAN, plan_seed=0)
        train = [data.random_batch(data.batch_size(128), 0, batch) for batch in range(3)]
        batches = Batches(data.test_batches(8), train)
    elif name == "effective-training":
        plan = PLAN
        batches = Batches(data.test_batches(8), [data.random_batch(data.batch_size(128), 0, b) for b in range(8)])
    else:
        plan, batches = PLAN, batches_of(data)
    measure = paper.EXPERIMENTS[name].load().measure
    expected = measure(kinds(name, nets), data, plan, tmp_path / "data", None)
    measured = measure(kinds(name, nets), batches, plan, tmp_path / "own", None)
    first, second = (each[0] if isinstance(each, list) else each for each in (measured, expected))
    assert content(first) == content(second) and any(content(first))
    assert first.identity["data"].get("classes") == second.identity["data"].get("classes")
    assert first.identity["data"]["hash"].startswith("batches-v1:")


def test_an_iterable_is_read_once_and_resumed_by_its_content(nets: Networks, data: Data, tmp_path: Path) -> None:
    chosen, batches = {"residual": nets["residual"]}, list(data.test_batches(8))
    run = lesion_single.measure(chosen, iter(batches), PLAN, tmp_path)
    again = lesion_single.measure(chosen, batches, PLAN, tmp_path)
    assert run.rows(ErrorCount) == again.rows(ErrorCount) and len(again.facts["attempts"]) == 2
    other = [(images + 1, labels) for images, labels in batches]
    with pytest.raises(ValueError, match="holds another run .data.hash"):
        lesion_single.measure(chosen, other, PLAN, tmp_path)


def test_path_gradients_take_the_batches_in_order(nets: Networks, data: Data, tmp_path: Path) -> None:
    net = nets["residual"][0]
    batches = [data.random_batch(5, 0, batch) for batch in range(3)]
    expected = path_gradients.measure(net, data, GRADIENTS, tmp_path / "data")
    plan = dataclasses.replace(GRADIENTS, batch_size=128)
    measured = path_gradients.measure(net, (pair for pair in batches), plan, tmp_path / "own")
    assert measured.measurements().norm.tolist() == expected.measurements().norm.tolist()
    assert measured.identity["batch_size"] == 5
    with pytest.raises(ValueError, match=r"^batches: expected at most 3 \(those of the data\), got 4$"):
        path_gradients.measure(net, batches, dataclasses.replace(plan, batches=4), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_networks_of_any_inputs_are_measured_on_batches(tmp_path: Path) -> None:
    net, batches = scaled_net(), [scaled_inputs(4, seed) for seed in range(3)]
    run = lesion_single.measure({"residual": [net]}, batches, PLAN, tmp_path)
    assert [row.images for row in run.rows(ErrorCount)] == [12] * 4
    assert run.identity["data"] | {"hash": ""} == {"name": "batches", "hash": "", "classes": 4}
    path_gradients.measure(net, batches, GRADIENTS, tmp_path / "gradients")


def wrong(change: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    return [(torch.ones(2, 3, 6, 6), torch.tensor([0, 1])), change]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "data: expected at least one batch, got none"),
        (wrong((torch.ones(2, 3, 6, 6) * torch.nan, torch.tensor([0, 1]))), "data: expected finite .* in element 1"),
        (wrong((torch.ones(2, 3, 6, 6), torch.tensor([0, 10]))), "data: expected labels 0 to 9 .* in element 1"),
        (wrong((torch.ones(2, 3, 6, 6), torch.tensor([0]))), "data: expected labels for 2 samples .* in element 1"),
        ([(torch.ones(2, 1, 6, 6), torch.tensor([0, 1]))], "data: expected batches .* got element 0 .*"),
        (7, "data: expected a pathnet Data, or batches .* got 7"),
    ],
)
def test_wrong_batches_leave_no_folder(nets: Networks, tmp_path: Path, batches: Any, message: str) -> None:
    folder, chosen = tmp_path / "run", {"residual": nets["residual"]}
    with pytest.raises(ValueError, match=f"^{message}$"):
        lesion_single.measure(chosen, batches, PLAN, folder)
    with pytest.raises(ValueError, match=f"^{message}$"):
        path_gradients.measure(nets["residual"][0], batches, GRADIENTS, folder)
    assert not folder.exists()


def test_what_batches_cannot_serve_leaves_no_folder(nets: Networks, data: Data, tmp_path: Path) -> None:
    folder, batches = tmp_path / "run", list(data.test_batches(8))
    cases: list[tuple[Any, Any, Any, Plan, str]] = [
        (lesion_single, "residual", batches, dataclasses.replace(PLAN, images=5), "images: expected 0 for batches"),
        (
            lesion_single,
            "residual",
            batches,
            dataclasses.replace(PLAN, bn="recalibrated"),
            "data: expected a data set",
        ),
        (highway, "highway", batches, dataclasses.replace(PLAN, gate_batches=9), "gate_batches: expected at most 3"),
        (unraveled, "residual", [scaled_inputs(2)], PLAN, "data: expected .*"),
    ]
    for driver, kind, source, plan, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            driver.measure({kind: nets[kind]} if driver is not unraveled else {}, source, plan, folder)
    effective: dict[str, list[ResidualNet]] = {kind: list(nets[kind]) for kind in ("residual", "effective")}
    with pytest.raises(ValueError, match=r"^data: expected a data set, or .*Batches with training batches"):
        paper.EXPERIMENTS["effective-training"].load().measure(effective, batches, PLAN, folder, None)
    assert not folder.exists()


def test_a_batch_of_a_run_is_a_tensor_and_its_labels(data: Data) -> None:
    images, labels = batches_of(data).random_batch(99, 7, 1)
    expected = data.random_batch(5, 0, 1)
    assert isinstance(images, Tensor) and torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
