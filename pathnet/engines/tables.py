"""Networks of BN-ReLU-conv units as the tables that native engines read.

Post-activation networks use the same tables, with block boundaries at the additions: the ReLU after an addition is
the ReLU of the next block's first unit, which has no BN, and that block's skip starts after this ReLU; the network's
first unit has no ReLU. In BN mode ``running`` the last BN of a module, and a projection's, are folded into the
preceding convolution's weights and a bias; in ``batch`` each is a row without a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn

from pathnet.models.residual_net import Form, FusedForm, PostActivationForm, ResidualNet
from pathnet.recording import BatchNormMode

__all__ = [
    "GROUP",
    "BlockColumn",
    "Skip",
    "Tables",
    "UnitColumn",
    "affine_behind",
    "scaled",
    "tables",
]

GROUP = 16
"""Number of channels whose ReLU bits are stored together."""


class Skip(IntEnum):
    """The kinds of skip connections; the activated ones start after the first unit's ReLU."""

    IDENTITY = 0
    PROJECTION = 1
    PAD = 2
    ACTIVATED = 3
    ACTIVATED_PAD = 4


class BlockColumn(IntEnum):
    """The columns of `Tables.blocks`.

    ``FIRST`` is the row of the first unit, ``COUNT`` the number of units, ``PROJECTION`` the row of the projection or
    -1. The sizes are those of the block's input and output. ``PAD_BEFORE`` is the number of zero channels that a
    padding skip adds before those of the input, 0 for other skips.
    """

    FIRST = 0
    COUNT = 1
    SKIP = 2
    PROJECTION = 3
    CHANNELS = 4
    HEIGHT = 5
    WIDTH = 6
    OUT_CHANNELS = 7
    OUT_HEIGHT = 8
    OUT_WIDTH = 9
    PAD_BEFORE = 10


class UnitColumn(IntEnum):
    """The columns of `Tables.units`.

    The sizes are those of the input and output. ``WEIGHTS`` and ``SCALES`` are offsets in elements, ``BITS`` is one
    in bytes of a sample's row. ``SCALES`` is -1 where no batch normalisation stands before the convolution, ``BITS``
    is -1 where no ReLU does; ``KERNEL`` is 0 in the row of a batch normalisation that no convolution follows.
    """

    CHANNELS = 0
    HEIGHT = 1
    WIDTH = 2
    OUT_CHANNELS = 3
    OUT_HEIGHT = 4
    OUT_WIDTH = 5
    KERNEL = 6
    STRIDE = 7
    PADDING = 8
    WEIGHTS = 9
    SCALES = 10
    BITS = 11


@dataclass(frozen=True)
class Tables:
    """A network as integer tables, one row per block and per unit, and the parameters that they index.

    Attributes:
        blocks: int64 [n, 11], see `BlockColumn`.
        units: int64 [U, 12], see `UnitColumn`; bits are stored unit after unit, as the cpu engine records them.
        weights: float32, the convolutions' weights one after the other.
        scales: float32, BN's factor for each channel of each unit's input, unit after unit: in BN mode ``running``
            weight / deviation, in ``batch`` the weight.
        shifts: float32, BN's shift, in the same order.
        epsilons: float32 [U], BN's epsilon; 0 where there is no BN.
        biases: float32, unit after unit the bias added after its convolution [out]; empty where there is none.
    """

    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor
    shifts: Tensor
    epsilons: Tensor
    biases: Tensor


def tables(net: ResidualNet, bn: BatchNormMode, y0_shape: Sequence[int]) -> Tables:
    """Return the tables of a network, on the CPU.

    Args:
        net: a network for which `pathnet.engines.forms.unsupported_form` returns None.
        y0_shape: [C, H, W], the shape of its first block's input.
    """
    builder, shape = _Builder(bn), tuple(y0_shape)
    for block in net:
        form = block.form()
        assert form is not None
        shape = builder.add_post(form, shape) if isinstance(form, PostActivationForm) else builder.add(form, shape)
    return builder.tables()


Norm = tuple[int, float]
"""The offset of a BN's factors, and its epsilon."""

NO_BN: Norm = (-1, 0.0)


