"""Random plans, as the cpu engine's ops take them, and what must come out: float64, by autograd through plain
convolutions that share no code with the kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet.engines.cpu import ops

Shape = tuple[int, int, int]  # channels, height, width
Convolution = tuple[int, int, int, int]  # output channels, kernel, stride, padding

IDENTITY, PROJECTION, PAD, ACTIVATED, ACTIVATED_PAD = range(5)
BEFORE_RELU, BEHIND_RELU = (IDENTITY, PROJECTION, PAD), (PROJECTION, ACTIVATED, ACTIVATED_PAD)
GROUP = 16


@dataclass(frozen=True)
class Plan:
    """A network's tables and everything that a walk through it takes; see `pathnet.native`.

    ``bits`` and ``normalized``, float64 [B, C, H, W] of each unit, are as random as the weights: a walk back is a
    linear map for any of them.
    """

    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor
    shifts: Tensor
    epsilons: Tensor
    biases: Tensor
    bits: list[Tensor | None]
    normalized: list[Tensor | None]
    y0: Tensor
    grad: Tensor
    exponent: Tensor
    routing: Tensor

    @property
    def least_values(self) -> int:
        """Of a channel, over the batch, at the input of the BN that has fewest."""
        return min(len(own) * own[0, 0].numel() for own in self.normalized if own is not None)

    def weights_of(self, unit: int) -> slice:
        row = self.units[unit].tolist()
        return slice(row[9], row[9] + row[0] * row[3] * row[6] ** 2)

    def without_samples(self) -> Plan:
        bits, normalized = ([None if x is None else x[:0] for x in xs] for xs in (self.bits, self.normalized))
        return replace(self, bits=bits, normalized=normalized, y0=self.y0[:0], grad=self.grad[:0])

    def relu_bits(self) -> Tensor:
        """uint8 [B, bytes]: of each unit [H, W, groups], two bytes each, the first channel lowest."""
        rows = torch.zeros(len(self.y0), bits_size(self.units), dtype=torch.uint8)
        for unit, own in zip(self.units.tolist(), self.bits, strict=True):
            if own is not None:
                packed = np.packbits(by_pixel(own).numpy().astype(bool), axis=3, bitorder="little")
                end = unit[11] + math.prod(packed.shape[1:])
                rows[:, unit[11] : end] = torch.from_numpy(packed).flatten(1)
        return rows

    def pack(self, backward: bool, fold_scales: bool, bf16: bool = False) -> Tensor:
        return ops.cpu_pack(self.blocks, self.units, self.weights, self.scales, backward, fold_scales, bf16)

    def backward_arguments(self, bn: str, bf16: bool = False, gradients: bool = True) -> tuple[Any, ...]:
        """Of `ops.cpu_backward_running` or, in BN mode ``batch``, `ops.cpu_backward_batch`."""
        exponent = self.exponent[: len(self.grad) if bn == "running" else 1]
        tables = self.grad, exponent, self.routing, self.blocks, self.units
        if bn == "running":
            return *tables, self.pack(True, True, bf16), self.relu_bits(), gradients
        rows = torch.cat([by_pixel(own).flatten() for own in self.normalized if own is not None]).float()
        return *tables, self.pack(True, False, bf16), self.relu_bits(), rows, self.scales, gradients

    def sums_arguments(self, bn: str, bf16: bool = False, gradients: bool = True) -> tuple[Any, ...]:
        """Of `ops.cpu_sums_by_length_running` or `ops.cpu_sums_by_length_batch`, with the last routing."""
        grad, exponent, routings, *rest = self.backward_arguments(bn, bf16, gradients)
        return grad, exponent, routings[-1].contiguous(), *rest

    def forward_arguments(self, bn: str, record: bool = False) -> tuple[Any, ...]:
        epsilons = (self.biases,) if bn == "running" else (self.epsilons,)
        routing = torch.ones_like(self.routing[:1]) if record else self.routing
        given = self.y0, routing, self.blocks, self.units, self.scales, self.shifts, *epsilons
        return *given, self.pack(False, False), record


BACKWARD = {"running": ops.cpu_backward_running, "batch": ops.cpu_backward_batch}
SUMS = {"running": ops.cpu_sums_by_length_running, "batch": ops.cpu_sums_by_length_batch}
FORWARD = {"running": ops.cpu_forward_running, "batch": ops.cpu_forward_batch}


def walked(plan: Plan, bn: str, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """The kernels' gradients as float64 [P, B, C, H, W] and norms [P, B]."""
    norms, grad, exponent = BACKWARD[bn](*plan.backward_arguments(bn, bf16))
    return torch.ldexp(grad.double(), exponent[:, :, None, None, None]), norms


