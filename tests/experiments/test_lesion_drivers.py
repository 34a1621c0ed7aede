"""Errors that the drivers of lesions measure, compared with networks rebuilt by hand; and arguments they refuse."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.cases import shaken
from helpers.lesion_runs import DRIVERS, PLAN, Measure, networks, nine_blocks, rows_of
from helpers.lesioned import rebuilt, with_modules_times, wrong

from pathnet import lesion, models
from pathnet.data import Data, synthetic
from pathnet.experiments import (
    effective_training,
    highway,
    lesion_many,
    lesion_reorder,
    lesion_single,
    lesion_stochastic_depth,
)
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Plan, title
from pathnet.models import ResidualNet


def by_hand(net: ResidualNet, data: Data, row: ErrorCount) -> int:
    images, labels = next(data.test_batches(len(data.test)))
    with torch.no_grad():
        order = row.order or range(net.n)
        return wrong(rebuilt(with_modules_times(net, row.scale), order, row.deleted, images), labels)


def test_single_deletions_are_those_of_networks_built_without_the_block(
    net: ResidualNet, data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    vgg = shaken(models.vgg(7, 4, stages=3)).eval()
    nets = {"residual": [net, nine_blocks(1)], "vgg": [vgg]}
    run = lesion_single.measure(nets, data, PLAN, tmp_path)
    for kind, seed, model in [("residual", 0, net), ("residual", 1, nets["residual"][1]), ("vgg", 0, vgg)]:
        rows = rows_of(run, network=kind, seed=seed)
        assert sorted(row.deleted for row in rows) == [(), *((i,) for i in range(model.n))]
        assert [row.wrong for row in rows] == [by_hand(model, data, row) for row in rows]
        assert {(row.images, row.bn, row.scale, row.order) for row in rows} == {(40, "running", 1.0, ())}
    deletions = lesion_single.summarise(run)
    assert deletions["residual"].downsampling == (3, 6) and deletions["residual"].first == 0
    assert deletions["vgg"].downsampling == (0, 2) and deletions["vgg"].first == 1
    assert deletions["residual"].intact[0] == 0
    for i in range(net.n):
        (row,) = rows_of(run, network="residual", seed=0, deleted=(i,))
        assert deletions["residual"].rate[0, i] == row.wrong / 40


def test_stochastic_depth_is_lesioned_beside_the_plain_network(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    nets = {"residual": [net], "stochastic depth": [nine_blocks(2, survival=0.5)]}
    run = lesion_stochastic_depth.measure(nets, data, PLAN, tmp_path)
    for kind, (model,) in nets.items():
        rows = rows_of(run, network=kind)
        assert len(rows) == 10 and [row.wrong for row in rows] == [by_hand(model, data, row) for row in rows]
    assert run.experiment == "lesion-stochastic-depth"
    survival = run.identity["networks"]["stochastic depth"][0]["survival"]
    assert survival == pytest.approx([1 - i / 18 for i in range(1, 10)])


@pytest.mark.parametrize(("measure", "most"), [(lesion_many.measure, 4), (lesion_reorder.measure, 3)])
def test_random_lesions_are_those_of_networks_built_so(
    net: ResidualNet, data: Data, tmp_path: Path, measure: Measure, most: int
) -> None:
    nets = {"residual": [net, nine_blocks(1)]}
    run = measure(nets, data, PLAN, tmp_path)
    for seed, model in enumerate(nets["residual"]):
        rows = rows_of(run, seed=seed)
        assert Counter(row.size for row in rows) == {0: 1} | dict.fromkeys(range(1, most + 1), 3)
        assert [row.wrong for row in rows] == [by_hand(model, data, row) for row in rows]
    assert len({row.wrong for row in run.rows(ErrorCount)}) > 4


def test_effective_training_is_tested_in_three_ways(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    nets = {"residual": [net], "effective": [nine_blocks(1), nine_blocks(2)]}
    run = effective_training.measure(nets, data, PLAN, tmp_path)
    rows = run.rows(ErrorCount)
    counts = Counter((row.network, row.bn, row.scale) for row in rows)
    assert counts == {
        ("residual", "running", 1.0): 1,
        ("effective", "running", 1.0): 2,
        ("effective", "running", 2 / 9): 2,
        ("effective", "recalibrated", 1.0): 2,
    }
    for row in rows:
        model = nets[row.network][row.seed]
        if row.bn == "running":
            assert row.wrong == by_hand(model, data, row)
        else:
            assert row.wrong == by_hand(lesion.recalibrated(model, data), data, row)
    training = effective_training.summarise(run)
    assert training.effective["scaled by k/n"].tolist() == [row.rate for row in rows if row.scale != 1]


def test_a_part_of_the_images_and_another_bn_are_passed_on(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, images=10, bn="batch")
    rows = lesion_single.measure({"residual": [net]}, data, plan, tmp_path).rows(ErrorCount)
    lesions = [lesion.Lesion(row.deleted) for row in rows]
    assert [row.wrong for row in rows] == lesion.errors(net, data, lesions, "batch", 10).wrong.tolist()
    assert {(row.images, row.bn) for row in rows} == {(10, "batch")}


@pytest.mark.parametrize("name", DRIVERS)
def test_what_cannot_be_measured_leaves_no_folder(net: ResidualNet, data: Data, tmp_path: Path, name: str) -> None:
    measure, plan = DRIVERS[name]
    folder, nets = tmp_path / "run", networks(name, net)
    with pytest.raises(ValueError, match=r"data: expected images of 3 channels .* got 1 in synthetic"):
        measure(nets, synthetic(images=16, shape=(1, 8, 8)), plan, folder)
    with pytest.raises(ValueError, match=r"data: expected at most 10 classes .* got 11 in synthetic"):
        measure(nets, synthetic(images=44, classes=11, shape=(3, 8, 8)), plan, folder)
    with pytest.raises(ValueError, match=r"images: expected 0 \(all\) to 40 \(the test images\), got 41"):
        measure(nets, data, dataclasses.replace(plan, images=41), folder)
    with pytest.raises(ValueError, match=r"networks: expected 9 blocks in every residual network, got 3"):
        measure({**nets, "residual": [net, models.preact_resnet(8, 3)]}, data, plan, folder)
    assert not folder.exists()


def test_what_a_driver_cannot_take_is_named(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modules: expected at most 9 \(the network's\), got 10"):
        effective_training.measure(networks("effective-training", net), data, Plan(modules=10), tmp_path / "run")
    with pytest.raises(ValueError, match="net: expected two blocks of equal shape .* got none among 3"):
        lesion_reorder.measure({"residual": [models.preact_resnet(8, 3)]}, data, PLAN, tmp_path / "run")
    with pytest.raises(ValueError, match="net: expected a highway network, got blocks without gates"):
        highway.measure({"highway": [net]}, data, PLAN, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["draws", "deletions", "swaps", "batches", "modules", "gate_batches", "plan_seed"])
def test_plans_that_ask_for_too_little_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer of at least [01], got -1"):
        Plan(**{name: -1})
    with pytest.raises(ValueError, match="^bn: expected"):
        Plan(bn="frozen")  # type: ignore[arg-type]


def test_titles_name_the_data_the_networks_and_the_seeds(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    nets = {"residual": [net, nine_blocks(1)], "vgg": [models.vgg(7, 4, stages=3)]}
    identity = lesion_single.measure(nets, data, dataclasses.replace(PLAN, images=1), tmp_path).identity
    assert title(identity) == (
        "synthetic; residual, depth 20, width 3, 9 blocks, 2 seeds; vgg, depth 7, width 4, 5 blocks"
    )
