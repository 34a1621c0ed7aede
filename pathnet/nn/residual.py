"""The fused residual block as a differentiable function, for training scripts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pathnet.checks import check_number, check_tensor, described, one_of
from pathnet.engines.cpu.training import MAX_SIZE
from pathnet.engines.triton.limits import MAX_ELEMENTS, MAX_SIDE
from pathnet.models.residual_net import Block
from pathnet.nn.parts import FusedParts, fused_parts
from pathnet.nn.serving import FusedEngine, Kernels, run, serving, warn

__all__ = ["DTYPES", "fused_residual", "fused_skip", "run_fused", "transformed", "unfit", "unfit_size"]

DTYPES = (torch.float32, torch.bfloat16)
LARGEST, SMALLEST = float(torch.finfo(torch.float32).max), 2.0**-150
"""Magnitudes between which float32 holds a number as neither infinity nor 0, the bounds of rounding included."""


def fused_residual(block: Block, x: Tensor, a: float = 1.0, c: float = 1.0, engine: FusedEngine = "auto") -> Tensor:
    """Return ``a skip(x) + c residual(x)`` by fused BN-ReLU-convolution kernels, differentiable once.

    The result equals that of the block's modules within rounding. BNs in training use batch statistics, and their
    running statistics are updated as by `torch.nn.BatchNorm2d`; other BNs use running statistics. For
    bfloat16 ``x``, and under autocast, products of bfloat16 numbers are accumulated in float32; for float32 ``x`` the
    result is float32-accurate. Stochastic depth and effective training (Veit et al. 2016) pass 0 for ``c`` where a
    module is not drawn: then it runs neither forward nor backward, and its parameters get no gradient.

    The kernels are native code on a CPU, with float32 weights, and Triton's on a GPU. Where neither serves, and
    in `torch.func` and forward-mode differentiation, the block's modules run, with one warning for each reason and
    process. `fuse` runs all blocks of a network so.

    Args:
        block: has a `FusedForm` as its `form`: pre-activation units of odd kernels whose padding keeps the side.
        x: float32 or bfloat16 [B, C, H, W], in any memory format; channels_last is not copied on a CPU.
        a: coefficient of the skip connection, a number that is finite in float32; it gets no gradient.
        c: coefficient of the residual module, likewise.
        engine: ``auto``, ``cpu``, ``triton``, or ``none`` for the block's modules.

    Returns:
        [B, C', H', W'], channels last, in the type of ``x``, or of autocast where it is active.

    Raises:
        ValueError: the kernels cannot run the block, only some of its BNs are in training, a module of the block has
            hooks, ``x``, ``a`` or ``c`` is not as above, or autocast's type is not bfloat16.

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
    one_of("engine", engine, FusedEngine)
    parts = fused_parts(block)
    if isinstance(parts, str):
        raise ValueError(f"block: {parts}")
    problem = unfit(parts, check_tensor("x", x))
    if problem is not None:
        raise ValueError(problem)
    a, c = _number("a", a), _number("c", c)
    kernels, reason = serving(engine, x.device.type)
    transformation = transformed()
    if transformation is not None:
        kernels, reason = None, transformation
    if c == 0:
        skip = fused_skip(kernels, parts, x)
        if skip is not None and a != 0:
            return run_fused("cpu", skip, x, 0.0, a)
        with _autocast_for(x):
            return _scaled(block.skip(x), a)
    if kernels is None:
        if engine != "none":
            warn(reason)
        return _by_modules(block, x, a, c)
    problem = unfit_size(parts, x, kernels)
    if problem is not None:
        raise ValueError(problem)
    return run_fused(kernels, parts, x, a, c)


def transformed() -> str | None:
    """Return why an active transformation of PyTorch's needs modules, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "torch.func differentiates modules alone"
    return "forward-mode differentiation takes modules alone" if forward_ad._current_level >= 0 else None


def fused_skip(kernels: Kernels | None, parts: FusedParts, x: Tensor) -> FusedParts | None:
    """Return the parts of a projection that kernels run without the residual module, or None.

    That saves time on a CPU. On a GPU it would compile further kernels for some launches of small ones.
    """
    if kernels != "cpu" or parts.skip is None or unfit_size(parts.skip, x, kernels) is not None:
        return None
    return parts.skip


def run_fused(kernels: Kernels, parts: FusedParts, x: Tensor, a: float, c: float) -> Tensor:
    """Return a block's output by kernels that can run it, and update its running statistics."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    output, statistics = run(kernels, x, parts.operands(a, c))
    if parts.by_batch:
        parts.running.update(statistics, x.shape)
    return output


def unfit(parts: FusedParts, x: Tensor) -> str | None:
    """Return the error of an input that kernels cannot run a block for, its size aside; or None."""
    weight, channels = parts.convs[0].weight, parts.norms[0].num_features
    if weight.dtype not in DTYPES:
        return f"block: expected float32 or bfloat16 parameters, got {weight.dtype}"
    if x.dtype not in DTYPES or x.layout != torch.strided:
        return f"x: expected a float32 or bfloat16 tensor, got {x.dtype}"
    if x.ndim != 4 or x.shape[1] != channels or x.numel() == 0:
        return f"x: expected shape [B, {channels}, H, W], not empty, got {list(x.shape)}"
    if x.device != weight.device:
        return f"x: expected device {weight.device} (the block's), got {x.device}"
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) not in DTYPES:
        return f"x: expected autocast to torch.bfloat16 or none, got autocast to {torch.get_autocast_dtype(kind)}"
    return None