def by_pixel(x: Tensor) -> Tensor:
    """[B, H, W, C filled up with zeros to groups of 16] of [B, C, H, W]."""
    return F.pad(x.permute(0, 2, 3, 1), (0, -x.shape[1] % GROUP))


def bits_size(units: Tensor) -> int:
    own = units[units[:, 11] >= 0]
    ends = own[:, 11] + own[:, 1] * own[:, 2] * ((own[:, 0] + GROUP - 1) // GROUP) * 2
    return max(ends.tolist(), default=0)


# Truths.


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
    """The sum of so many bfloat16 terms that comes next to a number, of whatever magnitude."""
    rest = x
    for _ in range(terms):
        mantissa, exponent = torch.frexp(rest)
        rest = rest - torch.ldexp(mantissa.bfloat16().double(), exponent)
    return x - rest


def truth_back(plan: Plan, bn: str, terms: int = 0) -> Tensor:
    """float64 [P, B, C, H, W]: the walks back, by autograd through the linear map that the plan is around its record.

    Args:
        terms: bfloat16 terms that every gradient which enters a convolution, and every weight, is rounded to; 0 for
            no rounding. How far that leads astray is what such a precision costs.
    """
    exponent = plan.exponent if bn == "running" else plan.exponent[:1]
    grad = torch.ldexp(plan.grad.double(), exponent[:, None, None, None])
    scales = plan.scales.double()

    def normalized(u: int, x: Tensor) -> Tensor:
        own = plan.normalized[u]
        assert own is not None
        if bn == "batch":
            # The tangent map of (x - mean) / deviation, which is its own transpose.
            dims = (0, 2, 3)
            x = x - x.mean(dims, keepdim=True) - own * (x * own).mean(dims, keepdim=True)
        first = int(plan.units[u, 10])
        return x * scales[first : first + x.shape[1], None, None]

    def rectified(u: int, x: Tensor) -> Tensor:
        bits = plan.bits[u]
        assert bits is not None
        return x * bits

    def convolved(u: int, x: Tensor) -> Tensor:
        y = convolution(plan, u, x, lambda weight: in_terms(weight, terms) if terms else weight)
        return _Rounded.apply(y, terms) if terms else y  # type: ignore[no-any-return, no-untyped-call]

    x = torch.zeros(len(grad), *plan.blocks[0, 4:7].tolist(), dtype=torch.float64, requires_grad=True)
    ends = [_walk(plan, x, path, normalized, rectified, convolved) for path in plan.routing.double().tolist()]
    return torch.stack([torch.autograd.grad(end, x, grad)[0] for end in ends])


@dataclass(frozen=True)
class Recorded:
    """A forward pass in float64: the output, of each unit what entered its ReLU, and of its BN what it gave before
    weight and bias, and the factors."""

    output: Tensor
    values: dict[int, Tensor]
    normalized: dict[int, Tensor]
    scales: dict[int, Tensor]


@torch.no_grad()
def truth_forward(plan: Plan, bn: str, routing: Tensor, dtype: torch.dtype = torch.float64) -> Recorded:
    """The pass under one routing [n, 2]; in float32 it tells what rounding alone comes to."""
    record = Recorded(torch.empty(0), {}, {}, {})

    def normalized(u: int, x: Tensor) -> Tensor:
        first = int(plan.units[u, 10])
        own = slice(first, first + x.shape[1])
        scale, shift = plan.scales.to(dtype)[own], plan.shifts.to(dtype)[own]
        if bn == "batch":
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            deviation = (variance + plan.epsilons.to(dtype)[u]).sqrt()
            x = record.normalized[u] = (x - mean) / deviation
            record.scales[u] = scale / deviation.flatten()
        return x * scale[:, None, None] + shift[:, None, None]

    def rectified(u: int, x: Tensor) -> Tensor:
        record.values[u] = x
        return x.relu()

    ends = {*plan.blocks[:, 3].tolist(), *(plan.blocks[:, 0] + plan.blocks[:, 1] - 1).tolist()}

    def convolved(u: int, x: Tensor) -> Tensor:
        y = convolution(plan, u, x)
        first = int(plan.units[:u, 3].sum())
        # Of the others it belongs into the shift.
        biased = bn == "running" and u in ends
        return y + plan.biases.to(dtype)[first : first + y.shape[1], None, None] if biased else y

    output = _walk(plan, plan.y0.to(dtype), routing.double().tolist(), normalized, rectified, convolved)
    return replace(record, output=output)


def convolution(plan: Plan, u: int, x: Tensor, change: Any = lambda weight: weight) -> Tensor:
    row = plan.units[u].tolist()
    weight = plan.weights.to(x.dtype)[plan.weights_of(u)].reshape(row[3], row[0], row[6], row[6])
    return F.conv2d(x, change(weight), stride=row[7], padding=row[8])


def _walk(
    plan: Plan, y: Tensor, path: list[tuple[float, float]], normalized: Any, rectified: Any, convolved: Any
) -> Tensor:
    def activated(u: int, x: Tensor) -> Tensor:
        scale, bits = plan.units[u, 10:].tolist()
        x = normalized(u, x) if scale >= 0 else x
        return torch.as_tensor(rectified(u, x) if bits >= 0 else x)

    for (first, count, kind, projection, *_), (a, c) in zip(plan.blocks.tolist(), path, strict=True):
        own = range(first, first + count)
        entered = activated(first, y)
        residual = entered
        for u in own:
            residual = convolved(u, entered if u == first else activated(u, residual))
        # Without a BN before its first convolution, one ends each branch.
        closed = plan.units[first, 10] < 0
        if closed:
            residual = normalized(first + count, residual)
        if kind == PROJECTION:
            skip = convolved(projection, entered)
            skip = normalized(projection + 1, skip) if closed else skip
        else:
            pads = kind in (PAD, ACTIVATED_PAD)
            stride = math.prod(plan.units[first : first + count, 7].tolist()) if pads else 1
            # Behind the ReLU lies what comes out of the unit's BN, which there is the identity.
            passed = entered if kind in (ACTIVATED, ACTIVATED_PAD) else y
            skip = F.pad(passed[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, residual.shape[1] - y.shape[1]))
        y = a * skip + c * residual
    return y


# Random plans.


def random_plan(seed: int, wide: bool = False, kinds: Sequence[int] = BEFORE_RELU, closed: bool = False) -> Plan:
    """One to four blocks of any kernels, paddings ("same" or not), strides, widths, odd sides and skips.

    Args:
        wide: up to 70 channels in one or two blocks, sides of 1 to 19 and 32; otherwise up to 8, sides of 1 to 11.
        kinds: of the skips. Where they lie behind the ReLU those of some heights begin without one.
        closed: whether a BN ends each branch, and none stands before its first convolution.
    """
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 4))
    count = int(rng.integers(1, 3 if wide else 5))
    channels = int(rng.choice([3, 16, 17, 33, 48, 64, 65, 70])) if wide else int(rng.integers(1, 8))
    sides = [1, 2, 7, 8, 13, 16, 19, 32] if wide else [*range(1, 12)]
    most = 32 if channels <= 17 else 19 if channels <= 33 else 8
    height, width = (int(rng.choice([side for side in sides if side <= most])) for _ in range(2))
    return make_plan(rng, batch, (channels, height, width), count, wide, kinds, closed)


