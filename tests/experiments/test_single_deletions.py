"""Statistics of single deletions, and the claims of Figures 3, 4 and 8."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from helpers.claims import HELD, NOT, OPEN, verdicts
from helpers.runs import (
    deletions,
    write_run,
)

from pathnet.experiments import (
    lesion_single,
    lesion_stochastic_depth,
)
from pathnet.experiments.claims import Verdict
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.intervals import wilson

SIX = {"residual": (6, (2, 4))}


def test_single_deletions_are_summarised_over_seeds(tmp_path: Path) -> None:
    rows = deletions(0.1, [0.12, 0.1, 0.5]) + deletions(0.2, [0.2, 0.2, 0.9], seed=1)
    run = write_run(tmp_path, "lesion-single", {"residual": (3, (2,))}, rows, seeds=2)
    single = lesion_single.summarise(run)["residual"]
    np.testing.assert_allclose(single.increase, [0.01, 0, 0.55])
    np.testing.assert_allclose(single.left, [(0.78 / 0.8 + 1) / 2, 1, (0.4 / 0.8 + 0) / 2])
    assert single.intact.tolist() == [0.1, 0.2] and single.chance == 0.9
    assert single.changes_shape.tolist() == [False, False, True]
    # Wilson's interval of 90,000 in 100,000 and 12,000 in 100,000, from his formula.
    z = 1.959963984540054
    for rate, low, high in [(0.9, single.low[1, 2], single.high[1, 2]), (0.12, single.low[0, 0], single.high[0, 0])]:
        middle = (rate + z * z / 2e5) / (1 + z * z / 1e5)
        half = z * math.sqrt(rate * (1 - rate) / 1e5 + z * z / 4e10) / (1 + z * z / 1e5)
        assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize(
    ("intact", "rates", "expected"),
    [
        (0.1, [0.1, 0.12, 0.4, 0.11, 0.3, 0.1], [HELD, HELD]),
        (0.1, [0.1, 0.21, 0.4, 0.1, 0.3, 0.1], [NOT, HELD]),
        (0.1, [0.1, 0.2, 0.4, 0.1, 0.3, 0.1], [OPEN, HELD]),
        (0.1, [0.1, 0.15, 0.12, 0.15, 0.11, 0.1], [HELD, NOT]),
        (0.1, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [HELD, OPEN]),
        (0.1, [0.1, 0.05, 0.08, 0.05, 0.08, 0.05], [HELD, NOT]),
        (0.89, [0.89] * 6, [OPEN, OPEN]),
    ],
    ids=[
        "the paper's",
        "a block matters",
        "at the bound",
        "shapes do not",
        "nothing does",
        "deleting helps",
        "untrained",
    ],
)
def test_claims_of_residual_networks(
    tmp_path: Path, intact: float, rates: list[float], expected: list[Verdict]
) -> None:
    claims = lesion_single.claims(write_run(tmp_path, "lesion-single", SIX, deletions(intact, rates)))
    assert verdicts(claims) == expected


def test_the_worst_block_is_named_by_its_number_from_0(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lesion-single", SIX, deletions(0.1, [0.1, 0.1, 0.9, 0.15, 0.9, 0.12]))
    assert (
        lesion_single.claims(run)[0].measured
        == "the worst, block 3, costs 5 points (4.71 to 5.29), the median block 1"
    )


@pytest.mark.parametrize(
    ("intact", "rates", "expected"),
    [
        (0.1, [0.9, 0.89, 0.9, 0.92], HELD),
        (0.1, [0.9, 0.89, 0.81, 0.92], NOT),
        (0.1, [0.9, 0.89, 0.82, 0.92], OPEN),
        (0.95, [0.9, 0.9, 0.9, 0.9], OPEN),
        (0.9, [0.9, 0.9, 0.9, 0.9], OPEN),
        (0.88, [0.9, 0.9, 0.9, 0.9], OPEN),
    ],
    ids=[
        "chance",
        "a tenth and more is left",
        "a tenth is left",
        "worse than chance before",
        "at chance before",
        "hardly learned",
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_claims_of_vggs(tmp_path: Path, intact: float, rates: list[float], expected: Verdict) -> None:
    run = write_run(tmp_path, "lesion-single", {"vgg": (4, (1,))}, deletions(intact, rates, "vgg"))
    assert verdicts(lesion_single.claims(run)) == [expected]


def test_a_vggs_layers_are_counted_from_its_second(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lesion-single", {"vgg": (3, ())}, deletions(0.1, [0.9, 0.5, 0.9], "vgg"))
    assert lesion_single.claims(run)[0].measured == "50 % (49.5 to 50.5) is left without layer 2, 0 % in the median"


def test_a_network_whose_blocks_all_change_the_shape_has_no_others(tmp_path: Path) -> None:
    run = write_run(tmp_path, "lesion-single", {"residual": (3, (0, 1, 2))}, deletions(0.1, [0.2] * 3))
    assert lesion_single.claims(run) == []
    run = write_run(tmp_path / "none", "lesion-single", {"residual": (3, ())}, deletions(0.1, [0.1] * 3))
    assert verdicts(lesion_single.claims(run)) == [HELD]


@pytest.mark.parametrize(
    ("plain", "stochastic", "expected"),
    [
        ((0.1, [0.2, 0.2, 0.4]), (0.1, [0.15, 0.15, 0.2]), [HELD, HELD]),
        ((0.1, [0.1, 0.1, 0.4]), (0.1, [0.3, 0.3, 0.2]), [NOT, HELD]),
        ((0.1, [0.3, 0.3, 0.2]), (0.1, [0.1, 0.1, 0.4]), [HELD, NOT]),
        ((0.1, [0.2, 0.2, 0.4]), (0.1, [0.2, 0.2, 0.4]), [NOT, NOT]),
        ((0.1, [0.2, 0.2, 0.4]), (0.9, [0.9, 0.9, 0.9]), [OPEN, OPEN]),
    ],
    ids=["the paper's", "other blocks", "downsampling", "alike", "never learned"],
)
def test_claims_of_stochastic_depth(
    tmp_path: Path,
    plain: tuple[float, list[float]],
    stochastic: tuple[float, list[float]],
    expected: list[Verdict],
) -> None:
    rows = deletions(*plain) + deletions(*stochastic, network="stochastic depth")
    kinds = {"residual": (3, (2,)), "stochastic depth": (3, (2,))}
    assert (
        verdicts(lesion_stochastic_depth.claims(write_run(tmp_path, "lesion-stochastic-depth", kinds, rows)))
        == expected
    )


def test_networks_that_deletions_help_leave_nothing_for_stochastic_depth_to_reduce(tmp_path: Path) -> None:
    rows = deletions(0.1, [0.05] * 3) + deletions(0.1, [0.08] * 3, network="stochastic depth")
    kinds = {"residual": (3, (2,)), "stochastic depth": (3, (2,))}
    run = write_run(tmp_path, "lesion-stochastic-depth", kinds, rows)
    assert verdicts(lesion_stochastic_depth.claims(run)) == [OPEN, OPEN]


def test_what_is_left_is_unbounded_where_the_intact_network_may_be_at_chance() -> None:
    rates = np.array([[0.5, 0.95]])
    single = SingleDeletions(rates, rates - 0.02, rates + 0.02, np.array([0.899]), (), 0.9, 0, 1000)
    assert np.isnan(single.left_ends).all()


def test_stochastic_depth_without_downsampling_blocks_is_compared_by_all_blocks(tmp_path: Path) -> None:
    rows = deletions(0.1, [0.2, 0.2]) + deletions(0.1, [0.12, 0.12], network="stochastic depth")
    kinds = {"residual": (2, ()), "stochastic depth": (2, ())}
    claims = lesion_stochastic_depth.claims(write_run(tmp_path, "lesion-stochastic-depth", kinds, rows))
    assert verdicts(claims) == [HELD]


def test_the_interval_of_a_cost_covers_the_difference_of_rates() -> None:
    """Simulate a test of networks that err independently: Newcombe's interval covers the difference 95 % of the time.

    Networks that err on the same images have smaller differences, so it then covers more.
    """
    rng = np.random.default_rng(0)
    images, before, after, tests = 400, 0.1, 0.25, 2000
    for together, least, most in ((False, 0.935, 0.965), (True, 0.98, 1.0)):
        covered = 0
        for _ in range(tests):
            uniform = rng.random((2, images))
            wrong = uniform[0] < before, uniform[0 if together else 1] < after
            intact, rate = (float(errors.mean()) for errors in wrong)
            low, high = wilson(int(wrong[1].sum()), images)
            single = SingleDeletions(
                np.array([[rate]]), np.array([[low]]), np.array([[high]]), np.array([intact]), (), 0.9, 0, images
            )
            cost = single.cost(np.array([True]))
            assert cost.mean == pytest.approx(rate - intact)
            covered += cost.low <= after - before <= cost.high
        assert least <= covered / tests <= most


def test_a_cost_has_no_interval_where_the_number_of_images_is_unknown() -> None:
    rates = np.array([[0.2, 0.3]])
    single = SingleDeletions(rates, rates - 0.01, rates + 0.01, np.array([0.1]), (), 0.9, 0)
    cost = single.cost(np.array([True, False]))
    assert cost.mean == pytest.approx(0.1) and math.isnan(cost.low) and math.isnan(cost.high)


def test_the_ends_of_what_is_left_are_the_extremes_over_both_intervals() -> None:
    rates = np.array([[0.5, 0.95]])
    single = SingleDeletions(rates, rates - 0.02, rates + 0.02, np.array([0.1]), (), 0.9, 0, 1000)
    (intact_low,), (intact_high,) = single.intact_ends
    assert (intact_low, intact_high) == wilson(100, 1000)
    low, high = single.left_ends
    assert low[0] == pytest.approx((0.9 - 0.52) / (0.9 - intact_low))
    assert high[0] == pytest.approx((0.9 - 0.48) / (0.9 - intact_high))
    # Above chance, nothing is left, and a better intact network leaves less of less.
    assert low[1] == pytest.approx((0.9 - 0.97) / (0.9 - intact_high))
    assert high[1] == pytest.approx((0.9 - 0.93) / (0.9 - intact_low))
