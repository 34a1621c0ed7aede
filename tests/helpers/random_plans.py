"""Random plans: any kernels, strides, widths, sides and skips that the cpu engine's ops take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.plans import (
    ACTIVATED,
    ACTIVATED_PAD,
    BEFORE_RELU,
    BEHIND_RELU,
    IDENTITY,
    PAD,
    PROJECTION,
    Plan,
)
from pathnet.engines.tables import GROUP, BlockColumn, UnitColumn

Shape = tuple[int, int, int]
"""Channels, height and width."""

Convolution = tuple[int, int, int, int]
"""Output channels, kernel, stride and padding."""


def random_plan(seed: int, wide: bool = False, kinds: Sequence[int] = BEFORE_RELU, closed: bool = False) -> Plan:
    """Return one to four blocks of any kernels, paddings ("same" or not), strides, widths, odd sides and skips.

    Args:
        wide: up to 70 channels in one or two blocks, sides of 1 to 19 and 32; otherwise up to 8, sides of 1 to 11.
        kinds: kinds of skips. If they start after the ReLU, networks of some heights begin without one.
        closed: whether a BN ends each branch, and none precedes its first convolution.
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
    """Return a chain of ``count`` blocks from ``shape`` on, with skips of these kinds; other arguments as in
    `random_plan`."""
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
        # Every other padding skip adds its channel in front.
        pads = shape[0] - before[0] if kind in (PAD, ACTIVATED_PAD) and len(blocks) % 2 == 0 else 0
        blocks.append([first, len(convs), kind, -1 if skip is None else len(rows), *before, *shape, pads])
        if skip is not None:
            rows += [[*before, *shape, *skip[1:]], *end]
    opens = kinds == BEHIND_RELU and rows[0][1] % 4 == 0
    if opens:
        kind = blocks[0][BlockColumn.SKIP]
        blocks[0][BlockColumn.SKIP] = {ACTIVATED: IDENTITY, ACTIVATED_PAD: PAD}.get(kind, kind)
    return plan_of(rng, batch, torch.tensor(blocks), rows, opens)


def plan_of(rng: np.random.Generator, batch: int, blocks: Tensor, rows: list[list[int]], opens: bool = False) -> Plan:
    """Return a plan with random numbers for blocks, and units without offsets.

    Args:
        opens: whether the first unit has no ReLU.
    """
    projections = {*blocks[:, BlockColumn.PROJECTION].tolist()}
    ends = {u for u, row in enumerate(rows) if row[UnitColumn.KERNEL] == 0}
    begins = {*blocks[:, BlockColumn.FIRST].tolist()} if ends else set()
    without_bn, without_relu = projections | begins, projections | ends | ({0} if opens else set())
    units, weights, bits, normalized = [], [], [], []
    weight_end = scale_end = bits_end = 0
    for u, row in enumerate(rows):
        channels, height, width = row[: UnitColumn.OUT_CHANNELS]
        fan_in = channels * row[UnitColumn.KERNEL] ** 2
        size = row[UnitColumn.OUT_CHANNELS] * fan_in
        bits_offset = -1 if u in without_relu else bits_end
        units.append([*row, weight_end, -1 if u in without_bn else scale_end, bits_offset])
        weights.append(rng.normal(size=size) / math.sqrt(max(fan_in, 1)))
        weight_end += size
        bits.append(None)
        normalized.append(None)
        if u not in without_relu:
            # At times a gap, since a unit's bits may begin at any even byte.
            bits_end += height * width * -(-channels // GROUP) * 2 + 2 * int(rng.integers(0, 2))
            bits[-1] = torch.from_numpy(rng.random((batch, channels, height, width)) < 0.6).double()
        if u not in without_bn:
            scale_end += channels
            normalized[-1] = floats(rng.normal(size=(batch, channels, height, width))).double()
    scales, shifts = floats(rng.normal(size=scale_end)), floats(rng.normal(size=scale_end))
    for first, _, kind, *_ in blocks.tolist():
        if kind in (ACTIVATED, ACTIVATED_PAD) and first not in begins:
            # A skip that starts after such a block's first ReLU follows only that.
            begin = units[first][UnitColumn.SCALES]
            part = slice(begin, begin + units[first][UnitColumn.CHANNELS])
            scales[part], shifts[part] = 1, 0
    return Plan(
        blocks,
        torch.tensor(units),
        floats(np.concatenate(weights)),
        scales,
        shifts,
        floats(rng.uniform(1e-5, 1e-3, len(units))),
        floats(rng.normal(size=sum(row[UnitColumn.OUT_CHANNELS] for row in rows))),
        bits,
        normalized,
        floats(rng.normal(size=(batch, *blocks[0, BlockColumn.CHANNELS : BlockColumn.OUT_CHANNELS].tolist()))),
        floats(rng.normal(size=(batch, *blocks[-1, BlockColumn.OUT_CHANNELS : BlockColumn.PAD_BEFORE].tolist()))),
        torch.from_numpy(rng.integers(-40, 40, batch).astype(np.int32)),
        random_routings(rng, len(blocks)),
    )


def floats(x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(x).float()


def random_routings(rng: np.random.Generator, n: int) -> Tensor:
    """Return float32 [9, n, 2]: lengths 0 and n, a path twice, common tails and heads, absent branches, others."""
    codes = rng.integers(0, 2, (6, n))
    codes[0], codes[1], codes[3] = 0, 1, codes[2]
    codes[4, n // 2 :] = codes[2, n // 2 :]
    codes[5, : n // 2] = codes[2, : n // 2]
    any_factors = rng.normal(size=(3, n, 2))
    any_factors[0, n // 2 :] = any_factors[1, n // 2 :]
    any_factors[1, 0, 0] = 0
    any_factors[2, ::2, 1] = 0
    return floats(np.concatenate([np.stack([1 - codes, codes], 2), any_factors]))


def random_block(
    rng: np.random.Generator, shape: Shape, wide: bool, kinds: Sequence[int]
) -> tuple[list[Convolution], int, Convolution | None]:
    """Return a chain of convolutions, the kind of skip and the projection, if any."""
    kind = int(rng.choice(kinds))
    while True:
        convs = [random_convolution(rng, wide) for _ in range(rng.integers(1, 4))]
        convs[-1] = (shape[0] + int(rng.integers(0, 2)), *convs[-1][1:])
        shapes = list(itertools.accumulate(convs, output_shape, initial=shape))
        if min(map(min, shapes)) < 1 or max(shapes[-1][1:]) > max(11, *shape[1:]):
            continue
        skips = [conv for skip, conv in admitted_skips(shape, shapes[-1], convs) if skip == kind]
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
    for kernel, skip_stride, padding in itertools.product((1, 2, 3), {1, stride}, (0, 1, 2)):
        if padding < kernel and output_shape(shape, (out[0], kernel, skip_stride, padding)) == out:
            skips.append((PROJECTION, (out[0], kernel, skip_stride, padding)))
    if out[0] >= shape[0] and out[1:] == tuple(-(-side // stride) for side in shape[1:]):
        skips += [(PAD, None), (ACTIVATED_PAD, None)]
    return skips
