"""Claims of the other experiments that hold and that do not, and runs that are not complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.claims import held
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
from pathnet.experiments.run import Value


@pytest.mark.parametrize(
    ("three", "worst", "expected"),
    [(1e-16, 1e-12, [True, True]), (1e-9, 1e-12, [False, True]), (0, 1e-3, [True, False])],
)
def test_claims_of_the_unraveled_view(tmp_path: Path, three: float, worst: float, expected: list[bool]) -> None:
    rows = [Value("", 0, 0, unraveled.NESTED, n, three if n == 3 else 1.0) for n in range(1, 7)]
    rows += [Value("", 0, 0, unraveled.PATHS, n, worst if n == 5 else 0.0) for n in range(1, 7)]
    assert held(unraveled.claims(write_run(tmp_path, "unraveled", {}, rows))) == expected


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        (0.3 ** np.arange(1.0, 13), [True, True]),
        (0.99 ** np.arange(1.0, 13), [True, False]),
        (1.5 ** np.arange(1.0, 13), [False, False]),
        (np.where(np.arange(12) < 2, 1.0, 1e-9), [False, True]),
    ],
    ids=["exponential", "slow", "growing", "a step"],
)
def test_claims_of_path_gradients(tmp_path: Path, norms: np.ndarray[Any, Any], expected: list[bool]) -> None:
    claims = path_gradients.claims(gradient_run(tmp_path, np.tile(norms, (5, 1))))
    assert held(claims) == expected and "of 12 blocks" in claims[1].measured


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True]),
        ({"half_off": 1e-6}, [False, True, True]),
        ({"parts_off": 1e-3}, [True, False, True]),
        ({"openness": 0.6}, [True, True, False]),
    ],
    ids=["the paper's", "not halved", "a part is missing", "open gates"],
)
def test_claims_of_highway_networks(tmp_path: Path, changed: dict[str, float], expected: list[bool]) -> None:
    rows = [*highway_rows(**changed), *(row for s in range(2) for row in deletions(0.1, [0.2] * 3, "highway", s))]
    run = write_run(tmp_path, "highway", {"highway": (3, ())}, rows, seeds=2)
    assert held(highway.claims(run)) == expected
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
