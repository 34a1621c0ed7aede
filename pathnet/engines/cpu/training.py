"""The cpu engine's native ops of a training step, with their fakes and derivatives.

Derivatives are kernels of the dispatcher's autograd key on the native ops themselves, since a network of 54 blocks
pays for each microsecond of a call 54 times: `torch.library.register_autograd` takes 60 us more a block and step
(measured on one core, Zen 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowADInplaceOrView

from pathnet.engines.operands import BlockOperands
from pathnet.native import LOADED, interruptible

__all__ = ["MAX_SIZE", "cpu_fused_residual", "cpu_fused_residual_backward"]

MAX_SIZE = 1 << 15
"""Maximum number of channels, and maximum side, of an activation: ``kLargestSize`` in csrc/plan_checks.h."""

BATCHED = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor stands for many: of `torch.func.vmap`, and of autograd's ``is_grads_batched``."""


@interruptible
def cpu_fused_residual(x: Tensor, operands: BlockOperands) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``a skip(x) + c residual(x)`` of a chain of BN-ReLU-convolution units, differentiable once.

    Args:
        x: float32 or bfloat16 [B, C, H, W], not empty; copied if it is not dense in channels_last.
        operands: copied if they are not contiguous float32.

    Returns:
        The output [B, C', H', W'], in the type of ``x`` and channels_last; the inputs of all BNs but the first, in
        the type of ``x``, one [B, H, W, C] after the other, [elements]; and the mean and biased variance that each
        BN used, float32 [units, 2, widest].

    Raises:
        RuntimeError: an argument has another type or shape, or they contradict one another.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    weights, norms, *numbers = operands
    output, inner, statistics = torch.ops.pathnet.cpu_fused_residual.default(
        x, [_plain(weight) for weight in weights], [_plain(row) for row in norms], *numbers
    )
    return output, inner, statistics


def _plain(parameter: Tensor) -> Tensor:
    if parameter.dtype == torch.float32 and parameter.is_contiguous():
        return parameter
    return parameter.to(torch.float32).contiguous()


@interruptible
def cpu_fused_residual_backward(
    grad: Tensor, x: Tensor, inner: Tensor, statistics: Tensor, operands: BlockOperands
) -> list[Tensor]:
    """Compute the gradients of `cpu_fused_residual` at its input and parameters.

    Activations and ReLU bits are computed again from ``x`` and ``inner``.

    Args:
        grad: [B, C', H', W'], the gradient at the output; copied if it is not dense in channels_last.
        x: the input, as the op itself takes it: dense in channels_last.
        inner, statistics: results of the forward pass.
        operands: those of the forward pass, contiguous and float32.

    Returns:
        The gradient at ``x``, in its type and layout; and those of the weights, and of gain and bias of each unit,
        all float32 and contiguous.

    Raises:
        RuntimeError: an argument has another type or shape, or they contradict one another.
    """
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    grads: list[Tensor] = torch.ops.pathnet.cpu_fused_residual_backward.default(grad, x, inner, statistics, *operands)
    return grads


def _fake_forward(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[Tensor], strides: Sequence[int], *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    units = len(numbers[0])
    batch, channels, height, width = x.shape
    elements = 0
    for unit, (weight, stride) in enumerate(zip(weights[:units], strides, strict=False)):
        elements += batch * channels * height * width if unit else 0
        channels, height, width = weight.shape[0], -(-height // stride), -(-width // stride)
    return (
        x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2),
        x.new_empty(elements),
        x.new_empty(units, 2, max(weight.shape[1] for weight in weights[:units]), dtype=torch.float32),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    statistics: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    *numbers: Any,
) -> list[Tensor]:
    batch, channels, height, width = x.shape
    each = len(norms) // statistics.shape[0]
    affine = [row for index, row in enumerate(norms) if index % each < 2]
    like = [weight.new_empty(weight.shape) for weight in [*weights, *affine]]
    return [x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2), *like]


class _FusedResidual(torch.autograd.Function):
    """The forward op with its derivative.

    Its parameters are flat, since `torch.autograd.Function` finds tensors only there: `BlockOperands` without the
    tensors, the number of weights, the input, weights and norms.
    """

    @staticmethod
    def forward(
        ctx: Any, numbers: tuple[Any, ...], count: int, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _AutoDispatchBelowADInplaceOrView():
            output, inner, statistics = torch.ops.pathnet.cpu_fused_residual.default(
                x, parameters[:count], parameters[count:], *numbers
            )
        ctx.save_for_backward(x, inner, statistics, *parameters)
        ctx.numbers, ctx.count = numbers, count
        ctx.mark_non_differentiable(inner, statistics)
        ctx.set_materialize_grads(False)
        return output, inner, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if any(batched(grad) for batched in BATCHED):
            raise RuntimeError(
                "fused_residual: expected one gradient at the output, got a batch of them, as of is_grads_batched; "
                "differentiate the block's modules"
            )
        x, inner, statistics, *parameters = ctx.saved_tensors
        count, units = ctx.count, len(ctx.numbers[1])
        weights, norms = parameters[:count], parameters[count:]
        operands = BlockOperands(weights, norms, *ctx.numbers)
        x_grad, *grads = cpu_fused_residual_backward(grad, x, inner, statistics, operands)
        affine, running = iter(grads[count:]), [None] * (len(norms) // units - 2)
        norm_grads = [part for _ in range(units) for part in (next(affine), next(affine), *running)]
        return None, None, x_grad, *grads[:count], *norm_grads


class _FirstDerivatives(torch.autograd.Function):
    """The backward op, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *_: Tensor) -> tuple[Tensor, ...]:
        with _AutoDispatchBelowADInplaceOrView():
            return tuple(torch.ops.pathnet.cpu_fused_residual_backward.default(*arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            "fused_residual: expected first derivatives only; take second derivatives through the block's modules"
        )


def _differentiable(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[Tensor], *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.is_grad_enabled():
        with _AutoDispatchBelowADInplaceOrView():
            output, inner, statistics = torch.ops.pathnet.cpu_fused_residual.default(x, weights, norms, *numbers)
        return output, inner, statistics
    output, inner, statistics = _FusedResidual.apply(  # type: ignore[no-untyped-call]
        numbers, len(weights), x, *weights, *norms
    )
    return output, inner, statistics


def _differentiable_once(*arguments: Any) -> list[Tensor]:
    if not torch.is_grad_enabled():
        with _AutoDispatchBelowADInplaceOrView():
            grads: list[Tensor] = torch.ops.pathnet.cpu_fused_residual_backward.default(*arguments)
        return grads
    grad, x, inner, statistics, weights, norms, *_ = arguments
    tensors = grad, x, inner, statistics, *weights, *norms
    return list(_FirstDerivatives.apply(arguments, *tensors))  # type: ignore[no-untyped-call]


if LOADED:
    torch.library.register_fake("pathnet::cpu_fused_residual")(_fake_forward)
    torch.library.register_fake("pathnet::cpu_fused_residual_backward")(_fake_backward)
    KERNELS: Any = torch.library.Library("pathnet", "IMPL")  # type: ignore[no-untyped-call]
    KERNELS.impl("cpu_fused_residual", _differentiable, "Autograd")
    KERNELS.impl("cpu_fused_residual_backward", _differentiable_once, "Autograd")