def make_plan(
    rng: np.random.Generator,
    batch: int,
    shape: Shape,
    count: int,
    wide: bool = False,
    kinds: Sequence[int] = BEFORE_RELU,
    closed: bool = False,
) -> Plan:
    """A chain of ``count`` blocks from ``shape`` on, with skips of these kinds; the rest as in `random_plan`."""
    rows: list[list[int]] = []
    blocks: list[list[int]] = []
    for _ in range(count):
        convs, kind, skip = random_block(rng, shape, wide, kinds)
        first, before = len(rows), shape
        for conv in convs:
            rows.append([*shape, *output_shape(shape, conv), *conv[1:]])
            shape = output_shape(shape, conv)
        end = [[*shape, *shape, 0, 1, 0]] if closed else []
        rows += end
        blocks.append([first, len(convs), kind, -1 if skip is None else len(rows), *before, *shape])
        if skip is not None:
            rows += [[*before, *shape, *skip[1:]], *end]
    opens = kinds == BEHIND_RELU and rows[0][1] % 4 == 0
    if opens:
        blocks[0][2] = {ACTIVATED: IDENTITY, ACTIVATED_PAD: PAD}.get(blocks[0][2], blocks[0][2])
    return plan_of(rng, batch, torch.tensor(blocks), rows, opens)


