"""Claims of the other experiments that hold and that do not, and runs that are not complete."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.claims import HELD, NOT, OPEN, verdicts
from helpers.runs import (
    deletions,
    gradient_run,
    highway_rows,
    write_run,
)

from pathnet import paper
from pathnet.experiments import (
    highway,
    path_gradients,
    unraveled,
)
from pathnet.experiments.claims import Claim, Verdict, all_of, at_least, at_most, in_words
from pathnet.experiments.run import Value


@pytest.mark.parametrize(
    ("low", "high", "most", "least"),
    [
        (0.1, 0.2, HELD, NOT),
        (0.1, 0.3, HELD, OPEN),
        (0.2, 0.4, OPEN, OPEN),
        (0.3, 0.4, OPEN, HELD),
        (0.31, 0.4, NOT, HELD),
        (0.3, 0.3, HELD, HELD),
        (math.nan, math.nan, OPEN, OPEN),
        (-math.inf, math.inf, OPEN, OPEN),
    ],
)
def test_a_verdict_compares_an_interval_with_a_bound(low: float, high: float, most: Verdict, least: Verdict) -> None:
    assert (at_most(low, high, 0.3), at_least(low, high, 0.3)) == (most, least)


def test_several_conditions_hold_only_together() -> None:
    assert [all_of(HELD, HELD), all_of(HELD, OPEN), all_of(OPEN, NOT), all_of(NOT, HELD)] == [HELD, OPEN, NOT, NOT]


def test_verdicts_are_counted_in_words() -> None:
    claims = [Claim("", "", "", "", verdict) for verdict in (HELD, HELD, OPEN, NOT)]
    assert in_words(claims) == "2 held, 1 did not hold and 1 is open"
    assert in_words(claims[:2]) == "2 held, 0 did not hold and 0 are open"


@pytest.mark.parametrize(
    ("three", "worst", "expected"),
    [(1e-16, 1e-12, [HELD, HELD]), (1e-9, 1e-12, [NOT, HELD]), (0, 1e-3, [HELD, NOT])],
)
def test_claims_of_the_unraveled_view(tmp_path: Path, three: float, worst: float, expected: list[Verdict]) -> None:
    rows = [Value("", 0, 0, unraveled.NESTED, n, three if n == 3 else 1.0) for n in range(1, 7)]
    rows += [Value("", 0, 0, unraveled.PATHS, n, worst if n == 5 else 0.0) for n in range(1, 7)]
    assert verdicts(unraveled.claims(write_run(tmp_path, "unraveled", {}, rows))) == expected


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        (0.3 ** np.arange(1.0, 13), [HELD, HELD]),
        (0.99 ** np.arange(1.0, 13), [HELD, NOT]),
        (1.5 ** np.arange(1.0, 13), [NOT, NOT]),
        (np.where(np.arange(12) < 2, 1.0, 1e-9), [NOT, HELD]),
    ],
    ids=["exponential", "slow", "growing", "a step"],
)
def test_claims_of_path_gradients(tmp_path: Path, norms: np.ndarray[Any, Any], expected: list[Verdict]) -> None:
    spread = np.random.default_rng(0).uniform(0.99, 1.01, (12, 12))
    claims = path_gradients.claims(gradient_run(tmp_path, norms * spread))
    assert verdicts(claims) == expected and "of 12 blocks" in claims[1].measured


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [HELD, HELD, HELD]),
        ({"half_off": 1e-6}, [NOT, HELD, HELD]),
        ({"parts_off": 1e-3}, [HELD, NOT, HELD]),
        ({"openness": 0.6}, [HELD, HELD, NOT]),
    ],
    ids=["the paper's", "not halved", "a part is missing", "open gates"],
)
def test_claims_of_highway_networks(tmp_path: Path, changed: dict[str, float], expected: list[Verdict]) -> None:
    rows = [*highway_rows(**changed), *(row for s in range(2) for row in deletions(0.1, [0.2] * 3, "highway", s))]
    run = write_run(tmp_path, "highway", {"highway": (3, ())}, rows, seeds=2)
    assert verdicts(highway.claims(run)) == expected
    summary = highway.summarise(run)
    assert summary.bias.tolist() == [[-1, -2, -3], [-11, -12, -13]]
    np.testing.assert_allclose([norm.mean for norm in summary.path_norms], [2, 1, 0.5])
    assert {part: share.tolist() for part, share in summary.shares.items()} == {
        "skip": pytest.approx([0.5] * 3),
        "residual": pytest.approx([0.3] * 3),
        "gate": pytest.approx([0.2] * 3),
    }
    assert summary.openness[0].mean == pytest.approx(changed.get("openness", 0.2) + 0.005)
    assert summary.deletions.increase.tolist() == pytest.approx([0.1] * 3)


# Runs that are not complete


@pytest.mark.parametrize("name", [name for name in paper.EXPERIMENTS if name != "path-gradients"])
def test_a_run_that_was_never_finished_says_so(tmp_path: Path, name: str) -> None:
    needed = paper.EXPERIMENTS[name].networks
    kinds = {kind: (3, (1,)) for kind in needed}
    rows = [row for kind in needed[:1] for row in deletions(0.1, [0.2, 0.3], kind)]
    run = write_run(tmp_path, name, kinds, rows, seeds=2, modules=2, blocks=54)
    with pytest.raises(ValueError, match=rf"run: .*{tmp_path.name} is not complete; start its command again"):
        paper.claims(run)


def test_an_experiment_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is of 'alchemy'; expected one of unraveled, lesion-single, lesion-many"):
        paper.claims(write_run(tmp_path, "alchemy", {}, []))
