"""Networks of BN-ReLU-conv units as the tables that native engines read; which networks those are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet.models.residual_net import Block, FusedForm, ResidualNet
from pathnet.record import BatchNormMode

__all__ = ["Tables", "blocks_of", "tables", "unsupported_block", "unsupported_form"]

IDENTITY, PROJECTION, PAD = 0, 1, 2

GROUP = 16
"""Channels whose ReLU bits lie together."""


@dataclass(frozen=True)
class Tables:
    """A network's blocks; `pathnet.native.cpu_pack` describes the columns.

    Attributes:
        blocks: int64 [n, 10]
        units: int64 [U, 12]; the offsets of bits are those of unit after unit, as the cpu engine records them.
        weights: float32, the convolutions' weights one after the other.
        scales: float32, BN's factor for each channel of each unit's input, unit after unit: in BN mode ``running``
            weight / deviation, in ``batch`` the weight.
        shifts: float32, what BN adds, in the same order.
        epsilons: float32 [U], what BN adds to the variance; 0 for a projection.
    """

    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor
    shifts: Tensor
    epsilons: Tensor


def blocks_of(net: ResidualNet) -> Iterator[Block]:
    return iter(net.blocks)  # type: ignore[arg-type]


def unsupported_form(net: ResidualNet, bn: BatchNormMode) -> str | None:
    """Why there are no tables of a network, or None."""
    for index, block in enumerate(blocks_of(net)):
        form = block.fused_form()
        if form is None:
            return f"block {index + 1} has no fused form"
        for conv in _convolutions(form):
            reason = _unsupported(conv)
            if reason is not None:
                return f"block {index + 1} has a convolution {reason}"
        if bn == "running" and any(unit.bn.running_var is None for unit in form.units):
            return f"block {index + 1} keeps no running statistics"
    return None


def unsupported_block(form: FusedForm) -> str | None:
    """Why kernels for convolutions that keep the side have no form for a block, or None."""
    for conv in _convolutions(form):
        reason = _unsupported(conv)
        if reason is None and (conv.kernel_size[0] % 2 == 0 or int(conv.padding[0]) != conv.kernel_size[0] // 2):
            reason = "that changes the side by more than its stride"
        if reason is not None:
            return f"it has a convolution {reason}"
    if form.projection is not None and form.projection.kernel_size[0] != 1:
        return "it has a projection with a kernel larger than 1"
    return None


def _unsupported(conv: nn.Conv2d) -> str | None:
    if not _plain(conv):
        return "that is grouped, dilated or not square"
    if conv.bias is not None:
        return "with a bias"
    if int(conv.padding[0]) >= conv.kernel_size[0]:
        return "whose padding reaches beyond its kernel"
    return None


def tables(net: ResidualNet, bn: BatchNormMode, y0_shape: Sequence[int]) -> Tables:
    """The tables of a network without `unsupported_form`, for inputs [C, H, W] of its first block; on the CPU."""
    builder = _Builder(bn)
    shape = tuple(y0_shape)
    for block in blocks_of(net):
        form = block.fused_form()
        assert form is not None
        shape = builder.add(form, shape)
    return builder.tables()


def _convolutions(form: FusedForm) -> list[nn.Conv2d]:
    convolutions = [unit.conv for unit in form.units]
    return convolutions if form.projection is None else [*convolutions, form.projection]


def _plain(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.stride[0] == conv.stride[1]
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.padding[0] == conv.padding[1]
    )


class _Builder:
    def __init__(self, bn: BatchNormMode) -> None:
        self.bn = bn
        self.blocks: list[list[int]] = []
        self.units: list[list[int]] = []
        self.weights: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.shifts: list[Tensor] = []
        self.epsilons: list[float] = []
        self.bits_size = 0

    def add(self, form: FusedForm, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One block for an input of ``shape`` (C, H, W); returns that of its output."""
        first, out = len(self.units), shape
        for unit in form.units:
            own = out
            out = self._add_unit(unit.conv, own, sum(map(len, self.scales)), self.bits_size)
            scale, shift = _affine(unit.bn, self.bn)
            self.scales.append(scale)
            self.shifts.append(shift)
            self.epsilons.append(unit.bn.eps)
            self.bits_size += math.prod(own[1:]) * -(-own[0] // GROUP) * GROUP // 8
        count, projection = len(self.units) - first, -1
        if form.projection is not None:
            projection = len(self.units)
            self._add_unit(form.projection, shape, -1, -1)
            self.epsilons.append(0.0)
        skip = PROJECTION if form.projection is not None else PAD if form.pad else IDENTITY
        self.blocks.append([first, count, skip, projection, *shape, *out])
        return out

    def _add_unit(
        self, conv: nn.Conv2d, shape: tuple[int, ...], scale_offset: int, bits_offset: int
    ) -> tuple[int, ...]:
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        out = (conv.out_channels, *((side + 2 * padding - kernel) // stride + 1 for side in shape[1:]))
        weight_offset = sum(map(len, self.weights))
        self.units.append([*shape, *out, kernel, stride, padding, weight_offset, scale_offset, bits_offset])
        self.weights.append(conv.weight.detach().flatten().cpu())
        return out

    def tables(self) -> Tables:
        return Tables(
            torch.tensor(self.blocks, dtype=torch.int64),
            torch.tensor(self.units, dtype=torch.int64),
            torch.cat(self.weights),
            torch.cat(self.scales),
            torch.cat(self.shifts),
            torch.tensor(self.epsilons, dtype=torch.float32),
        )


def _affine(bn: nn.BatchNorm2d, mode: BatchNormMode) -> tuple[Tensor, Tensor]:
    """float32 [C] twice: what BN multiplies by and adds, in mode ``running`` its statistics included."""
    weight, bias = (
        torch.full((bn.num_features,), default) if own is None else own.detach().cpu().double()
        for own, default in ((bn.weight, 1.0), (bn.bias, 0.0))
    )
    if mode == "running":
        assert bn.running_var is not None and bn.running_mean is not None
        weight = weight / (bn.running_var.cpu().double() + bn.eps).sqrt()
        bias = bias - bn.running_mean.cpu().double() * weight
    return weight.float(), bias.float()