def unfit_size(parts: FusedParts, x: Tensor, kernels: Kernels) -> str | None:
    """Return the error of an input [B, C, H, W] whose size kernels cannot run a block for; or None.

    A BN that takes statistics of the batch must see more than one value a channel, native code bounds each size, and
    Triton's kernels number an activation's elements in int32.
    """
    batch, largest = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    height, width = x.shape[2:]
    for conv, stride in zip(parts.convs, parts.strides, strict=True):
        if parts.by_batch and batch * height * width == 1:
            got = f"{list(x.shape)}, which leaves one"
            return f"x: expected more than one value per channel at each BN in training, got shape {got}"
        height, width = -(-height // stride), -(-width // stride)
        largest = max(largest, conv.out_channels * height * width)
    if kernels == "cpu":
        size = max(*x.shape[1:], *[conv.out_channels for conv in parts.convs])
        return f"x: expected sizes of at most {MAX_SIZE} for the cpu engine, got {size}" if size > MAX_SIZE else None
    if max(x.shape[2:]) > MAX_SIDE:
        return f"x: expected sides of at most {MAX_SIDE} pixels for the triton engine, got {list(x.shape[2:])}"
    if batch * largest >= MAX_ELEMENTS:
        return f"x: expected at most {(MAX_ELEMENTS - 1) // largest} images of this size, got {batch}"
    return None


def _by_modules(block: Block, x: Tensor, a: float, c: float) -> Tensor:
    with _autocast_for(x):
        if a == 0:
            return _scaled(block.residual(x), c)
        # Together, so modules in both branches, and their BNs' statistics, run once.
        skip, residual = block.branches(x)
        return _scaled(skip, a) + _scaled(residual, c)


def _number(name: str, factor: float) -> float:
    """Return a coefficient, 0 if float32 rounds it to 0."""
    if isinstance(factor, Tensor):
        raise ValueError(f"{name}: expected a finite Python number, got a tensor")
    number = check_number(name, factor)
    if abs(number) > LARGEST:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {number:g}")
    return number if abs(number) > SMALLEST else 0.0


def _autocast_for(x: Tensor) -> AbstractContextManager[object]:
    """Run the block's modules, whose parameters are float32, in the type of ``x``."""
    if x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else factor * x
