"""Lesions that the drivers draw: functions of the seed, and uniform."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import combinations
from math import comb
from pathlib import Path

import pytest
from helpers.lesion_runs import PLAN, Measure
from scipy.stats import chisquare

from pathnet import lesion, models
from pathnet.data import Data
from pathnet.experiments import (
    lesion_many,
    lesion_reorder,
)
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Plan
from pathnet.models import ResidualNet


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
        draws = [many[*key, draw] for draw in range(20)]
        assert len(set(draws)) > 5 and draws != [other[*key, draw] for draw in range(20)]
    assert [many[0, 3, draw] for draw in range(20)] != [many[1, 3, draw] for draw in range(20)]


def test_every_set_of_deletions_is_drawn_equally_often(data: Data, tmp_path: Path, nothing_measured: object) -> None:
    plan = Plan(draws=1500, deletions=100)
    rows = lesion_many.measure({"residual": [models.preact_resnet(14, 3)]}, data, plan, tmp_path).rows(ErrorCount)
    assert {row.size for row in rows} == set(range(7)), "no more than there are"
    for size in range(1, 7):
        sets = Counter(row.deleted for row in rows if row.size == size)
        assert all(deleted == tuple(sorted(set(deleted))) and len(deleted) == size for deleted in sets)
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
        moved = sum(block != place for place, block in enumerate(order))
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
