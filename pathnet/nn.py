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
from pathnet.engines.triton import MOST_ELEMENTS, check_sides, on_device
from pathnet.engines.triton.network import TritonNetwork, affine_of, block_network
from pathnet.models.residual_net import Block, FusedForm

__all__ = ["fused_residual"]

DTYPES = (torch.float32, torch.bfloat16)


def fused_residual(block: Block, x: Tensor, a: float = 1.0, c: float = 1.0) -> Tensor:
    """``a skip(x) + c residual(x)`` by fused BN-ReLU-convolution kernels, differentiable once.

    Within rounding of the block's own modules: statistics of the batch where its BNs are in training (running ones
    are then updated as `torch.nn.BatchNorm2d` does), running ones otherwise; products of bfloat16 numbers accumulated
    in float32 for bfloat16 ``x`` and under autocast, float32 accuracy for float32 ``x``. Stochastic depth and
    effective training (Veit et al. 2016, section 5) pass 0 for ``c`` where a module is not drawn: nothing of it runs
    then, forward or back, and its parameters get no gradient.

    Where Triton does not serve the device, the block's own modules run, with one warning a process.

    Args:
        block: one whose `form` is a `FusedForm`: pre-activation units of odd kernels whose padding keeps the side.
        x: float32 or bfloat16 [B, C, H, W], in any memory format.
        a, c: the coefficients of the skip and of the residual module, finite; not differentiated.

    Returns:
        [B, C', H', W'], channels last, in the type of ``x`` (under autocast in autocast's).

    Raises:
        ValueError: the block has no form for the kernels, its BNs are in training in part, ``x`` is not such a
            tensor, ``a`` or ``c`` not such a number, or autocast's type is not bfloat16.
    """
    if not isinstance(block, Block):
        raise ValueError(f"block: expected a pathnet Block, got {described(block)}")
    form = block.form()
    form = form if isinstance(form, FusedForm) else None
    _check(form, x)
    a, c = _number("a", a), _number("c", c)
    assert form is not None
    by_batch = _by_batch(form)
    if c == 0:
        with _own_types(x):
            return _scaled(block.skip(x), a)
    if not _serves(x.device.type):
        with _own_types(x):
            if a == 0:
                return _scaled(block.residual(x), c)
            # Together: what both hold, BN's statistics among it, is to run once.
            skip, residual = block.branches(x)
            return _scaled(skip, a) + _scaled(residual, c)
    _check_sizes(form, x, by_batch)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    norms, affines = [unit.bn for unit in form.units], [affine_of(unit) for unit in form.units]
    convolutions = [unit.conv for unit in form.units]
    if form.projection is not None and a != 0:
        convolutions.append(form.projection)
    output, statistics, *_ = torch.ops.pathnet.fused_residual(
        x,
        [conv.weight for conv in convolutions],
        [affine[0] for affine in affines],
        [affine[1] for affine in affines],
        [] if by_batch else [own for bn in norms for own in (bn.running_mean, bn.running_var)],
        [conv.stride[0] for conv in convolutions],
        [float(bn.eps) for bn in norms],
        [float(a), float(c)],
    )
    if by_batch:
        _update(norms, convolutions, statistics, x)
    return torch.as_tensor(output)


def _check(form: FusedForm | None, x: Tensor) -> None:
    reason = "it has no fused form" if form is None else unsupported_block(form)
    if reason is not None:
        raise ValueError(f"block: {reason}")
    assert form is not None
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


def _number(name: str, factor: float) -> float:
    if isinstance(factor, Tensor):
        raise ValueError(f"{name}: expected a finite Python number, got a tensor")
    return check_number(name, factor)


