"""Paths that deletions leave: equation 8 compared with all paths of small networks."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from helpers.claims import HELD, NOT, verdicts

from pathnet import data, results
from pathnet.experiments import (
    remaining_paths,
)
from pathnet.experiments.run import Plan, Value


@pytest.fixture(scope="module")
def remaining(tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    return remaining_paths.measure({}, data.digits(), Plan(), tmp_path_factory.mktemp("run") / "remaining-paths")


def test_the_papers_54_blocks(remaining: results.Run) -> None:
    summary = remaining_paths.summarise(remaining)
    assert summary.blocks == 54 and set(summary.share) == {1, 10, 20}
    assert verdicts(remaining_paths.claims(remaining)) == [HELD, HELD]
    again = remaining_paths.measure({}, data.digits(), Plan(), remaining.folder)
    assert again.rows(Value) == remaining.rows(Value) and len(remaining.rows(Value)) == 3 * 55
    for deleted, drawn in summary.drawn.items():
        assert drawn[0] == 1 and (drawn[54 - deleted + 1 :] == 0).all()
        np.testing.assert_allclose(drawn, summary.share[deleted], atol=0.06)


def test_the_share_that_is_left_is_that_of_all_deletions_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, deletions_of = 6, (1, 3)
    monkeypatch.setattr(remaining_paths, "BLOCKS", n)
    monkeypatch.setattr(remaining_paths, "DELETED", deletions_of)
    summary = remaining_paths.summarise(remaining_paths.measure({}, data.digits(), Plan(plan_seed=2), tmp_path))
    for deleted in deletions_of:
        left, whole = Counter[int](), Counter[int]()
        for gone in combinations(range(n), deleted):
            for path in product((0, 1), repeat=n):
                whole[sum(path)] += 1
                left[sum(path)] += not any(path[i] for i in gone)
        exact = [left[k] / whole[k] for k in range(n + 1)]
        np.testing.assert_allclose(summary.share[deleted], exact, atol=1e-14)
        np.testing.assert_allclose(summary.drawn[deleted], exact, atol=0.05)


def test_paths_that_avoid_other_blocks_than_deleted_fail_their_claim(
    remaining: results.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = remaining_paths.paths.remaining_fraction
    monkeypatch.setattr(remaining_paths.paths, "remaining_fraction", lambda n, deleted: share(n, deleted + 1))
    assert verdicts(remaining_paths.claims(remaining)) == [NOT, HELD]
