"""Statistics of single deletions, and the claims of Figures 3, 4 and 8."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.claims import HELD, NOT, OPEN, verdicts
from helpers.runs import (
    deletions,
    write_run,
)
from numpy.typing import NDArray

from pathnet.experiments import (
    lesion_single,
    lesion_stochastic_depth,
)
from pathnet.experiments.claims import Verdict
from pathnet.experiments.errors import ErrorCount, text_of
from pathnet.experiments.lesion_single import SingleDeletions, contrast
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
        == "the worst, block 3, costs 5 points (4.86 to 5.13), the median block 1"
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


def known(misclassified: NDArray[np.bool_], downsampling: tuple[int, ...] = ()) -> SingleDeletions:
    """Return the summary of masks [seeds, 1 + n, images], the intact network's first."""
    rates = misclassified.mean(2)
    ends = np.zeros_like(rates[:, 1:])
    images = misclassified.shape[2]
    return SingleDeletions(rates[:, 1:], ends, ends, rates[:, 0], downsampling, 0.9, 0, images, misclassified)


@pytest.mark.parametrize("together", [False, True], ids=["independent errors", "errors on the same images"])
def test_the_interval_of_a_cost_covers_the_difference_of_rates(together: bool) -> None:
    rng = np.random.default_rng(0)
    images, rates, tests = 400, np.array([0.1, 0.12, 0.25]), 2000
    covered, widths = np.zeros(2), np.zeros(2)
    for _ in range(tests):
        uniform = rng.random((3, images))
        single = known((uniform[:1] if together else uniform)[None] < rates[:, None])
        assert single.misclassified is not None and single.misclassified.shape == (1, 3, images)
        for case, blocks in enumerate(([True, False], [True, True])):
            cost = single.cost(np.array(blocks))
            expected = rates[1:][blocks].mean() - rates[0]
            assert cost.mean == pytest.approx(single.increase[blocks].mean()) and cost.count == images
            covered[case] += cost.low <= expected <= cost.high
            widths[case] += cost.high - cost.low
    assert (covered / tests >= 0.935).all() and (covered / tests <= 0.985).all()
    # The intervals of two rates, taken as if the networks erred independently, would be much wider.
    assert (widths / tests < (0.05 if together else 0.09)).all()


@pytest.mark.parametrize("images", [60, 360, 10_000])
def test_a_cost_that_no_image_shows_keeps_an_interval(images: int) -> None:
    cost = known(np.zeros((1, 2, images), np.bool_)).cost(np.array([True]))
    assert cost.mean == 0 and cost.low == -cost.high and cost.high == pytest.approx(1.96 / (images + 2), rel=1e-3)


def test_a_contrast_weighs_the_costs_of_each_image() -> None:
    rng = np.random.default_rng(1)
    one, other = (known(rng.random((2, 4, 50)) < 0.3) for _ in range(2))
    first, last = np.array([True, True, False]), np.array([False, False, True])
    measured = contrast((1.0, one, first), (-2.0, other, last))
    costs = []
    for image in range(50):
        total = 0.0
        for seed in range(2):
            for weight, single, blocks in ((0.25, one, (0, 1)), (-1.0, other, (2,))):
                assert single.misclassified is not None
                wrong = single.misclassified[seed, :, image]
                total += weight * sum(float(wrong[1 + block]) - float(wrong[0]) for block in blocks)
        costs.append(total)
    assert measured.mean == pytest.approx(np.mean(costs)) and measured.count == 50
    # Agresti and Min's rule, with an image added at half weight for each extreme, and one for no difference.
    weighted = np.array([*costs, 3.0, -3.0, 0.0]), np.array([1.0] * 50 + [0.5, 0.5, 1.0])
    mean = np.average(weighted[0], weights=weighted[1])
    half = 1.959963984540054 * math.sqrt(np.average((weighted[0] - mean) ** 2, weights=weighted[1]) / 52)
    assert (measured.low, measured.high) == pytest.approx((mean - half, mean + half))