def plan_of(rng: np.random.Generator, batch: int, blocks: Tensor, rows: list[list[int]], opens: bool = False) -> Plan:
    """Random numbers for blocks and units, the latter without offsets; where the network opens, its first unit has no
    ReLU."""
    projections = {*blocks[:, 3].tolist()}
    ends = {u for u, row in enumerate(rows) if row[6] == 0}
    begins = {*blocks[:, 0].tolist()} if ends else set()
    without_bn, without_relu = projections | begins, projections | ends | ({0} if opens else set())
    units, weights, bits, normalized = [], [], [], []
    weight_end = scale_end = bits_end = 0
    for u, row in enumerate(rows):
        size, fan_in = row[3] * row[0] * row[6] ** 2, row[0] * row[6] ** 2
        bits_offset = -1 if u in without_relu else bits_end
        units.append([*row, weight_end, -1 if u in without_bn else scale_end, bits_offset])
        weights.append(rng.normal(size=size) / math.sqrt(max(fan_in, 1)))
        weight_end += size
        bits.append(None)
        normalized.append(None)
        if u not in without_relu:
            # At times a gap, since a unit's bits may begin at any even byte.
            bits_end += row[1] * row[2] * -(-row[0] // GROUP) * 2 + 2 * int(rng.integers(0, 2))
            bits[-1] = torch.from_numpy(rng.random((batch, *row[:3])) < 0.6).double()
        if u not in without_bn:
            scale_end += row[0]
            normalized[-1] = floats(rng.normal(size=(batch, *row[:3]))).double()
    scales, shifts = floats(rng.normal(size=scale_end)), floats(rng.normal(size=scale_end))
    for first, _, kind, *_ in blocks.tolist():
        if kind in (ACTIVATED, ACTIVATED_PAD) and first not in begins:
            # What lies behind such a block's first ReLU lies behind that alone.
            begin = units[first][10]
            scales[begin : begin + units[first][0]], shifts[begin : begin + units[first][0]] = 1, 0
    return Plan(
        blocks,
        torch.tensor(units),
        floats(np.concatenate(weights)),
        scales,
        shifts,
        floats(rng.uniform(1e-5, 1e-3, len(units))),
        floats(rng.normal(size=sum(row[3] for row in rows))),
        bits,
        normalized,
        floats(rng.normal(size=(batch, *blocks[0, 4:7].tolist()))),
        floats(rng.normal(size=(batch, *blocks[-1, 7:].tolist()))),
        torch.from_numpy(rng.integers(-40, 40, batch).astype(np.int32)),
        random_routings(rng, len(blocks)),
    )


def floats(x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(x).float()


def random_routings(rng: np.random.Generator, n: int) -> Tensor:
    """float32 [9, n, 2]: lengths 0 and n, a path twice, tails and heads in common, absent branches, any others."""
    codes = rng.integers(0, 2, (6, n))
    codes[0], codes[1], codes[3] = 0, 1, codes[2]
    codes[4, n // 2 :] = codes[2, n // 2 :]
    codes[5, : n // 2] = codes[2, : n // 2]
    others = rng.normal(size=(3, n, 2))
    others[0, n // 2 :] = others[1, n // 2 :]
    others[1, 0, 0] = 0
    others[2, ::2, 1] = 0
    return floats(np.concatenate([np.stack([1 - codes, codes], 2), others]))


def random_block(
    rng: np.random.Generator, shape: Shape, wide: bool, kinds: Sequence[int]
) -> tuple[list[Convolution], int, Convolution | None]:
    """A chain of convolutions, the kind of skip and the projection's."""
    kind = int(rng.choice(kinds))
    while True:
        convs = [random_convolution(rng, wide) for _ in range(rng.integers(1, 4))]
        convs[-1] = (shape[0] + int(rng.integers(0, 2)), *convs[-1][1:])
        shapes = list(itertools.accumulate(convs, output_shape, initial=shape))
        if min(map(min, shapes)) < 1 or max(shapes[-1][1:]) > max(11, *shape[1:]):
            continue
        skips = [conv for own, conv in admitted_skips(shape, shapes[-1], convs) if own == kind]
        if skips:
            return convs, kind, skips[rng.integers(len(skips))]


def random_convolution(rng: np.random.Generator, wide: bool) -> Convolution:
    kernel = int(rng.choice([1, 2, 3, 3, 5]))
    channels = int(rng.choice([4, 15, 16, 40, 64, 70])) if wide else int(rng.integers(1, 8))
    return channels, kernel, int(rng.choice([1, 1, 1, 2])), int(rng.integers(0, kernel))


def output_shape(shape: Shape, conv: Convolution) -> Shape:
    channels, kernel, stride, padding = conv
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in shape[1:])
    return channels, height, width


def admitted_skips(shape: Shape, out: Shape, convs: list[Convolution]) -> list[tuple[int, Convolution | None]]:
    stride = math.prod(conv[2] for conv in convs)
    skips: list[tuple[int, Convolution | None]] = [(IDENTITY, None), (ACTIVATED, None)] if shape == out else []
    for kernel, own, padding in itertools.product((1, 2, 3), {1, stride}, (0, 1, 2)):
        if padding < kernel and output_shape(shape, (out[0], kernel, own, padding)) == out:
            skips.append((PROJECTION, (out[0], kernel, own, padding)))
    if out[0] >= shape[0] and out[1:] == tuple(-(-side // stride) for side in shape[1:]):
        skips += [(PAD, None), (ACTIVATED_PAD, None)]
    return skips
