"""What the drivers of lesions measure: against networks rebuilt by hand, drawn as they say, and resumed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cases import shaken
from helpers.lesioned import labelled_by, rebuilt, with_modules_times, wrong
from scipy.stats import chisquare

from pathnet import lesion, models, results
from pathnet.data import Data, synthetic
from pathnet.experiments import (
    effective_training,
    errors,
    highway,
    lesion_many,
    lesion_reorder,
    lesion_single,
    lesion_stochastic_depth,
)
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Networks, Plan, title
from pathnet.models import ResidualNet
from pathnet.training import Progress

PLAN = Plan(draws=3, deletions=4, swaps=3, modules=2)
Measure = Callable[..., results.Run]


def network(seed: int = 0, survival: float = 1.0) -> ResidualNet:
    """Nine blocks, three a stage; those numbered 3 and 6 from 0 change the shape."""
    torch.manual_seed(seed)
    return shaken(models.preact_resnet(20, 3, survival=survival)).eval()


@pytest.fixture(scope="module")
def net() -> ResidualNet:
    return network()


@pytest.fixture(scope="module")
def data(net: ResidualNet) -> Data:
    return labelled_by(net, synthetic(images=160, shape=(3, 8, 8)))


def by_hand(net: ResidualNet, data: Data, row: ErrorCount) -> int:
    images, labels = next(data.test_batches(len(data.test)))
    with torch.no_grad():
        order = row.order or range(net.n)
        return wrong(rebuilt(with_modules_times(net, row.scale), order, row.deleted, images), labels)


def rows_of(run: results.Run, **values: object) -> list[ErrorCount]:
    return [row for row in run.rows(ErrorCount) if all(getattr(row, name) == own for name, own in values.items())]


# What is measured


def test_single_deletions_are_those_of_networks_built_without_the_block(
    net: ResidualNet, data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    vgg = shaken(models.vgg(7, 4, stages=3)).eval()
    nets = {"residual": [net, network(1)], "vgg": [vgg]}
    run = lesion_single.measure(nets, data, PLAN, tmp_path)
    for kind, seed, own in [("residual", 0, net), ("residual", 1, nets["residual"][1]), ("vgg", 0, vgg)]:
        rows = rows_of(run, network=kind, seed=seed)
        assert sorted(row.deleted for row in rows) == [(), *((i,) for i in range(own.n))]
        assert [row.wrong for row in rows] == [by_hand(own, data, row) for row in rows]
        assert {(row.images, row.bn, row.scale, row.order) for row in rows} == {(40, "running", 1.0, ())}
    found = lesion_single.summarise(run)
    assert found["residual"].downsampling == (3, 6) and found["residual"].first == 1
    assert found["vgg"].downsampling == (0, 2) and found["vgg"].first == 2
    assert found["residual"].intact[0] == 0
    for i in range(net.n):
        (row,) = rows_of(run, network="residual", seed=0, deleted=(i,))
        assert found["residual"].rate[0, i] == row.wrong / 40


def test_stochastic_depth_is_lesioned_beside_the_plain_network(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    nets = {"residual": [net], "stochastic depth": [network(2, survival=0.5)]}
    run = lesion_stochastic_depth.measure(nets, data, PLAN, tmp_path)
    for kind, (own,) in nets.items():
        rows = rows_of(run, network=kind)
        assert len(rows) == 10 and [row.wrong for row in rows] == [by_hand(own, data, row) for row in rows]
    assert run.experiment == "lesion-stochastic-depth"
    survival = run.identity["networks"]["stochastic depth"][0]["survival"]
    assert survival == pytest.approx([1 - i / 18 for i in range(1, 10)])


@pytest.mark.parametrize(("measure", "most"), [(lesion_many.measure, 4), (lesion_reorder.measure, 3)])
def test_random_lesions_are_those_of_networks_built_so(
    net: ResidualNet, data: Data, tmp_path: Path, measure: Measure, most: int
) -> None:
    nets = {"residual": [net, network(1)]}
    run = measure(nets, data, PLAN, tmp_path)
    for seed, own in enumerate(nets["residual"]):
        rows = rows_of(run, seed=seed)
        assert Counter(row.size for row in rows) == {0: 1} | dict.fromkeys(range(1, most + 1), 3)
        assert [row.wrong for row in rows] == [by_hand(own, data, row) for row in rows]
    assert len({row.wrong for row in run.rows(ErrorCount)}) > 4


def test_effective_training_is_tested_in_three_ways(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    nets = {"residual": [net], "effective": [network(1), network(2)]}
    run = effective_training.measure(nets, data, PLAN, tmp_path)
    rows = run.rows(ErrorCount)
    ways = Counter((row.network, row.bn, row.scale) for row in rows)
    assert ways == {
        ("residual", "running", 1.0): 1,
        ("effective", "running", 1.0): 2,
        ("effective", "running", 2 / 9): 2,
        ("effective", "recalibrated", 1.0): 2,
    }
    for row in rows:
        own = nets[row.network][row.seed]
        if row.bn == "running":
            assert row.wrong == by_hand(own, data, row)
        else:
            assert row.wrong == by_hand(lesion.recalibrated(own, data), data, row)
    found = effective_training.summarise(run)
    assert found.effective["scaled by k/n"].tolist() == [row.rate for row in rows if row.scale != 1]


def test_a_part_of_the_images_and_another_bn_are_passed_on(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, images=10, bn="batch")
    rows = lesion_single.measure({"residual": [net]}, data, plan, tmp_path).rows(ErrorCount)
    lesions = [lesion.Lesion(row.deleted) for row in rows]
    assert [row.wrong for row in rows] == lesion.errors(net, data, lesions, "batch", 10).wrong.tolist()
    assert {(row.images, row.bn) for row in rows} == {(10, "batch")}


# What is drawn


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> list[lesion.Lesion]:
    """What the lesions would be, at no cost."""
    asked: list[lesion.Lesion] = []

    def noted(
        net: ResidualNet, data: Data, lesions: list[lesion.Lesion], bn: str, images: int, progress: Progress
    ) -> lesion.Errors:
        asked.extend(lesions)
        progress(len(data.test) * len(lesions), len(data.test) * len(lesions), "")
        return lesion.Errors(np.zeros(len(lesions), np.int64), len(data.test), "running")

    monkeypatch.setattr(errors.lesion, "errors", noted)
    monkeypatch.setattr(errors, "TOGETHER", 10**6)
    return asked


@pytest.mark.parametrize(("measure", "most"), [(lesion_many.measure, "deletions"), (lesion_reorder.measure, "swaps")])
def test_a_draw_is_a_function_of_plan_seed_network_size_and_number(
    net: ResidualNet, data: Data, tmp_path: Path, nothing_measured: object, measure: Measure, most: str
) -> None:
    def drawn(name: str, seeds: int, **plan: int) -> dict[tuple[int, int, int], lesion.Lesion]:
        settings = dataclasses.replace(PLAN, **plan)  # type: ignore[arg-type]
        run = measure({"residual": [net] * seeds}, data, settings, tmp_path / name)
        return {(row.seed, row.size, row.draw): row.drawn.lesion for row in run.rows(ErrorCount)}

    few = drawn("few", 1, draws=2, **{most: 2})
    many = drawn("many", 2, draws=20, **{most: 4})
    assert few.items() <= many.items() and len(many) == 2 * (1 + 20 * 4)
    other = drawn("other", 2, draws=20, plan_seed=1, **{most: 4})
    for key in [(0, 2), (1, 2), (0, 4)]:
        own = [many[*key, draw] for draw in range(20)]
        assert len(set(own)) > 5 and own != [other[*key, draw] for draw in range(20)]
    assert [many[0, 3, draw] for draw in range(20)] != [many[1, 3, draw] for draw in range(20)]


def test_every_set_of_deletions_is_drawn_equally_often(data: Data, tmp_path: Path, nothing_measured: object) -> None:
    plan = Plan(draws=1500, deletions=100)
    rows = lesion_many.measure({"residual": [models.preact_resnet(14, 3)]}, data, plan, tmp_path).rows(ErrorCount)
    assert {row.size for row in rows} == set(range(7)), "no more than there are"
    for size in range(1, 7):
        sets = Counter(row.deleted for row in rows if row.size == size)
        assert all(own == tuple(sorted(set(own))) and len(own) == size for own in sets)
        assert len(sets) == comb(6, size)
        if size < 6:
            assert chisquare(list(sets.values())).pvalue > 1e-3


def test_every_pair_is_swapped_equally_often_and_none_that_changes_the_shape(
    net: ResidualNet, data: Data, tmp_path: Path, nothing_measured: object
) -> None:
    rows = lesion_reorder.measure({"residual": [net]}, data, Plan(draws=2000, swaps=3), tmp_path).rows(ErrorCount)
    stages = [(0, 1, 2), (4, 5), (7, 8)]
    swaps = {lesion_reorder.swapped(9, [pair]): 0 for stage in stages for pair in combinations(stage, 2)}
    swaps |= Counter(row.order for row in rows if row.size == 1)
    assert len(swaps) == 5 and chisquare(list(swaps.values())).pvalue > 1e-3
    for row in rows:
        order = row.order or tuple(range(9))
        assert (order[3], order[6]) == (3, 6)
        assert [set(order[i] for i in stage) for stage in stages] == [set(stage) for stage in stages]
        moved = sum(own != place for place, own in enumerate(order))
        assert moved <= 2 * row.size and (row.size != 1 or moved == 2)


def test_swaps_follow_each_other() -> None:
    assert lesion_reorder.swapped(5, []) == (0, 1, 2, 3, 4)
    assert lesion_reorder.swapped(5, [(0, 1), (1, 4)]) == (1, 4, 2, 3, 0)
    assert lesion_reorder.swapped(5, [(2, 3), (2, 3)]) == (0, 1, 2, 3, 4)
    permutation = lesion_reorder.swapped(6, [(0, 5), (5, 2), (1, 0)])
    letters = list("abcdef")
    letters[0], letters[5] = letters[5], letters[0]
    letters[5], letters[2] = letters[2], letters[5]
    letters[1], letters[0] = letters[0], letters[1]
    assert ["abcdef"[i] for i in permutation] == letters


# Resuming

DRIVERS: dict[str, tuple[Measure, Plan]] = {
    "lesion-single": (lesion_single.measure, PLAN),
    "lesion-many": (lesion_many.measure, PLAN),
    "lesion-reorder": (lesion_reorder.measure, PLAN),
    "effective-training": (effective_training.measure, PLAN),
}


def networks(name: str, net: ResidualNet) -> Networks:
    return {"residual": [net, network(1)]} | ({"effective": [network(2)]} if name == "effective-training" else {})


@pytest.mark.parametrize("name", DRIVERS)
def test_an_interrupted_run_goes_on_to_the_same_rows_and_measures_nothing_twice(
    net: ResidualNet, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    measure, plan = DRIVERS[name]
    nets = networks(name, net)
    whole = measure(nets, data, plan, tmp_path / "whole").rows(ErrorCount)
    monkeypatch.setattr(errors, "TOGETHER", 3)
    finished: list[tuple[int, str, lesion.Lesion]] = []
    original = lesion.errors

    def counted(own: ResidualNet, data: Data, lesions: list[lesion.Lesion], bn: str, *rest: object) -> lesion.Errors:
        found = original(own, data, lesions, bn, *rest)  # type: ignore[arg-type]
        finished.extend((id(own), bn, each) for each in lesions)
        return found

    def until(count: int) -> Progress:
        def stop(done: int, total: int, note: str) -> None:
            if len(finished) >= count:
                raise KeyboardInterrupt

        return stop

    monkeypatch.setattr(errors.lesion, "errors", counted)
    for count in (1, len(whole) // 2):
        with pytest.raises(KeyboardInterrupt):
            measure(nets, data, plan, tmp_path / "cut", until(count))
        kept = results.read(tmp_path / "cut").rows(ErrorCount)
        assert count <= len(kept) == len(finished) < len(whole)
    for _ in range(2):
        run = measure(nets, data, plan, tmp_path / "cut")
        assert run.rows(ErrorCount) == whole and len(finished) == len(whole)


def test_progress_counts_the_images_of_what_is_missing(net: ResidualNet, data: Data, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for own in ([net], [net], [net, network(1)]):
        folder = tmp_path / str(len(own))
        lesion_single.measure({"residual": own}, data, PLAN, folder, lambda *now: seen.append(now[:2]))
    assert seen[-1] == (2 * 10 * 40, 2 * 10 * 40) and [done for done, _ in seen].count(10 * 40) == 2
    assert {total for _, total in seen} == {10 * 40, 2 * 10 * 40}


@pytest.mark.parametrize(("name", "most"), [("lesion-many", "deletions"), ("lesion-reorder", "swaps")])
def test_more_draws_extend_a_run_and_fewer_lose_nothing(
    net: ResidualNet, data: Data, tmp_path: Path, name: str, most: str
) -> None:
    measure, _ = DRIVERS[name]
    nets = {"residual": [net]}
    large = dataclasses.replace(PLAN, draws=3, **{most: 3})  # type: ignore[arg-type]
    small = dataclasses.replace(PLAN, draws=2, **{most: 2})  # type: ignore[arg-type]
    before = measure(nets, data, small, tmp_path / "run").rows(ErrorCount)
    after = measure(nets, data, large, tmp_path / "run")
    assert set(before) < set(after.rows(ErrorCount))
    assert after.rows(ErrorCount) == measure(nets, data, large, tmp_path / "at once").rows(ErrorCount)
    again = measure(nets, data, small, tmp_path / "run")
    assert again.rows(ErrorCount) == after.rows(ErrorCount)
    assert (again.facts["draws"], again.facts[most]) == (3, 3)


@pytest.mark.parametrize("name", DRIVERS)
def test_another_network_data_set_or_plan_is_refused(
    net: ResidualNet, data: Data, tmp_path: Path, nothing_measured: object, name: str
) -> None:
    measure, plan = DRIVERS[name]
    nets = networks(name, net)
    measure(nets, data, plan, tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(networks.residual: expected"):
        measure({**nets, "residual": [net, network(3)]}, data, plan, tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(data.hash"):
        measure(nets, synthetic(images=160, shape=(3, 8, 8)), plan, tmp_path)
    other = {"effective-training": {"modules": 3}, "lesion-single": {"bn": "batch"}}.get(name, {"plan_seed": 1})
    with pytest.raises(ValueError, match=rf"holds another run \({next(iter(other))}: expected"):
        measure(nets, data, dataclasses.replace(plan, **other), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds another run \(images: expected 8, found 0"):
        measure(nets, data, dataclasses.replace(plan, images=8), tmp_path)
    different = lesion_many.measure if name == "lesion-single" else lesion_single.measure
    with pytest.raises(ValueError, match=r"holds another run \(experiment: expected"):
        different(nets, data, plan, tmp_path)


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
    nets = {"residual": [net, network(1)], "vgg": [models.vgg(7, 4, stages=3)]}
    identity = lesion_single.measure(nets, data, dataclasses.replace(PLAN, images=1), tmp_path).identity
    assert title(identity) == (
        "synthetic; residual, depth 20, width 3, 9 blocks, 2 seeds; vgg, depth 7, width 4, 5 blocks"
    )
