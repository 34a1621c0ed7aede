"""The fused residual block as a differentiable operator, by Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pathnet.engines.operands import BlockOperands
from pathnet.engines.triton.launch import on_device
from pathnet.engines.triton.packing import block_network

__all__ = ["triton_fused_residual"]


def triton_fused_residual(x: Tensor, operands: BlockOperands) -> tuple[Tensor, Tensor]:
    """Compute ``a skip(x) + c residual(x)`` of a chain of BN-ReLU-convolution units, differentiable once.

    Args:
        x: float32 or bfloat16 [B, C, H, W], in any memory format, on a device that Triton serves.

    Returns:
        The output [B, C', H', W'], in the type of ``x`` and channels_last; and the mean and biased variance that each
        BN used, float32 [units, 2, widest].
    """
    output, statistics, *_ = torch.ops.pathnet.fused_residual(x, *operands)
    return output, statistics


@torch.library.custom_op("pathnet::fused_residual", mutates_args=())
def _fused_residual(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    coefficients: Sequence[float],
    pad_before: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, statistics, and the backward pass's inputs: ReLU bits, x_hat and BN's factors.

    Args:
        weights: those of the units, then the projection's if it is used.
        norms: the `norm_tensors` of each unit, one after the other.
        strides: those of ``weights``.
        epsilons: that of each unit's BN.
        coefficients: a and c.
        pad_before: number of zero channels that a skip connection without projection adds before the input's.
    """
    from pathnet.engines.triton.training import block_forward

    network = block_network(x.shape[1:], x.dtype, weights, norms, strides, epsilons, pad_before)
    with on_device(x.device):
        result = block_forward(network, x, *coefficients)
    return result.output, result.statistics.clone(), result.bits, result.normalized, result.scales


@_fused_residual.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    coefficients: Sequence[float],
    pad_before: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    network = block_network(x.shape[1:], x.dtype, weights, norms, strides, epsilons, pad_before)
    batch, shape, units = x.shape[0], network.blocks[0].output, len(epsilons)
    return (
        x.new_empty(batch, shape.height, shape.width, shape.channels).permute(0, 3, 1, 2),
        x.new_empty(units, 2, network.widest, dtype=torch.float32),
        x.new_empty(network.bits_starts(batch)[-1], dtype=torch.uint8),
        x.new_empty(network.normalized_starts(batch)[-1]),
        x.new_empty(units, network.widest, dtype=torch.float32),
    )


@torch.library.custom_op("pathnet::fused_residual_backward", mutates_args=())
def _fused_residual_backward(
    grad: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    coefficients: Sequence[float],
    pad_before: int,
    x_shape: Sequence[int],
) -> list[Tensor]:
    """Return the gradients of the input, of each weight, and of each unit's gain and bias."""
    from pathnet.engines.triton.training import block_backward, saved_for

    bits, normalized, scales = saved
    # Epsilons are not read, since the record has BN's factors.
    network = block_network(x_shape[1:], normalized.dtype, weights, norms, strides, [0.0] * len(scales), pad_before)
    record = saved_for(network, x_shape[0], bits, normalized, scales)
    with on_device(grad.device):
        x_grad, weight_grads, affine_grads = block_backward(network, record, grad.to(normalized.dtype), *coefficients)
    results = [weight_grad.to(weight.dtype) for weight_grad, weight in zip(weight_grads, weights, strict=True)]
    for norm, grads in zip(_affine_pairs(norms, len(scales)), affine_grads, strict=True):
        results += [row.to(tensor.dtype, copy=True) for row, tensor in zip(grads, norm, strict=True)]
    return [x_grad, *results]


def _affine_pairs(norms: Sequence[Tensor], units: int) -> list[Sequence[Tensor]]:
    """Return gain and bias of each unit."""
    each = len(norms) // units
    return [norms[unit * each : unit * each + 2] for unit in range(units)]


@_fused_residual_backward.register_fake
def _(
    grad: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    coefficients: Sequence[float],
    pad_before: int,
    x_shape: Sequence[int],
) -> list[Tensor]:
    batch, channels, height, width = x_shape
    x_grad = saved[1].new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    weight_grads = [weight.new_empty(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) for weight in weights]
    affine = [tensor for pair in _affine_pairs(norms, len(saved[2])) for tensor in pair]
    return [x_grad, *weight_grads, *map(torch.empty_like, affine)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, norms, strides, epsilons, coefficients, pad_before = inputs
    _, _, *saved = output
    ctx.counts = len(saved), len(weights), len(norms)
    ctx.save_for_backward(*saved, *weights, *norms)
    ctx.numbers = list(strides), list(epsilons), list(coefficients), pad_before, list(x.shape)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    saved, weights, norms = ([next(tensors) for _ in range(count)] for count in ctx.counts)
    strides, epsilons, coefficients, pad_before, x_shape = ctx.numbers
    x_grad, *grads = torch.ops.pathnet.fused_residual_backward(
        grad, saved, weights, norms, strides, coefficients, pad_before, x_shape
    )
    running = [None] * (len(norms) // len(epsilons) - 2)
    affine_grads = iter(grads[len(weights) :])
    norm_grads = [part for _ in epsilons for part in (next(affine_grads), next(affine_grads), *running)]
    return x_grad, grads[: len(weights)], norm_grads, None, None, None, None


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "fused_residual: expected first derivatives only; take second derivatives through the block's modules"
    )


_fused_residual_backward.register_autograd(_refuse)
_fused_residual.register_autograd(_backward, setup_context=_save)