def _check_sizes(form: FusedForm, x: Tensor, by_batch: bool) -> None:
    """That each BN has what statistics are made of, and that every place in an activation has an int32 number."""
    batch, largest = x.shape[0], x[0].numel()
    height, width = x.shape[2:]
    for unit in form.units:
        if by_batch and batch * height * width == 1:
            got = f"{list(x.shape)}, which leaves one"
            raise ValueError(f"x: expected more than one value a channel at each BN in training, got shape {got}")
        height, width = (-(-side // unit.conv.stride[0]) for side in (height, width))
        largest = max(largest, unit.conv.out_channels * height * width)
    check_sides("x", x)
    if batch * largest >= MOST_ELEMENTS:
        raise ValueError(f"x: expected at most {(MOST_ELEMENTS - 1) // largest} images of this size, got {batch}")


def _by_batch(form: FusedForm) -> bool:
    """Whether BN's statistics are those of the batch; also where there are no others, as in torch."""
    own = [unit.bn.training or unit.bn.running_mean is None for unit in form.units]
    if any(own) and not all(own):
        raise ValueError("block: expected all of its BNs to take statistics of the batch, or none, got some that do")
    return own[0]


def _own_types(x: Tensor) -> AbstractContextManager[object]:
    """For the block's own modules, whose parameters are float32, on bfloat16 ``x``."""
    if x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else factor * x


@torch.no_grad()
def _update(
    norms: Sequence[nn.BatchNorm2d], convolutions: Sequence[nn.Conv2d], statistics: Tensor, x: Tensor
) -> None:
    """Running statistics, from float32 [units, 2, widest]: mean and biased variance of the batch."""
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
    """Whether the kernels run on devices of a type; if not, that is told once a process."""
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif device in ("cuda", "xpu") or _interpreted():
        return True
    else:
        reason = f"x is on {device}"
    _warn(reason)
    return False


# What torch.compiler.assume_constant_result does, without the second that it takes to import the compiler.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"fused_residual runs the block's own modules: {reason}", RuntimeWarning, stacklevel=4)


def _interpreted() -> bool:
    """Triton's kernels are run in Python, which tests do."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _network(
    x: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
) -> TritonNetwork:
    return block_network(x.shape[1:], x.dtype, weights, gains, biases, running, strides, epsilons)


@torch.library.custom_op("pathnet::fused_residual", mutates_args=())
def _fused_residual(
    x: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, statistics, and what the way back needs.

    Args:
        weights: of the units, then that of the projection where it takes part.
        running: mean and variance of each unit, or empty for those of the batch.
    """
    from pathnet.engines.triton.training import block_forward

    network = _network(x, weights, gains, biases, running, strides, epsilons)
    with on_device(x.device):
        made = block_forward(network, x, *coefficients)
    return made.output, made.statistics.clone(), made.bits, made.normalized, made.scales


@_fused_residual.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    network = _network(x, weights, gains, biases, running, strides, epsilons)
    batch, made, units = x.shape[0], network.blocks[0].made, len(gains)
    output = x.new_empty(batch, made.height, made.width, made.channels).permute(0, 3, 1, 2)
    return (
        output,
        x.new_empty(units, 2, network.widest, dtype=torch.float32),
        x.new_empty(network.bits_starts(batch)[-1], dtype=torch.uint8),
        x.new_empty(network.normalized_starts(batch)[-1]),
        x.new_empty(units, network.widest, dtype=torch.float32),
    )


@torch.library.custom_op("pathnet::fused_residual_backward", mutates_args=())
def _fused_residual_backward(
    grad: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    coefficients: Sequence[float],
    given: Sequence[int],
) -> list[Tensor]:
    """The gradients of the input, the weights, the gains and the biases; ``given`` is the shape of the input."""
    from pathnet.engines.triton.training import block_backward, kept_for

    bits, normalized, scales = kept
    network = _network(normalized.new_empty(1, *given[1:]), weights, gains, biases, running, strides, epsilons)
    own = kept_for(network, given[0], bits, normalized, scales)
    with on_device(grad.device):
        made, of_weights, affine = block_backward(network, own, grad.to(normalized.dtype), *coefficients)
    of_weights = [own.to(weight.dtype) for own, weight in zip(of_weights, weights, strict=True)]
    of_gains = [own[0].to(gain.dtype, copy=True) for own, gain in zip(affine, gains, strict=True)]
    of_biases = [own[1].to(bias.dtype, copy=True) for own, bias in zip(affine, biases, strict=True)]
    return [made, *of_weights, *of_gains, *of_biases]


@_fused_residual_backward.register_fake
def _(
    grad: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    coefficients: Sequence[float],
    given: Sequence[int],
) -> list[Tensor]:
    batch, channels, height, width = given
    made = kept[1].new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    of_weights = [weight.new_empty(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) for weight in weights]
    return [made, *of_weights, *map(torch.empty_like, (*gains, *biases))]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gains, biases, running, strides, epsilons, coefficients = inputs
    _, _, *kept = output
    ctx.counts = len(weights), len(gains), len(running)
    ctx.save_for_backward(*kept, *weights, *gains, *biases, *running)
    ctx.numbers = list(strides), list(epsilons), list(coefficients), list(x.shape)


def _back(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    weights, gains, running = ctx.counts
    saved = list(ctx.saved_tensors)
    parts = []
    for count in (3, weights, gains, gains, running):
        parts.append(saved[:count])
        saved = saved[count:]
    strides, epsilons, coefficients, given = ctx.numbers
    made = torch.ops.pathnet.fused_residual_backward(grad, *parts, strides, epsilons, coefficients, given)
    ends = 1, 1 + weights, 1 + weights + gains, 1 + weights + 2 * gains
    own = [list(made[first:last]) for first, last in zip(ends, ends[1:], strict=False)]
    return made[0], *own, [None] * running, None, None, None


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "fused_residual is differentiable once: take second derivatives through the block's own modules"
    )


_fused_residual_backward.register_autograd(_refuse)
_fused_residual.register_autograd(_back, setup_context=_keep)
