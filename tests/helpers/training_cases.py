"""Blocks of awkward shapes for the cpu engine's training ops, and their results in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet.engines.cpu.training import cpu_fused_residual, cpu_fused_residual_backward
from pathnet.engines.operands import BlockOperands

__all__ = ["CASES", "TrainingCase", "forward_truth", "frozen_gradients", "measured", "relu_bits"]

Skip = Literal["identity", "projection", "pad", "none"]

WIDTHS = (1, 3, 5, 8, 12, 16, 17, 32, 48, 64)
SIDES = ((1, 1), (2, 2), (5, 5), (7, 7), (8, 8), (12, 12), (16, 16), (30, 30), (32, 32), (7, 12), (1, 9), (5, 2))
COEFFICIENTS = ((1.0, 1.0), (0.5, -3.0), (1.0, 1.0), (-2.0, 1e-3), (1.0, 1.0))
MOST_ELEMENTS = 12_000
"""Maximum number of elements of an activation, for quick tests."""


@dataclass(frozen=True)
class TrainingCase:
    """A block and a batch.

    Attributes:
        x: [B, C, H, W]
        kernels, widths, strides: those of the units.
        skip: the skip connection; ``none`` for a coefficient of 0.
        running: whether BNs use running statistics.
        coefficients: a and c.
    """

    x: tuple[int, int, int, int]
    kernels: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    skip: Skip
    running: bool
    coefficients: tuple[float, float] = (1.0, 1.0)

    def __str__(self) -> str:
        units = ",".join(f"{k}x{w}/{s}" for k, w, s in zip(self.kernels, self.widths, self.strides, strict=True))
        return f"{'x'.join(map(str, self.x))}-{units}-{self.skip}-{'running' if self.running else 'batch'}"

    def operands(self) -> tuple[Tensor, BlockOperands]:
        """Return a float32 input in channels_last, and operands with gains of both signs, and one of 0."""
        generator = torch.Generator().manual_seed(sum(self.x) + 7 * sum(self.widths) + 31 * len(self.kernels))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, channels, height, width = self.x
        x = (normal(batch, height, width, channels) + 0.5 * normal(channels)).permute(0, 3, 1, 2)
        weights, norms, inputs = [], [], channels
        for kernel, outputs in zip(self.kernels, self.widths, strict=True):
            weights.append(normal(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel * kernel))
            gain = 1 + 0.5 * normal(inputs)
            if inputs > 1:
                gain[inputs // 2] = 0.0
            norms += [gain, 0.3 * normal(inputs)]
            norms += [0.3 * normal(inputs), 0.5 + normal(inputs).square()] if self.running else []
            inputs = outputs
        strides = list(self.strides)
        if self.skip == "projection":
            weights.append(normal(inputs, channels, 1, 1) / math.sqrt(channels))
            strides.append(math.prod(self.strides))
        before = (inputs - channels) // 2 if self.skip == "pad" else 0
        epsilons = [1e-5 * (unit + 1) for unit in range(len(self.kernels))]
        a, c = self.coefficients
        numbers = strides, epsilons, [0.0 if self.skip == "none" else a, c], before
        return x, BlockOperands(weights, norms, *numbers)


def _cases() -> Iterator[TrainingCase]:
    """Yield blocks of every kind, whose widths, sides, batches and coefficients take turns."""
    kinds: list[Callable[[int], tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Skip]]] = [
        lambda c: ((3, 3), (c, c), (1, 1), "identity"),
        lambda c: ((3, 3), (2 * c, 2 * c), (2, 1), "projection"),
        lambda c: ((3, 3), (c + 3, c + 3), (2, 1), "pad"),
        lambda c: ((1, 3, 1), (max(1, c // 4), max(1, c // 4), c), (1, 1, 1), "identity"),
        lambda c: ((1, 3, 1), (c, c + 1, 2 * c), (1, 3, 1), "projection"),
        lambda c: ((3,), (c,), (1,), "none"),
        lambda c: ((5, 3), (c + 1, c), (1, 1), "identity"),
        lambda c: ((3, 1), (c + 2, c + 4), (1, 2), "pad"),
    ]
    number = 0
    for turn, kind in enumerate(kinds):
        for index, channels in enumerate(WIDTHS):
            height, width = SIDES[(index + 5 * turn) % len(SIDES)]
            kernels, widths, strides, skip = kind(channels)
            largest = max(channels, *widths) * height * width
            batch = next(size for size in (9, 2, 1) if size * largest <= MOST_ELEMENTS or size == 1)
            if largest > 2 * MOST_ELEMENTS:
                height, width = 8, 7
            number += 1
            # With few values a channel, a batch's BN makes nearly all gradients cancel.
            values = batch * math.prod(-(-side // math.prod(strides)) for side in (height, width))
            running = number % 3 == 0 or values < (4 if channels > 1 else 32)
            coefficients = COEFFICIENTS[number % len(COEFFICIENTS)]
            yield TrainingCase(
                (batch, channels, height, width), kernels, widths, strides, skip, running, coefficients
            )


CASES = list(_cases())


def relu_bits(
    case: TrainingCase, x: Tensor, inner: Tensor, statistics: Tensor, operands: BlockOperands
) -> list[Tensor]:
    """Return the bits of each unit's ReLU, float64 [B, C, H, W], by what the engine recorded."""
    inputs, bits, start = [x.double()], [], 0
    batch, _, height, width = x.shape
    for outputs, stride in list(zip(case.widths, case.strides, strict=True))[:-1]:
        height, width = -(-height // stride), -(-width // stride)
        size = batch * height * width * outputs
        row = inner[start : start + size].reshape(batch, height, width, outputs)
        inputs.append(row.permute(0, 3, 1, 2).double())
        start += size
    assert start == inner.numel()
    each = len(operands.norms) // len(inputs)
    for unit, y in enumerate(inputs):
        gain, bias = (row.double() for row in operands.norms[unit * each :][:2])
        mean, variance = statistics[unit, :, : y.shape[1]].double()
        normalized = (y - mean[:, None, None]) * torch.rsqrt(variance + operands.epsilons[unit])[:, None, None]
        bits.append((normalized * gain[:, None, None] + bias[:, None, None] > 0).double())
    return bits


class Rounded(torch.autograd.Function):
    """Rounding to bfloat16 of a value, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().to(grad.dtype)


def _block(
    case: TrainingCase,
    x: Tensor,
    operands: BlockOperands,
    relu: Callable[[int, Tensor], Tensor],
    rounded: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return a block's output, and mean and biased variance of each BN.

    Args:
        rounded: applied to what products, and BNs, take and return.
    """
    units = len(case.kernels)
    each = len(operands.norms) // units
    a, c = operands.coefficients
    weights = [rounded(weight) for weight in operands.weights]
    y, first, statistics = x, x, []
    for unit in range(units):
        gain, bias, *running = operands.norms[unit * each : (unit + 1) * each]
        mean, variance = running or (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False))
        statistics.append((mean, variance))
        scale = gain / torch.sqrt(variance + operands.epsilons[unit])
        normalized = rounded((y - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None])
        activation = relu(unit, normalized)
        first = activation if unit == 0 else first
        y = rounded(F.conv2d(activation, weights[unit], None, case.strides[unit], case.kernels[unit] // 2))
    if case.skip == "none":
        return c * y, statistics
    if case.skip == "projection":
        return a * rounded(F.conv2d(first, weights[-1], None, operands.strides[-1])) + c * y, statistics
    stride, added = math.prod(case.strides), case.widths[-1] - x.shape[1]
    before = operands.pad_before
    return a * F.pad(x[..., ::stride, ::stride], (0, 0, 0, 0, before, added - before)) + c * y, statistics


def _typed(operands: BlockOperands, dtype: torch.dtype) -> BlockOperands:
    weights, norms = ([tensor.to(dtype) for tensor in tensors] for tensors in operands[:2])
    return operands._replace(weights=weights, norms=norms)


def forward_truth(
    case: TrainingCase, x: Tensor, operands: BlockOperands, autocast: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return a block's output, and mean and variance of each BN, in float64; see `frozen_gradients`."""
    rounded = Rounded.apply if autocast else lambda x: x
    return _block(case, x.double(), _typed(operands, torch.float64), lambda unit, y: torch.relu(y), rounded)


def frozen_gradients(
    case: TrainingCase, x: Tensor, operands: BlockOperands, bits: list[Tensor], grad: Tensor, autocast: bool = False
) -> list[Tensor]:
    """Return float64 gradients at the input, at each weight, and at gain and bias of each unit, by autograd.

    ReLUs multiply by bits, so one bit that rounding flips does not decide.

    Args:
        autocast: whether to round where autocast to bfloat16 does. Not by autocast itself, whose convolutions of
            few pixels return NaN now and then (oneDNN in torch 2.13).
    """
    typed = _typed(operands, torch.float64)
    each = len(typed.norms) // len(case.kernels)
    affine = [row for index, row in enumerate(typed.norms) if index % each < 2]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x.double(), *typed.weights, *affine)]
    weights, rows = leaves[1 : 1 + len(typed.weights)], iter(leaves[1 + len(typed.weights) :])
    norms = [next(rows) if index % each < 2 else row for index, row in enumerate(typed.norms)]
    typed = typed._replace(weights=weights, norms=norms)
    rounded = Rounded.apply if autocast else lambda x: x
    output, _ = _block(case, rounded(leaves[0]), typed, lambda unit, y: y * bits[unit], rounded)
    return list(torch.autograd.grad(output, leaves, grad.double()))


def measured(x: Tensor, operands: BlockOperands) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, list[Tensor]]:
    """Return the forward op's results, a direction of the output, and the backward op's gradients along it."""
    with torch.no_grad():
        output, inner, statistics = cpu_fused_residual(x, operands)
        generator = torch.Generator().manual_seed(5)
        grad = torch.randn(output.permute(0, 2, 3, 1).shape, generator=generator).to(x.dtype).permute(0, 3, 1, 2)
        return (output, inner, statistics), grad, cpu_fused_residual_backward(grad, x, inner, statistics, operands)
