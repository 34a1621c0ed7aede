"""Statistics of single deletions, and the claims of Figures 3, 4 and 8."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from helpers.claims import held
from helpers.runs import (
    deletions,
    write_run,
)

from pathnet.experiments import (
    lesion_single,
    lesion_stochastic_depth,
)

SIX = {"residual": (6, (2, 4))}


def test_single_deletions_are_summarised_over_seeds(tmp_path: Path) -> None:
    rows = deletions(0.1, [0.12, 0.1, 0.5]) + deletions(0.2, [0.2, 0.2, 0.9], seed=1)
    run = write_run(tmp_path, "lesion-single", {"residual": (3, (2,))}, rows, seeds=2)
    single = lesion_single.summarise(run)["residual"]
    np.testing.assert_allclose(single.increase, [0.01, 0, 0.55])
    np.testing.assert_allclose(single.left, [(0.78 / 0.8 + 1) / 2, 1, (0.4 / 0.8 + 0) / 2])
    assert single.intact.tolist() == [0.1, 0.2] and single.chance == 0.9
    assert single.changes_shape.tolist() == [False, False, True]
    # Wilson's interval of 900 in 1000 and 120 in 1000, from his formula.
    z = 1.959963984540054
    for rate, low, high in [(0.9, single.low[1, 2], single.high[1, 2]), (0.12, single.low[0, 0], single.high[0, 0])]:
        middle = (rate + z * z / 2000) / (1 + z * z / 1000)
        half = z * math.sqrt(rate * (1 - rate) / 1000 + z * z / 4e6) / (1 + z * z / 1000)
        assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize(
    ("intact", "rates", "expected"),
    [
        (0.1, [0.1, 0.12, 0.4, 0.11, 0.3, 0.1], [True, True]),
        (0.1, [0.1, 0.21, 0.4, 0.1, 0.3, 0.1], [False, True]),
        (0.1, [0.1, 0.15, 0.12, 0.15, 0.11, 0.1], [True, False]),
        (0.1, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [True, False]),
        (0.1, [0.1, 0.05, 0.1, 0.05, 0.1, 0.05], [True, False]),
        (0.89, [0.89] * 6, [False, False]),
    ],
    ids=["the paper's", "a block matters", "shapes do not", "nothing does", "deleting helps", "never learned"],
)
def test_claims_of_residual_networks(tmp_path: Path, intact: float, rates: list[float], expected: list[bool]) -> None:
    claims = lesion_single.claims(write_run(tmp_path, "lesion-single", SIX, deletions(intact, rates)))
    assert held(claims) == expected


def test_the_worst_block_is_named_by_its_number_from_0(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lesion-single", SIX, deletions(0.1, [0.1, 0.1, 0.9, 0.15, 0.9, 0.12]))
    assert lesion_single.claims(run)[0].measured == "the worst, block 3, costs 5 points, the median block 1"


@pytest.mark.parametrize(
    ("intact", "rates", "expected"),
    [
        (0.1, [0.9, 0.89, 0.9, 0.92], True),
        (0.1, [0.9, 0.89, 0.81, 0.92], False),
        (0.95, [0.9, 0.9, 0.9, 0.9], False),
        (0.9, [0.9, 0.9, 0.9, 0.9], False),
        (0.88, [0.9, 0.9, 0.9, 0.9], False),
    ],
    ids=["chance", "a tenth and more is left", "worse than chance before", "at chance before", "hardly learned"],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_claims_of_vggs(tmp_path: Path, intact: float, rates: list[float], expected: bool) -> None:
    run = write_run(tmp_path, "lesion-single", {"vgg": (4, (1,))}, deletions(intact, rates, "vgg"))
    assert held(lesion_single.claims(run)) == [expected]


def test_a_vggs_layers_are_counted_from_its_second(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lesion-single", {"vgg": (3, ())}, deletions(0.1, [0.9, 0.5, 0.9], "vgg"))
    assert lesion_single.claims(run)[0].measured == "50 % is left without layer 2, 0 % in the median"


def test_a_network_whose_blocks_all_change_the_shape_has_no_others(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lesion-single", {"residual": (3, (0, 1, 2))}, deletions(0.1, [0.2] * 3))
    assert lesion_single.claims(run) == []
    run = write_run(tmp_path / "none", "lesion-single", {"residual": (3, ())}, deletions(0.1, [0.1] * 3))
    assert held(lesion_single.claims(run)) == [True]


@pytest.mark.parametrize(
    ("plain", "stochastic", "expected"),
    [
        ((0.1, [0.2, 0.2, 0.4]), (0.1, [0.15, 0.15, 0.2]), [True, True]),
        ((0.1, [0.1, 0.1, 0.4]), (0.1, [0.3, 0.3, 0.2]), [False, True]),
        ((0.1, [0.3, 0.3, 0.2]), (0.1, [0.1, 0.1, 0.4]), [True, False]),
        ((0.1, [0.2, 0.2, 0.4]), (0.1, [0.2, 0.2, 0.4]), [False, False]),
        ((0.1, [0.2, 0.2, 0.4]), (0.9, [0.9, 0.9, 0.9]), [False, False]),
    ],
    ids=["the paper's", "other blocks", "downsampling", "alike", "never learned"],
)
def test_claims_of_stochastic_depth(
    tmp_path: Path,
    plain: tuple[float, list[float]],
    stochastic: tuple[float, list[float]],
    expected: list[bool],
) -> None:
    rows = deletions(*plain) + deletions(*stochastic, network="stochastic depth")
    kinds = {"residual": (3, (2,)), "stochastic depth": (3, (2,))}
    assert (
        held(lesion_stochastic_depth.claims(write_run(tmp_path, "lesion-stochastic-depth", kinds, rows))) == expected
    )
