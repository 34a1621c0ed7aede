"""The results of passes along a plan, in float64, by autograd through plain convolutions that share no code with the
kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.plans import (
    ACTIVATED,
    ACTIVATED_PAD,
    PAD,
    PROJECTION,
    Plan,
)
from pathnet.engines.tables import BlockColumn, UnitColumn


class _Rounded(torch.autograd.Function):
    """The identity, whose gradient is rounded to a sum of bfloat16 terms of 8 bits each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, terms: int) -> Tensor:
        ctx.terms = terms
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return in_terms(grad, ctx.terms), None


def in_terms(x: Tensor, terms: int) -> Tensor:
    """Return the sum of that many bfloat16 terms that is closest to each number, of any magnitude."""
    rest = x
    for _ in range(terms):
        mantissa, exponent = torch.frexp(rest)
        rest = rest - torch.ldexp(mantissa.bfloat16().double(), exponent)
    return x - rest


def truth_back(plan: Plan, bn: str, terms: int = 0) -> Tensor:
    """Return float64 [P, B, C, H, W]: backward passes by autograd through the linear map of the plan at its record.

    Args:
        terms: number of bfloat16 terms to which weights, and gradients that enter a convolution, are rounded; 0 for
            no rounding. The resulting error is the cost of such a precision.
    """
    exponent = plan.exponent if bn == "running" else plan.exponent[:1]
    grad = torch.ldexp(plan.grad.double(), exponent[:, None, None, None])
    scales = plan.scales.double()

    def normalized(u: int, x: Tensor) -> Tensor:
        values = plan.normalized[u]
        assert values is not None
        if bn == "batch":
            # The tangent map of (x - mean) / deviation, which is its own transpose.
            dims = (0, 2, 3)
            x = x - x.mean(dims, keepdim=True) - values * (x * values).mean(dims, keepdim=True)
        first = int(plan.units[u, UnitColumn.SCALES])
        return x * scales[first : first + x.shape[1], None, None]

    def rectified(u: int, x: Tensor) -> Tensor:
        bits = plan.bits[u]
        assert bits is not None
        return x * bits

    def convolved(u: int, x: Tensor) -> Tensor:
        y = convolution(plan, u, x, lambda weight: in_terms(weight, terms) if terms else weight)
        return _Rounded.apply(y, terms) if terms else y  # type: ignore[no-any-return, no-untyped-call]

    x = torch.zeros(
        len(grad),
        *plan.blocks[0, BlockColumn.CHANNELS : BlockColumn.OUT_CHANNELS].tolist(),
        dtype=torch.float64,
        requires_grad=True,
    )
    ends = [_walk(plan, x, path, normalized, rectified, convolved) for path in plan.routing.double().tolist()]
    return torch.stack([torch.autograd.grad(end, x, grad)[0] for end in ends])


@dataclass(frozen=True)
class Recorded:
    """A forward pass in float64: the output, and for each unit ReLU's input, and BN's output before weight and bias
    with its factors."""

    output: Tensor
    values: dict[int, Tensor]
    normalized: dict[int, Tensor]
    scales: dict[int, Tensor]


@torch.no_grad()
def truth_forward(plan: Plan, bn: str, routing: Tensor, dtype: torch.dtype = torch.float64) -> Recorded:
    """Return the pass under one routing [n, 2]; in float32 it measures rounding."""
    record = Recorded(torch.empty(0), {}, {}, {})

    def normalized(u: int, x: Tensor) -> Tensor:
        first = int(plan.units[u, UnitColumn.SCALES])
        channels = slice(first, first + x.shape[1])
        scale, shift = plan.scales.to(dtype)[channels], plan.shifts.to(dtype)[channels]
        if bn == "batch":
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            deviation = (variance + plan.epsilons.to(dtype)[u]).sqrt()
            x = record.normalized[u] = (x - mean) / deviation
            record.scales[u] = scale / deviation.flatten()
        return x * scale[:, None, None] + shift[:, None, None]

    def rectified(u: int, x: Tensor) -> Tensor:
        record.values[u] = x
        return x.relu()

    last = plan.blocks[:, BlockColumn.FIRST] + plan.blocks[:, BlockColumn.COUNT] - 1
    ends = {*plan.blocks[:, BlockColumn.PROJECTION].tolist(), *last.tolist()}

    def convolved(u: int, x: Tensor) -> Tensor:
        y = convolution(plan, u, x)
        first = int(plan.units[:u, UnitColumn.OUT_CHANNELS].sum())
        # Other biases belong into the shifts.
        biased = bn == "running" and u in ends
        return y + plan.biases.to(dtype)[first : first + y.shape[1], None, None] if biased else y

    output = _walk(plan, plan.y0.to(dtype), routing.double().tolist(), normalized, rectified, convolved)
    return replace(record, output=output)


def convolution(plan: Plan, u: int, x: Tensor, change: Any = lambda weight: weight) -> Tensor:
    row = plan.units[u].tolist()
    channels, kernel = (row[UnitColumn.OUT_CHANNELS], row[UnitColumn.CHANNELS]), row[UnitColumn.KERNEL]
    weight = plan.weights.to(x.dtype)[plan.weights_of(u)].reshape(*channels, kernel, kernel)
    return F.conv2d(x, change(weight), stride=row[UnitColumn.STRIDE], padding=row[UnitColumn.PADDING])


def _walk(
    plan: Plan, y: Tensor, path: list[tuple[float, float]], normalized: Any, rectified: Any, convolved: Any
) -> Tensor:
    def activated(u: int, x: Tensor) -> Tensor:
        scale, bits = plan.units[u, 10:].tolist()
        x = normalized(u, x) if scale >= 0 else x
        return torch.as_tensor(rectified(u, x) if bits >= 0 else x)

    for (first, count, kind, projection, *_, before), (a, c) in zip(plan.blocks.tolist(), path, strict=True):
        module = range(first, first + count)
        entered = activated(first, y)
        residual = entered
        for u in module:
            residual = convolved(u, entered if u == first else activated(u, residual))
        # Without a BN before its first convolution, one ends each branch.
        closed = plan.units[first, UnitColumn.SCALES] < 0
        if closed:
            residual = normalized(first + count, residual)
        if kind == PROJECTION:
            skip = convolved(projection, entered)
            skip = normalized(projection + 1, skip) if closed else skip
        else:
            pads = kind in (PAD, ACTIVATED_PAD)
            stride = math.prod(plan.units[first : first + count, UnitColumn.STRIDE].tolist()) if pads else 1
            added = residual.shape[1] - y.shape[1]
            # A skip after the ReLU starts from the output of the unit's BN, which is the identity there.
            passed = entered if kind in (ACTIVATED, ACTIVATED_PAD) else y
            skip = F.pad(passed[:, :, ::stride, ::stride], (0, 0, 0, 0, before, added - before))
        y = a * skip + c * residual
    return y
