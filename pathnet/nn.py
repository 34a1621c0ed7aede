"""The fused residual block as a differentiable function, for training scripts."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import check_number, check_tensor, described
from pathnet.engines.forms import unsupported_block
from pathnet.engines.triton.launch import on_device
from pathnet.engines.triton.limits import MAX_ELEMENTS, check_sides
from pathnet.engines.triton.packing import block_network, norm_tensors
from pathnet.models.residual_net import Block, FusedForm

__all__ = ["fused_residual"]

DTYPES = (torch.float32, torch.bfloat16)


def fused_residual(block: Block, x: Tensor, a: float = 1.0, c: float = 1.0) -> Tensor:
    """Return ``a skip(x) + c residual(x)`` by fused BN-ReLU-convolution kernels, differentiable once.

    The result equals that of the block's modules within rounding. BNs in training use batch statistics, and their
    running statistics are updated as by `torch.nn.BatchNorm2d`; other BNs use running statistics. For
    bfloat16 ``x``, and under autocast, products of bfloat16 numbers are accumulated in float32; for float32 ``x`` the
    result is float32-accurate. Stochastic depth and effective training (Veit et al. 2016) pass 0 for ``c`` where a
    module is not drawn: then it runs neither forward nor backward, and its parameters get no gradient.

    On devices that Triton does not serve, the block's modules run, with one warning per process.

    Args:
        block: has a `FusedForm` as its `form`: pre-activation units of odd kernels whose padding keeps the side.
        x: float32 or bfloat16 [B, C, H, W], in any memory format.
        a: coefficient of the skip connection, a finite number; it gets no gradient.
        c: coefficient of the residual module, likewise.

    Returns:
        [B, C', H', W'], channels last, in the type of ``x``, or of autocast where it is active.

    Raises:
        ValueError: the kernels cannot run the block, only some of its BNs are in training, ``x``, ``a`` or ``c`` is
            not as above, or autocast's type is not bfloat16.

    Example:
        >>> import torch
        >>> from pathnet import models, nn
        >>> _ = torch.manual_seed(0)
        >>> block = models.preact_resnet(depth=14, width=8, in_channels=1).blocks[0]
        >>> x = torch.randn(4, 8, 8, 8, requires_grad=True)
        >>> y = nn.fused_residual(block.eval(), x, c=0.5)
        >>> torch.allclose(y, x + 0.5 * block.residual(x), atol=1e-5)
        True
    """
    if not isinstance(block, Block):
        raise ValueError(f"block: expected a pathnet Block, got {described(block)}")
    form = _checked_form(block, x)
    a, c = _number("a", a), _number("c", c)
    by_batch = _by_batch(form)
    if c == 0:
        with _autocast_for(x):
            return _scaled(block.skip(x), a)
    if not _serves(x.device.type):
        with _autocast_for(x):
            if a == 0:
                return _scaled(block.residual(x), c)
            # Together, so modules in both branches, and their BNs' statistics, run once.
            skip, residual = block.branches(x)
            return _scaled(skip, a) + _scaled(residual, c)
    _check_sizes(form, x, by_batch)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    norms, convolutions = [unit.bn for unit in form.units], [unit.conv for unit in form.units]
    if form.projection is not None and a != 0:
        convolutions.append(form.projection)
    output, statistics, *_ = torch.ops.pathnet.fused_residual(
        x,
        [conv.weight for conv in convolutions],
        [tensor for unit in form.units for tensor in norm_tensors(unit, by_batch)],
        [conv.stride[0] for conv in convolutions],
        [float(bn.eps) for bn in norms],
        [float(a), float(c)],
        form.pad_before,
    )
    if by_batch:
        _update(norms, convolutions, statistics, x)
    return torch.as_tensor(output)


def _checked_form(block: Block, x: Tensor) -> FusedForm:
    """Return the block's form.

    Raises:
        ValueError: the kernels cannot run the block, or ``x``.
    """
    form = block.form()
    if form is None:
        raise ValueError(f"block: {block.unfused_reason()}")
    if not isinstance(form, FusedForm):
        raise ValueError("block: expected a pre-activation block, got a post-activation one")
    reason = unsupported_block(form)
    if reason is not None:
        raise ValueError(f"block: {reason}")
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, Tensor) else described(x)
        raise ValueError(f"x: expected a float32 or bfloat16 tensor, got {got}")
    check_tensor("x", x)
    channels = form.units[0].bn.num_features
    if x.ndim != 4 or x.shape[1] != channels or x.numel() == 0:
        raise ValueError(f"x: expected shape [B, {channels}, H, W], not empty, got {list(x.shape)}")
    if x.device != form.units[0].conv.weight.device:
        raise ValueError(f"x: expected device {form.units[0].conv.weight.device} (the block's), got {x.device}")
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) not in DTYPES:
        got = torch.get_autocast_dtype(x.device.type)
        raise ValueError(f"x: expected autocast to torch.bfloat16 or none, got autocast to {got}")
    return form


def _number(name: str, factor: float) -> float:
    if isinstance(factor, Tensor):
        raise ValueError(f"{name}: expected a finite Python number, got a tensor")
    return check_number(name, factor)


def _check_sizes(form: FusedForm, x: Tensor, by_batch: bool) -> None:
    """Raise ValueError if a BN would see one value per channel, or int32 cannot number an activation's elements."""
    batch, largest = x.shape[0], x[0].numel()
    height, width = x.shape[2:]
    for unit in form.units:
        if by_batch and batch * height * width == 1:
            got = f"{list(x.shape)}, which leaves one"
            raise ValueError(f"x: expected more than one value per channel at each BN in training, got shape {got}")
        height, width = (-(-side // unit.conv.stride[0]) for side in (height, width))
        largest = max(largest, unit.conv.out_channels * height * width)
    check_sides("x", x)
    if batch * largest >= MAX_ELEMENTS:
        raise ValueError(f"x: expected at most {(MAX_ELEMENTS - 1) // largest} images of this size, got {batch}")


def _by_batch(form: FusedForm) -> bool:
    """Return whether BN's statistics are those of the batch; as in torch, they are for BNs that keep no others."""
    by_batch = [unit.bn.training or unit.bn.running_mean is None for unit in form.units]
    if any(by_batch) and not all(by_batch):
        raise ValueError("block: expected all of its BNs to take statistics of the batch, or none, got some that do")
    return by_batch[0]


def _autocast_for(x: Tensor) -> AbstractContextManager[object]:
    """Run the block's modules, whose parameters are float32, in the type of ``x``."""
    if x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else factor * x


@torch.no_grad()
def _update(
    norms: Sequence[nn.BatchNorm2d], convolutions: Sequence[nn.Conv2d], statistics: Tensor, x: Tensor
) -> None:
    """Update running statistics.

    Args:
        statistics: float32 [units, 2, widest], mean and biased variance of the batch.
    """
    height, width = x.shape[2:]
    for unit, (bn, conv) in enumerate(zip(norms, convolutions, strict=False)):
        count = x.shape[0] * height * width
        height, width = (-(-side // conv.stride[0]) for side in (height, width))
        if bn.running_mean is None or bn.running_var is None or bn.num_batches_tracked is None:
            continue
        if not (bn.training and bn.track_running_stats):
            continue
        bn.num_batches_tracked.add_(1)
        mean, variance = statistics[unit, :, : bn.num_features]
        share = 1.0 / bn.num_batches_tracked.float() if bn.momentum is None else bn.momentum
        bn.running_mean += share * (mean - bn.running_mean)
        bn.running_var += share * (variance * (count / max(1, count - 1)) - bn.running_var)


def _serves(device: str) -> bool:
    """Return whether the kernels run on devices of a type; if not, warn once per process."""
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif device in ("cuda", "xpu") or _interpreted():
        return True
    else:
        reason = f"x is on {device}"
    _warn(reason)
    return False


# As torch.compiler.assume_constant_result would mark it, without the second that importing the compiler takes.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"fused_residual runs the block's own modules: {reason}", RuntimeWarning, stacklevel=4)


def _interpreted() -> bool:
    """Return whether Triton interprets kernels in Python, as in tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)


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
