"""The cpu engine's training step against float64: gradients on its own ReLU bits, and the forward pass apart."""

from __future__ import annotations

import pytest
import torch
from helpers.fused_blocks import FLOAT32
from helpers.oracles import relative_error
from helpers.training_cases import CASES, TrainingCase, forward_truth, frozen_gradients, measured, relu_bits
from torch import Tensor

from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

FEW = 8
"""Number of elements below which a tensor is judged by the gradients of all parameters, since its few sums may cancel
nearly."""

ROUNDING = 2.0**-9
"""Largest relative error of one rounding to bfloat16."""
SETS = native.build_facts()["instruction_sets"] if native.LOADED else []
TURNS = [(case, SETS[number % len(SETS)]) for number, case in enumerate(CASES)] if SETS else []
"""Each case on one instruction set; as there are ten cases of each kind, each set runs every kind."""


def errors(grads: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return the relative error of each gradient; the first is the input's."""
    whole = torch.cat([grad.flatten() for grad in exact[1:]]).norm()
    return [
        float((grad.double() - truth).norm() / (whole if truth.numel() < FEW else truth.norm().clamp_min(1e-30)))
        for grad, truth in zip(grads, exact, strict=True)
    ]


def test_the_cases_are_of_every_width_side_and_kind() -> None:
    assert {case.x[1] for case in CASES} >= {1, 3, 5, 8, 12, 16, 17, 32, 48, 64}
    assert {side for case in CASES for side in case.x[2:]} >= {1, 2, 5, 7, 8, 12, 16, 30, 32}
    assert {case.x[0] for case in CASES} == {1, 2, 9}
    assert {stride for case in CASES for stride in case.strides} == {1, 2, 3}
    assert {kernel for case in CASES for kernel in case.kernels} == {1, 3, 5}
    assert {len(case.kernels) for case in CASES} == {1, 2, 3}
    assert {(case.skip, case.running) for case in CASES} == {
        (skip, running) for skip in ("identity", "projection", "pad", "none") for running in (True, False)
    }


@pytest.mark.parametrize(("case", "isa"), TURNS, ids=str)
def test_a_step_in_float32_is_that_of_float64(case: TrainingCase, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    x, operands = case.operands()
    (output, inner, statistics), grad, grads = measured(x, operands)
    exact_output, exact_statistics = forward_truth(case, x, operands)
    assert relative_error(output, exact_output) < FLOAT32
    for unit, (mean, variance) in enumerate(exact_statistics):
        channels, deviation = len(mean), float(variance.sum().sqrt())
        assert float((statistics[unit, 0, :channels] - mean).norm()) < FLOAT32 * (deviation + float(mean.norm()))
        spread = variance + operands.epsilons[unit]
        assert float((statistics[unit, 1, :channels] - variance).norm()) < FLOAT32 * float(spread.norm())
        assert not statistics[unit, :, channels:].any()
    bits = relu_bits(case, x, inner, statistics, operands)
    exact = frozen_gradients(case, x, operands, bits, grad)
    assert all(error < FLOAT32 for error in errors(grads, exact))


@pytest.mark.parametrize(("case", "isa"), TURNS, ids=str)
def test_a_step_in_bfloat16_is_as_exact_as_autocast(
    case: TrainingCase, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice autocast's error for the same ReLU bits, and one rounding."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    x, operands = case.operands()
    x = x.bfloat16()
    (output, inner, statistics), grad, grads = measured(x, operands)
    assert output.dtype == inner.dtype == grads[0].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in (statistics, *grads[1:])} == {torch.float32}
    exact_output, rounded_output = (forward_truth(case, x, operands, autocast)[0] for autocast in (False, True))
    assert relative_error(output, exact_output) < 2 * relative_error(rounded_output, exact_output) + ROUNDING
    bits = relu_bits(case, x, inner, statistics, operands)
    exact = frozen_gradients(case, x, operands, bits, grad)
    rounded = errors(frozen_gradients(case, x, operands, bits, grad, autocast=True), exact)
    for error, of_autocast in zip(errors(grads, exact), rounded, strict=True):
        assert error < 2 * of_autocast + ROUNDING


@pytest.mark.parametrize("pixel", [(0, 0), (0, 31), (16, 0), (31, 31)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_statistics_are_exact_where_one_pixel_is_far_from_the_others(pixel: tuple[int, int], mean: float) -> None:
    """Distances from a pixel whose neighbourhood ends at a border would lose their digits."""
    case = TrainingCase((2, 17, 32, 32), (3,), (17,), (1,), "identity", False)
    x, operands = case.operands()
    x.mul_(1e-3).add_(mean)[:, :, pixel[0], pixel[1]] = mean - 0.7
    _, statistics = forward_truth(case, x, operands)
    (_, _, rows), _, _ = measured(x, operands)
    assert relative_error(rows[0, 0], statistics[0][0]) < 2.0**-20
    assert relative_error(rows[0, 1], statistics[0][1]) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[::13], ids=str)
def test_no_bit_depends_on_the_number_of_threads(case: TrainingCase, dtype: torch.dtype) -> None:
    x, operands = case.operands()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            forward, _, grads = measured(x.to(dtype), operands)
            results.append([*forward, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def test_instruction_sets_differ_in_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set that is forced runs, so their results are not all of one set."""
    x, operands = CASES[5].operands()
    results = []
    for name in native.build_facts()["instruction_sets"]:
        monkeypatch.setenv("PATHNET_ISA", name)
        results.append(measured(x, operands)[2][0])
    assert all(relative_error(result, results[-1].double()) < FLOAT32 for result in results)
    assert len(results) == 1 or not all(torch.equal(result, results[0]) for result in results)