class _Builder:
    def __init__(self, bn: BatchNormMode) -> None:
        self.bn = bn
        self.blocks: list[list[int]] = []
        self.units: list[list[int]] = []
        self.weights: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.shifts: list[Tensor] = []
        self.epsilons: list[float] = []
        self.biases: list[Tensor] = []
        self.bits_size = 0

    def add(self, form: FusedForm, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Add a block for an input of ``shape`` (C, H, W); return its output's shape."""
        first, out = len(self.units), shape
        for unit in form.units:
            out = self._add_conv(unit.conv, unit.conv.weight, out, self._add_bn(unit.bn), relu=True)
        projection = -1 if form.projection is None else len(self.units)
        if form.projection is not None:
            self._add_conv(form.projection, form.projection.weight, shape)
        skip = Skip.PROJECTION if form.projection is not None else Skip.PAD if form.pad else Skip.IDENTITY
        self._add_block(form, first, skip, projection, shape, out)
        return out

    def add_post(self, form: PostActivationForm, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Add a post-activation block for an input of ``shape`` (C, H, W); return its output's shape."""
        first = len(self.units)
        # The network's first block reads its input as it is, whether it comes out of a ReLU or not.
        relu = first > 0
        add = self._add_post_running if self.bn == "running" else self._add_post_batch
        out, projection = add(form, shape, relu)
        identity, pad = (Skip.ACTIVATED, Skip.ACTIVATED_PAD) if relu else (Skip.IDENTITY, Skip.PAD)
        skip = Skip.PROJECTION if projection >= 0 else pad if form.pad else identity
        self._add_block(form, first, skip, projection, shape, out)
        return out

    def _add_block(
        self,
        form: Form,
        first: int,
        skip: Skip,
        projection: int,
        shape: tuple[int, ...],
        out: tuple[int, ...],
    ) -> None:
        pad_before = form.pad_before if skip in (Skip.PAD, Skip.ACTIVATED_PAD) else 0
        self.blocks.append([first, len(form.convs), skip, projection, *shape, *out, pad_before])

    def _add_post_running(
        self, form: PostActivationForm, shape: tuple[int, ...], relu: bool
    ) -> tuple[tuple[int, ...], int]:
        """Add a block's rows; return the output's shape, and the projection's row or -1.

        Args:
            relu: whether the first unit has a ReLU.
        """
        out, affine = shape, (torch.ones(shape[0]), torch.zeros(shape[0]))
        for position, (conv, bn) in enumerate(zip(form.convs, form.bns, strict=True)):
            last = position == len(form.convs) - 1
            factor, shift = affine_behind(conv, bn, self.bn)
            weight = scaled(conv.weight, factor) if last else conv.weight
            out = self._add_conv(conv, weight, out, self._add_scales(affine, 0.0), relu or position > 0)
            self.biases.append(shift if last else torch.zeros(out[0]))
            affine = factor, shift
        if form.projection is None:
            return out, -1
        factor, shift = affine_behind(form.projection, form.projection_bn, self.bn)
        self._add_conv(form.projection, scaled(form.projection.weight, factor), shape)
        self.biases.append(shift)
        return out, len(self.units) - 1

    def _add_post_batch(
        self, form: PostActivationForm, shape: tuple[int, ...], relu: bool
    ) -> tuple[tuple[int, ...], int]:
        """Like `_add_post_running`, for batch statistics: their mean cancels the convolution's bias."""
        out, norm = shape, NO_BN
        for position, (conv, bn) in enumerate(zip(form.convs, form.bns, strict=True)):
            out = self._add_conv(conv, conv.weight, out, norm, relu or position > 0)
            norm = self._add_bn(bn)
        self._add_end(out, norm)
        if form.projection is None or form.projection_bn is None:
            return out, -1
        self._add_conv(form.projection, form.projection.weight, shape)
        self._add_end(out, self._add_bn(form.projection_bn))
        return out, len(self.units) - 2

    def _add_conv(
        self, conv: nn.Conv2d, weight: Tensor, shape: tuple[int, ...], norm: Norm = NO_BN, relu: bool = False
    ) -> tuple[int, ...]:
        """Add a convolution, and the BN and the ReLU before it; return its output's shape."""
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        out = (conv.out_channels, *((side + 2 * padding - kernel) // stride + 1 for side in shape[1:]))
        self._add_row([*shape, *out, kernel, stride, padding], norm, self.bits_size if relu else -1)
        self.weights.append(weight.detach().flatten().cpu().float())
        if relu:
            self.bits_size += math.prod(shape[1:]) * -(-shape[0] // GROUP) * GROUP // 8
        return out

    def _add_end(self, shape: tuple[int, ...], norm: Norm) -> None:
        """Add a BN that no convolution follows."""
        self._add_row([*shape, *shape, 0, 1, 0], norm, -1)

    def _add_row(self, sizes: list[int], norm: Norm, bits_offset: int) -> None:
        scale_offset, epsilon = norm
        self.units.append([*sizes, sum(map(len, self.weights)), scale_offset, bits_offset])
        self.epsilons.append(epsilon)

    def _add_bn(self, bn: nn.BatchNorm2d) -> Norm:
        return self._add_scales(_affine(bn, self.bn), bn.eps)

    def _add_scales(self, affine: tuple[Tensor, Tensor], epsilon: float) -> Norm:
        offset = sum(map(len, self.scales))
        scale, shift = affine
        self.scales.append(scale)
        self.shifts.append(shift)
        return offset, epsilon

    def tables(self) -> Tables:
        return Tables(
            torch.tensor(self.blocks, dtype=torch.int64),
            torch.tensor(self.units, dtype=torch.int64),
            torch.cat(self.weights),
            torch.cat(self.scales),
            torch.cat(self.shifts),
            torch.tensor(self.epsilons, dtype=torch.float32),
            torch.cat(self.biases).float() if self.biases else torch.empty(0),
        )


def affine_behind(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, mode: BatchNormMode) -> tuple[Tensor, Tensor]:
    """Return the affine map of a BN after a convolution, including the convolution's bias: factors and shifts.

    Both are float32 [out], on the CPU. Without BN they are 1 and the bias.
    """
    ones = torch.ones(conv.out_channels)
    factor, shift = (ones, torch.zeros_like(ones)) if bn is None else _affine(bn, mode)
    if conv.bias is not None:
        shift = shift + factor * conv.bias.detach().cpu().float()
    return factor, shift


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """Return a convolution's weight [out, in, kernel, kernel] times ``factor`` [out], on the CPU."""
    return weight.detach().cpu() * factor[:, None, None, None]


def _affine(bn: nn.BatchNorm2d, mode: BatchNormMode) -> tuple[Tensor, Tensor]:
    """Return BN's factors and shifts, float32 [C] each; in mode ``running`` they include its statistics."""
    weight, bias = (
        torch.full((bn.num_features,), default) if parameter is None else parameter.detach().cpu().double()
        for parameter, default in ((bn.weight, 1.0), (bn.bias, 0.0))
    )
    if mode == "running":
        assert bn.running_var is not None and bn.running_mean is not None
        weight = weight / (bn.running_var.cpu().double() + bn.eps).sqrt()
        bias = bias - bn.running_mean.cpu().double() * weight
    return weight.float(), bias.float()
