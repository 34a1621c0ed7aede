"""The fused block's operators: fakes, autograd, compilation and refusals."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.fused_blocks import FLOAT32, batch_for, block_of, compare, results, truth
from torch import Tensor, nn

import pathnet
from pathnet.models import Block, PreactBlock

fused_residual = partial(pathnet.nn.fused_residual, engine="triton")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"),
    pytest.mark.usefixtures("correct_interpreter", "big_tiles"),
]


def detached(arguments: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, arguments)


def operands(kind: str) -> tuple[PreactBlock, Tensor, tuple[Any, ...]]:
    """Return a block in training, a direction of its output, and the operator's arguments for it."""
    block, (x, direction) = block_of(kind, True), batch_for(kind, batch=2, side=5)
    weights = [conv.weight for conv in block.convs]
    strides = [conv.stride[0] for conv in block.convs]
    if block.projection is not None:
        weights, strides = [*weights, block.projection.weight], [*strides, block.projection.stride[0]]
    norms = [tensor for bn in block.bns for tensor in (bn.weight, bn.bias)]
    epsilons = [bn.eps for bn in block.bns]
    return block, direction, (x.requires_grad_(), weights, norms, strides, epsilons, [1.0, 1.0], block.pad_before)


def test_opcheck() -> None:
    operator = torch.ops.pathnet.fused_residual.default
    block, _, arguments = operands("basic-projection")
    torch.library.opcheck(operator, arguments)
    norms = [row for bn in block.bns for row in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    evaluated = (arguments[0].bfloat16(), arguments[1], norms, *arguments[3:])
    torch.library.opcheck(operator, evaluated, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_the_backward_pass() -> None:
    operator = torch.ops.pathnet.fused_residual_backward.default
    all_tests = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    for kind, tests in [("one-unit", all_tests), ("basic-projection", "test_faketensor")]:
        _, direction, arguments = operands(kind)
        _, _, *saved = torch.ops.pathnet.fused_residual(*arguments)
        # The record has BN's factors in place of epsilons.
        backward_arguments = direction, saved, *arguments[1:4], *arguments[5:], list(arguments[0].shape)
        torch.library.opcheck(operator, detached(backward_arguments), test_utils=tests)


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    """One graph, and the same numbers."""
    block, (x, direction) = block_of("basic-projection", training), batch_for("basic-projection", batch=2, side=5)
    compiled_block, leaf = copy.deepcopy(block), x.clone().requires_grad_()
    compiled = torch.compile(lambda x: fused_residual(compiled_block, x), backend="aot_eager", fullgraph=True)
    compare(results(compiled_block, leaf, direction, compiled(leaf)), truth(block, x, direction), FLOAT32)


def test_compiled_with_other_coefficients() -> None:
    """Each step of stochastic depth is one graph."""
    block, (x, _) = block_of("basic", True), batch_for("basic", batch=2, side=5)
    expected = copy.deepcopy(block)
    compiled = torch.compile(lambda x, a, c: fused_residual(block, x, a, c), backend="aot_eager", fullgraph=True)
    for a, c in [(1.0, 1.0), (1.0, 0.0), (0.5, 2.0), (1.0, 1.0)]:
        torch.testing.assert_close(compiled(x, a, c), fused_residual(expected, x, a, c))
    assert int(block.bns[0].num_batches_tracked) == 3


def test_two_derivatives_are_refused() -> None:
    block, (x, _) = block_of("basic", True), batch_for("basic", batch=2, side=5)
    (grad,) = torch.autograd.grad(fused_residual(block, x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_residual: expected first derivatives only"):
        torch.autograd.grad(grad.square().sum(), x)


def test_input_that_does_not_fit_is_told() -> None:
    block, (x, _) = block_of("basic", True), batch_for("basic")
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 4, H, W\], not empty, got \[3, 3, 7, 8\]"):
        fused_residual(block, x[:, :3])
    with pytest.raises(ValueError, match="x: expected a float32 or bfloat16 tensor, got torch.float64"):
        fused_residual(block, x.double())
    with pytest.raises(ValueError, match=r"x: expected more than one value per channel .* \[1, 4, 1, 1\]"):
        fused_residual(block, x[:1, :, :1, :1])
    strided = block_of("basic-projection", True)
    with pytest.raises(ValueError, match=r"x: expected more than one value per channel .* \[1, 3, 2, 2\]"):
        fused_residual(strided, x[:1, :3, :2, :2])
    with pytest.raises(ValueError, match="x: expected at most 524271 images of this size, got 524288"):
        fused_residual(block, x[:1, :, :1, :1].expand(1 << 19, 4, 32, 32))
    with pytest.raises(ValueError, match=r"x: expected sides of at most 524288 pixels .* \[1, 524289\]"):
        fused_residual(block, x[:1, :, :1, :1].expand(1, 4, 1, (1 << 19) + 1))
    with pytest.raises(ValueError, match="c: expected a finite Python number, got a tensor"):
        fused_residual(block, x, 1.0, torch.ones(()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a: expected a finite number, got inf"):
        fused_residual(block, x, float("inf"))
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="x: expected autocast to torch.bfloat16 or none, got .* torch.float16"),
    ):
        fused_residual(block, x)
    with pytest.raises(ValueError, match="block: its class Block defines no fused form"):
        fused_residual(Block(), x)
    block.convs[0] = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="block: it has a convolution with a bias"):
        fused_residual(block, x)
