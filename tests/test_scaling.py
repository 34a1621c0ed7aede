from __future__ import annotations

import math

import pytest
import torch

from pathnet import scaling
from pathnet.scaling import ScaledGradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rescaling_is_exact_and_brings_the_largest_magnitude_below_one(dtype: torch.dtype) -> None:
    grad = torch.randn(3, 4, 2, 5, dtype=dtype) * torch.tensor([1e-38, 1e-20, 1.0, 1e30], dtype=dtype)[:, None, None]
    grad[1, 2] = 0
    grad[2, 0, 0, 0] = torch.inf
    exponent = torch.arange(12, dtype=torch.int32).reshape(3, 4) - 900
    scaled, shifted = scaling.rescale(grad, exponent)
    assert torch.equal(scaling.value(scaled, shifted), scaling.value(grad, exponent))
    largest = scaled.abs().flatten(2).amax(2)
    assert largest[1, 2] == 0 and largest[2, 0] == torch.inf
    ordinary = (largest > 0) & torch.isfinite(largest)
    assert ((largest[ordinary] >= 0.5) & (largest[ordinary] < 1)).all()


def test_one_exponent_a_batch_is_set_by_its_largest_sample() -> None:
    grad = torch.ones(1, 3, 2)
    scaled, exponent = scaling.rescale(grad * torch.tensor([1e-30, 4.0, 0.0])[:, None], torch.zeros(1, 1).int())
    assert exponent.tolist() == [[3]] and scaled[0, 1, 0] == 0.5 and scaled[0, 0, 0] > 0


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_alignment_keeps_the_largest_sample_in_range(order: list[int]) -> None:
    exponent = torch.tensor([[-900, 0, 700]], dtype=torch.int32)[:, order]
    aligned, common = scaling.align(torch.full((1, 3, 2), 0.75), exponent)
    assert common.tolist() == [[700]]
    assert sorted(aligned[0, :, 0].tolist()) == [0, 0, 0.75]


def test_alignment_is_not_to_samples_that_are_zero() -> None:
    grad = torch.full((2, 3, 2), 0.75)
    grad[0, 1], grad[1] = 0, 0
    aligned, common = scaling.align(grad, torch.tensor([[-300, 0, -302], [5, 6, 7]], dtype=torch.int32))
    assert common.tolist() == [[-300], [0]]
    assert aligned[:, :, 0].tolist() == [[0.75, 0, 0.1875], [0, 0, 0]]


def test_norms_reach_down_to_1e_minus_300() -> None:
    grad = torch.tensor([[[3.0, 4.0], [6.0, 8.0]]])
    slots = scaling.norms(grad, torch.tensor([[-990, -990]], dtype=torch.int32))
    assert slots.tolist() == [[math.ldexp(5, -990), math.ldexp(10, -990)]]
    assert scaling.combine(slots)[0] == pytest.approx(math.ldexp(math.sqrt(125), -990), rel=1e-15, abs=0)
    assert scaling.combine(torch.zeros(2, 3, dtype=torch.float64)).tolist() == [0, 0]


@pytest.mark.parametrize("slots", [3, 1], ids=["samples apart", "one batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_keep_the_larger_and_zeros_have_no_say(dtype: torch.dtype, slots: int) -> None:
    """Slots far apart, near each other, zero on either side or on both, with exponents beyond what they hold."""
    torch.manual_seed(slots)
    first, second = torch.randn(2, 5, 3, 2, 4, dtype=dtype)
    first[1], second[2], first[3], second[3] = 0, 0, 0, 0
    exponents = torch.tensor([[-300, 290], [250, -300], [-400, 300], [500, -500], [7, 6]], dtype=torch.int32)
    first_exponent, second_exponent = (exponents[:, side, None].repeat(1, slots) for side in range(2))
    grad, exponent = scaling.add(ScaledGradient(first, first_exponent), ScaledGradient(second, second_exponent))
    assert grad.dtype == dtype and exponent.shape == (5, slots) and exponent.dtype == torch.int32
    expected = scaling.value(first, first_exponent) + scaling.value(second, second_exponent)
    for index, (sum_, truth) in enumerate(zip(scaling.value(grad, exponent), expected, strict=True)):
        most = 2 * torch.finfo(dtype).eps * truth.abs().max()
        assert (sum_ - truth).abs().max() <= most, index
    assert (grad[3] == 0).all() and (exponent[3] == 0).all()
    assert grad[[0, 1, 2, 4]].abs().flatten(1).amax(1).ge(0.5).all() and grad.abs().max() < 1
