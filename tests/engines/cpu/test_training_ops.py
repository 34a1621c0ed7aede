"""The cpu engine's training ops: schemas, fakes, derivatives, refusals, and numbers that are not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.interrupted import result_of
from helpers.training_cases import CASES, TrainingCase, measured

from pathnet import native
from pathnet.engines.cpu.training import cpu_fused_residual, cpu_fused_residual_backward
from pathnet.engines.operands import BlockOperands

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

BASIC = TrainingCase((2, 3, 5, 6), (3, 3), (6, 6), (2, 1), "projection", False, (1.0, 0.5))
PAD = TrainingCase((2, 3, 4, 5), (3, 1), (4, 7), (1, 2), "pad", True)


def requiring_grad(operands: BlockOperands) -> BlockOperands:
    affine = len(operands.norms) // len(operands.epsilons)
    for row in [*operands.weights, *(row for index, row in enumerate(operands.norms) if index % affine < 2)]:
        row.requires_grad_()
    return operands


def forward_arguments(case: TrainingCase, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, operands = case.operands()
    return x.to(dtype).requires_grad_(), *requiring_grad(operands)


def backward_arguments(case: TrainingCase, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, operands = case.operands()
    (_, inner, statistics), grad, _ = measured(x.to(dtype), operands)
    return grad, x.to(dtype), inner, statistics, *operands


@pytest.mark.parametrize(("case", "dtype"), [(BASIC, torch.float32), (PAD, torch.bfloat16)], ids=str)
def test_opcheck(case: TrainingCase, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.pathnet.cpu_fused_residual.default, forward_arguments(case, dtype))
    backward = torch.ops.pathnet.cpu_fused_residual_backward.default
    torch.library.opcheck(backward, backward_arguments(case, dtype))
    grad, *rest = backward_arguments(case, dtype)
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(backward, (grad.requires_grad_(), *rest), test_utils=tests)


@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_fakes_have_the_shapes_types_and_strides_of_results(case: TrainingCase) -> None:
    tests = ("test_faketensor",)
    torch.library.opcheck(torch.ops.pathnet.cpu_fused_residual.default, forward_arguments(case), test_utils=tests)
    backward = torch.ops.pathnet.cpu_fused_residual_backward.default
    torch.library.opcheck(backward, backward_arguments(case), test_utils=tests)


def test_results_have_memory_that_no_input_and_no_other_result_has() -> None:
    x, operands = BASIC.operands()
    forward, grad, grads = measured(x, operands)
    tensors = [x, *operands.weights, *operands.norms, *forward, grad, *grads]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert torch.equal(cpu_fused_residual(x, operands)[0], forward[0])


def test_the_derivative_is_the_backward_op() -> None:
    x, operands = BASIC.operands()
    _, grad, expected = measured(x, operands)
    leaves = [x.requires_grad_(), *operands.weights, *operands.norms]
    output, inner, statistics = cpu_fused_residual(x, requiring_grad(operands))
    assert output.requires_grad and not inner.requires_grad and not statistics.requires_grad
    assert all(map(torch.equal, torch.autograd.grad(output, leaves, grad), expected))


def test_any_layout_and_type_of_operands_gets_a_gradient_of_its_own() -> None:
    x, operands = BASIC.operands()
    _, grad, (x_grad, *expected) = measured(x, operands)
    weights = [weight.double().contiguous(memory_format=torch.channels_last) for weight in operands.weights]
    norms = [torch.stack([row, row], 1)[:, 0] for row in operands.norms]
    leaf = x.contiguous().requires_grad_()
    converted = requiring_grad(operands._replace(weights=weights, norms=norms))
    output, _, _ = cpu_fused_residual(leaf, converted)
    grads = torch.autograd.grad(output, [leaf, *weights, *norms], grad.contiguous())
    assert torch.equal(grads[0], x_grad) and grads[1].dtype == torch.float64
    for one, another in zip(grads[1:], expected, strict=True):
        assert torch.equal(one.float(), another)


def test_a_gradient_without_memory_of_its_own_is_copied() -> None:
    """The gradient that average pooling returns repeats one number for all pixels."""
    x, operands = BASIC.operands()
    x.requires_grad_()
    (mean,) = torch.autograd.grad(cpu_fused_residual(x, operands)[0].mean((2, 3)).sum(), x)
    output = cpu_fused_residual(x, operands)[0]
    (dense,) = torch.autograd.grad(output, x, torch.full_like(output, 1 / output[0, 0].numel()))
    assert torch.equal(mean, dense)


def test_two_derivatives_are_refused() -> None:
    x, operands = BASIC.operands()
    output = cpu_fused_residual(x.requires_grad_(), operands)[0]
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_residual: expected first derivatives only"):
        torch.autograd.grad(grad.square().sum(), x)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": lambda x: x.double()}, "x: expected Float or BFloat16, got Double"),
    ({"x": lambda x: x[0]}, r"x: expected shape \[B, C, H, W\], got \[3, 5, 6\]"),
    ({"x": lambda x: x.contiguous()}, "x: expected a dense tensor in channels_last, got other strides"),
    ({"x": lambda x: x[:0]}, r"x: expected a tensor that is not empty, got shape \[0, 3, 5, 6\]"),
    ({"x": lambda x: x[:, :2].contiguous(memory_format=torch.channels_last)}, r"weights: expected shape \[\*, 2"),
    ({"weights": lambda w: w[:1]}, "weights: expected 2 or, with a projection, 3, got 1"),
    ({"weights": lambda w: [w[0].half(), *w[1:]]}, "weights: expected Float, got Half"),
    ({"weights": lambda w: [w[0][..., :2].contiguous(), *w[1:]]}, "weights: expected square kernels of an odd side"),
    ({"weights": lambda w: [*w[:2], w[2][:4].contiguous()]}, "weights: expected a projection to what the units give"),
    ({"norms": lambda n: n[:3]}, "norms: expected 4 or, with running statistics, 8, got 3"),
    ({"norms": lambda n: [n[0][:2].contiguous(), *n[1:]]}, r"norms: expected shape \[3\], got \[2\]"),
    ({"strides": lambda s: s[:2]}, "strides: expected 3, got 2"),
    ({"strides": lambda s: [2, 0, 2]}, "strides: expected 1 to .*, got 0"),
    ({"epsilons": lambda e: []}, "epsilons: expected one per unit, got none"),
    ({"coefficients": lambda c: [1.0]}, "coefficients: expected 2, got 1"),
    ({"coefficients": lambda c: [1.0, 0.0]}, "coefficients: expected finite numbers, the second not 0, got 1 and 0"),
    ({"coefficients": lambda c: [float("nan"), 1.0]}, "coefficients: expected finite numbers"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    x, operands = BASIC.operands()
    arguments = {"x": x, **operands._asdict()}
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pathnet.cpu_fused_residual.default(*arguments.values())


def test_a_padding_skip_with_too_many_zeros_is_refused() -> None:
    x, operands = PAD.operands()
    with pytest.raises(RuntimeError, match="pad_before: expected 0 to 4, got 5"):
        cpu_fused_residual(x, operands._replace(pad_before=5))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda grad: grad[:1], r"grad: expected shape \[2, 6, 3, 3\], got \[1, 6, 3, 3\]"),
        (0, lambda grad: grad.bfloat16(), "grad: expected Float, got BFloat16"),
        (0, lambda grad: grad.contiguous(), "grad: expected a dense tensor in channels_last, got other strides"),
        (2, lambda inner: inner[1:].clone(), r"inner: expected shape \[108\], got \[107\]"),
        (2, lambda inner: inner.bfloat16(), "inner: expected Float, got BFloat16"),
        (3, lambda rows: rows[:1].clone(), r"statistics: expected shape \[2, 2, 6\], got \[1, 2, 6\]"),
        (3, lambda rows: rows.double(), "statistics: expected Float, got Double"),
    ],
)
def test_wrong_arguments_of_the_backward_op_are_named(index: int, change: Any, message: str) -> None:
    arguments = list(backward_arguments(BASIC))
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pathnet.cpu_fused_residual_backward.default(*arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_reach_the_results(value: float, running: bool, dtype: torch.dtype) -> None:
    case = replace(BASIC, running=running)
    x, operands = case.operands()
    (clean, _, _), grad, _ = measured(x.to(dtype), operands)
    assert clean.isfinite().all()
    x[1, 2, 3, 4] = value
    (output, _, _), _, (x_grad, *grads) = measured(x.to(dtype), operands)
    # Running statistics keep images apart; a minus infinity ends at the ReLU there, if the gain is positive.
    assert running or not output.isfinite().any()
    assert running or not x_grad[:, 2].isfinite().any()
    assert running or not grads[3][2].isfinite()
    if value != value:
        assert not output[1].isfinite().all() and not grads[3][2].isfinite()
    if running:
        assert torch.equal(output[0], clean[0])
    weight = operands.weights[1].clone()
    weight[1, 1, 1, 1] = value
    spoiled = operands._replace(weights=[operands.weights[0], weight, operands.weights[2]])
    assert not measured(case.operands()[0].to(dtype), spoiled)[0][0].isfinite().all()


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFF8000, 0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("isa", native.build_facts()["instruction_sets"] if native.LOADED else [])
def test_rounding_to_bfloat16_keeps_every_nan(pattern: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding by addition carries a NaN of ones over to zero: memory that some tools fill with ones."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    x, operands = BASIC.operands()
    weight = operands.weights[1].clone()
    weight.view(torch.int32)[0] = pattern
    assert weight[0].isnan().all()
    spoiled = operands._replace(weights=[operands.weights[0], weight, operands.weights[2]])
    (output, _, _), _, (x_grad, *_) = measured(x.bfloat16(), spoiled)
    assert output[:, 0].isnan().all() and not output[:, 1:].isnan().any()
    assert x_grad.isnan().any()


def test_an_interrupt_ends_either_pass() -> None:
    result = result_of("training")
    assert result["same"] and all(share < 0.5 for share in result["shares"].values()), result


def test_wrappers_convert_what_the_ops_refuse() -> None:
    x, operands = BASIC.operands()
    (output, inner, statistics), grad, grads = measured(x, operands)
    again = cpu_fused_residual_backward(grad.contiguous().double(), x, inner, statistics, operands)
    assert all(map(torch.equal, again, grads))
    assert torch.equal(cpu_fused_residual(x.contiguous(), operands)[0], output)
