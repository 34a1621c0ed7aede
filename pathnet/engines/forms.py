"""Networks of BN-ReLU-conv units as the tables that native engines read; which networks those are.

A post-activation network goes into the same tables seen from sum to sum: a block's join is the ReLU of the next
block's first unit, which has no BN, and its skip lies behind that ReLU; the network's first unit has no ReLU. In BN
mode ``running`` the last BN of a module, and a projection's, go into their convolution's weights and a bias; in
``batch`` they have rows of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet.models.residual_net import Block, FusedForm, PostActivationForm, ResidualNet
from pathnet.recording import BatchNormMode

__all__ = [
    "IDENTITY",
    "PROJECTION",
    "Tables",
    "behind",
    "blocks_of",
    "post_activation",
    "scaled",
    "tables",
    "unsupported_block",
    "unsupported_form",
]

IDENTITY, PROJECTION, PAD, ACTIVATED, ACTIVATED_PAD = range(5)

GROUP = 16
"""Channels whose ReLU bits lie together."""


@dataclass(frozen=True)
class Tables:
    """A network's blocks; `pathnet.engines.cpu.ops.cpu_pack` describes the columns.

    Attributes:
        blocks: int64 [n, 10]
        units: int64 [U, 12]; the offsets of bits are those of unit after unit, as the cpu engine records them.
        weights: float32, the convolutions' weights one after the other.
        scales: float32, BN's factor for each channel of each unit's input, unit after unit: in BN mode ``running``
            weight / deviation, in ``batch`` the weight.
        shifts: float32, what BN adds, in the same order.
        epsilons: float32 [U], what BN adds to the variance; 0 where there is none.
        biases: float32, unit after unit what is added behind its convolution [out]; empty where nothing is.
    """

    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor
    shifts: Tensor
    epsilons: Tensor
    biases: Tensor


def blocks_of(net: ResidualNet) -> Iterator[Block]:
    return iter(net.blocks)  # type: ignore[arg-type]


def post_activation(net: ResidualNet) -> bool:
    """Whether all blocks have the form of post-activation blocks."""
    return all(block.post_activation_form() is not None for block in blocks_of(net))


def unsupported_form(net: ResidualNet, bn: BatchNormMode) -> str | None:
    """Why there are no tables of a network, or None."""
    if post_activation(net):
        return _unsupported_post(net, bn)
    for index, block in enumerate(blocks_of(net)):
        form = block.fused_form()
        if form is None:
            post = block.post_activation_form() is not None
            return f"block {index + 1} {'is a post-activation one, others are not' if post else 'has no fused form'}"
        for conv in _convolutions(form):
            reason = _unsupported(conv) or ("with a bias" if conv.bias is not None else None)
            if reason is not None:
                return f"block {index + 1} has a convolution {reason}"
        if bn == "running" and any(unit.bn.running_var is None for unit in form.units):
            return f"block {index + 1} keeps no running statistics"
    return None


def _unsupported_post(net: ResidualNet, bn: BatchNormMode) -> str | None:
    for index, block in enumerate(blocks_of(net)):
        form = block.post_activation_form()
        assert form is not None
        for conv in _convolutions(form):
            reason = _unsupported(conv)
            if reason is not None:
                return f"block {index + 1} has a convolution {reason}"
        norms = (*form.bns, *([] if form.projection_bn is None else [form.projection_bn]))
        if bn == "running" and any(norm.running_var is None for norm in norms):
            return f"block {index + 1} keeps no running statistics"
        if bn == "batch" and form.projection is not None and form.projection_bn is None:
            return f"block {index + 1} has a projection without batch normalisation"
    return None


def unsupported_block(form: FusedForm | PostActivationForm) -> str | None:
    """Why kernels for convolutions that keep the side have no form for a block, or None."""
    biased = isinstance(form, PostActivationForm)
    for conv in _convolutions(form):
        reason = _unsupported(conv) or ("with a bias" if conv.bias is not None and not biased else None)
        if reason is None and (conv.kernel_size[0] % 2 == 0 or int(conv.padding[0]) != conv.kernel_size[0] // 2):
            reason = "that changes the side by more than its stride"
        if reason is not None:
            return f"it has a convolution {reason}"
    if form.projection is not None and form.projection.kernel_size[0] != 1:
        return "it has a projection with a kernel larger than 1"
    # Different strides may come to outputs of one size: on a side of 4, 2 and 3.
    stride = math.prod([conv.stride[0] for conv in _module(form)])
    if form.projection is not None and form.projection.stride[0] != stride:
        return "it has a projection of another stride than its module"
    return None


def _unsupported(conv: nn.Conv2d) -> str | None:
    if not _plain(conv):
        return "that is grouped, dilated or not square"
    if int(conv.padding[0]) >= conv.kernel_size[0]:
        return "whose padding reaches beyond its kernel"
    return None


def tables(net: ResidualNet, bn: BatchNormMode, y0_shape: Sequence[int]) -> Tables:
    """The tables of a network without `unsupported_form`, for inputs [C, H, W] of its first block; on the CPU."""
    builder = _Builder(bn)
    shape = tuple(y0_shape)
    post = post_activation(net)
    for block in blocks_of(net):
        form = block.post_activation_form() if post else block.fused_form()
        assert form is not None
        shape = builder.add_post(form, shape) if isinstance(form, PostActivationForm) else builder.add(form, shape)
    return builder.tables()


def _module(form: FusedForm | PostActivationForm) -> list[nn.Conv2d]:
    return list(form.convs) if isinstance(form, PostActivationForm) else [unit.conv for unit in form.units]


def _convolutions(form: FusedForm | PostActivationForm) -> list[nn.Conv2d]:
    return _module(form) if form.projection is None else [*_module(form), form.projection]


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


Norm = tuple[int, float]
"""Where a BN's factors begin, and what it adds to the variance."""

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
        """One block for an input of ``shape`` (C, H, W); returns that of its output."""
        first, out = len(self.units), shape
        for unit in form.units:
            out = self._add_conv(unit.conv, unit.conv.weight, out, self._add_bn(unit.bn), relu=True)
        projection = -1 if form.projection is None else len(self.units)
        if form.projection is not None:
            self._add_conv(form.projection, form.projection.weight, shape)
        skip = PROJECTION if form.projection is not None else PAD if form.pad else IDENTITY
        self.blocks.append([first, len(form.units), skip, projection, *shape, *out])
        return out

    def add_post(self, form: PostActivationForm, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same for a post-activation block."""
        first = len(self.units)
        # What enters the network's first block is taken as it is, out of a ReLU or not.
        relu = first > 0
        add = self._add_post_running if self.bn == "running" else self._add_post_batch
        out, projection = add(form, shape, relu)
        identity, pad = (ACTIVATED, ACTIVATED_PAD) if relu else (IDENTITY, PAD)
        skip = PROJECTION if projection >= 0 else pad if form.pad else identity
        self.blocks.append([first, len(form.convs), skip, projection, *shape, *out])
        return out

    def _add_post_running(
        self, form: PostActivationForm, shape: tuple[int, ...], relu: bool
    ) -> tuple[tuple[int, ...], int]:
        """The rows, ``relu`` whether the first has one; returns the output's shape, the projection's row or -1."""
        out, affine = shape, (torch.ones(shape[0]), torch.zeros(shape[0]))
        for position, (conv, bn) in enumerate(zip(form.convs, form.bns, strict=True)):
            last = position == len(form.convs) - 1
            factor, shift = behind(conv, bn, self.bn)
            weight = scaled(conv.weight, factor) if last else conv.weight
            out = self._add_conv(conv, weight, out, self._add_scales(affine, 0.0), relu or position > 0)
            self.biases.append(shift if last else torch.zeros(out[0]))
            affine = factor, shift
        if form.projection is None:
            return out, -1
        factor, shift = behind(form.projection, form.projection_bn, self.bn)
        self._add_conv(form.projection, scaled(form.projection.weight, factor), shape)
        self.biases.append(shift)
        return out, len(self.units) - 1

    def _add_post_batch(
        self, form: PostActivationForm, shape: tuple[int, ...], relu: bool
    ) -> tuple[tuple[int, ...], int]:
        """The same where BN takes batch statistics, whose mean takes a convolution's bias away."""
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
        """A convolution, and the BN and the ReLU before it; returns its output's shape."""
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        out = (conv.out_channels, *((side + 2 * padding - kernel) // stride + 1 for side in shape[1:]))
        self._add_row([*shape, *out, kernel, stride, padding], norm, self.bits_size if relu else -1)
        self.weights.append(weight.detach().flatten().cpu().float())
        if relu:
            self.bits_size += math.prod(shape[1:]) * -(-shape[0] // GROUP) * GROUP // 8
        return out

    def _add_end(self, shape: tuple[int, ...], norm: Norm) -> None:
        """A BN that no convolution follows."""
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


def behind(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, mode: BatchNormMode) -> tuple[Tensor, Tensor]:
    """float32 [out] twice, on the CPU: what a BN behind a convolution multiplies by and adds, the convolution's bias
    included; 1 and that bias where there is no BN."""
    ones = torch.ones(conv.out_channels)
    factor, shift = (ones, torch.zeros_like(ones)) if bn is None else _affine(bn, mode)
    if conv.bias is not None:
        shift = shift + factor * conv.bias.detach().cpu().float()
    return factor, shift


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """[out, in, kernel, kernel], on the CPU: a convolution's weight with what follows it, ``factor`` [out]."""
    return weight.detach().cpu() * factor[:, None, None, None]


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