def test_networks_that_err_on_the_same_images_are_told_apart_where_their_rates_are_not(tmp_path: Path) -> None:
    """Let deletions cost 30 of 300 images after plain training, and 9 of the same ones with stochastic depth."""
    order = np.random.default_rng(2).permutation(300)

    def rows(network: str, more: int) -> list[ErrorCount]:
        masks = [order < 60, *[order < 60 + more] * 3]
        lesions = [(), (0,), (1,), (2,)]
        return [
            ErrorCount(network, 0, len(cut), 0, cut, (), 1.0, "running", 300, int(mask.sum()), text_of(mask))
            for cut, mask in zip(lesions, masks, strict=True)
        ]

    kinds = {"residual": (3, (2,)), "stochastic depth": (3, (2,))}
    measured = [*rows("residual", 30), *rows("stochastic depth", 9)]
    run = write_run(tmp_path / "which", "lesion-stochastic-depth", kinds, measured)
    assert verdicts(lesion_stochastic_depth.claims(run)) == [HELD, HELD]
    # Runs of earlier versions do not say which images are misclassified.
    unknown = [replace(row, misclassified="") for row in measured]
    run = write_run(tmp_path / "rates", "lesion-stochastic-depth", kinds, unknown)
    claims = lesion_stochastic_depth.claims(run)
    assert verdicts(claims) == [OPEN, OPEN]
    assert claims[0].measured == (
        "3 points (no interval: only the mean is known) against 10 points (no interval: only the mean is known); "
        "less 0.75 times the latter, -4.5 points (no interval: only the mean is known)"
    )


def test_a_cost_has_no_interval_where_only_rates_are_known() -> None:
    rates = np.array([[0.2, 0.3]])
    for images in (None, 1000):
        single = SingleDeletions(rates, rates - 0.01, rates + 0.01, np.array([0.1]), (), 0.9, 0, images)
        cost = single.cost(np.array([True, False]))
        assert cost.mean == pytest.approx(0.1) and math.isnan(cost.low) and math.isnan(cost.high)


@pytest.mark.parametrize("text", ["1" * 59 + "0" * 241, "1" * 60 + "0" * 239, "1" * 60 + "2" * 240, "1" * 60])
def test_masks_that_contradict_the_counts_are_refused(tmp_path: Path, text: str) -> None:
    rows = [ErrorCount("residual", 0, 0, 0, (), (), 1.0, "running", 300, 60, "1" * 60 + "0" * 240)]
    rows.append(ErrorCount("residual", 0, 1, 0, (0,), (), 1.0, "running", 300, 60, text))
    run = write_run(tmp_path / "edited", "lesion-single", {"residual": (1, ())}, rows)
    with pytest.raises(ValueError, match=r"^run: .*edited: misclassified: expected 300 characters, 60 of them 1"):
        lesion_single.summarise(run)


def test_a_contrast_within_a_network_is_at_most_as_large_as_its_weights_allow() -> None:
    """The weights of the intact network cancel in part: each image counts from -2 to 2, not to 3."""
    single = known(np.zeros((1, 3, 98), np.bool_))
    first, last = np.array([True, False]), np.array([False, True])
    for terms, largest in (
        ([(1.0, single, first), (-2.0, single, last)], 2.0),
        ([(1.0, single, first), (-2.0, replace(single), last)], 3.0),
        ([(1.0, single, first), (-1.0, single, last)], 1.0),
    ):
        assert contrast(*terms).high == pytest.approx(1.96 * largest / 100, rel=1e-3)


def test_an_interval_ends_where_a_cost_can_be_no_larger() -> None:
    single = known(np.repeat([[[False], [True]]], 30, 2))
    cost = single.cost(np.array([True]))
    assert cost.mean == cost.high == 1 and 0.7 < cost.low < 1


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
