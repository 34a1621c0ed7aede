"""Runs of lesions: resumed to the same rows, extended, and refused if anything else differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.lesion_runs import DRIVERS, PLAN, networks, nine_blocks

from pathnet import lesion, results
from pathnet.data import Data, synthetic
from pathnet.experiments import (
    errors,
    lesion_many,
    lesion_single,
)
from pathnet.experiments.errors import ErrorCount
from pathnet.models import ResidualNet
from pathnet.training import Progress


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

    def counted(
        model: ResidualNet, data: Data, lesions: list[lesion.Lesion], bn: str, *rest: object
    ) -> lesion.Errors:
        counts = original(model, data, lesions, bn, *rest)  # type: ignore[arg-type]
        finished.extend((id(model), bn, cut) for cut in lesions)
        return counts

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
    for nets in ([net], [net], [net, nine_blocks(1)]):
        folder = tmp_path / str(len(nets))
        lesion_single.measure({"residual": nets}, data, PLAN, folder, lambda *now: seen.append(now[:2]))
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
        measure({**nets, "residual": [net, nine_blocks(3)]}, data, plan, tmp_path)
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
