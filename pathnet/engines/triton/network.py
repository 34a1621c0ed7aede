"""A network as the kernels see it: units, skips and packed weights.

Post-activation blocks are seen from sum to sum, as `pathnet.engines.forms` has them: a block's join is the ReLU of
the next block's first unit, and its skip lies behind that ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet import scaling
from pathnet.engines.forms import post_activation
from pathnet.engines.magnitudes import Divided, Magnitudes, divided
from pathnet.engines.tables import BlockColumn, affine_behind, scaled, tables
from pathnet.models.residual_net import FusedForm, PostActivationForm, ResidualNet, Unit
from pathnet.recording import BatchNormMode, Precision

__all__ = [
    "DTYPES",
    "Convolution",
    "FusedBlock",
    "Shape",
    "TritonNetwork",
    "affine_of",
    "block_network",
    "network_of",
]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Of what a walk holds, by its precision."""


@dataclass(frozen=True)
class Shape:
    """Of images."""

    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> int:
        return self.channels * self.pixels


@dataclass(frozen=True)
class Convolution:
    """A convolution that keeps the side, but for its stride.

    Attributes:
        weight: [kernel**2, channels of the input, channels of the output], float32 or bfloat16.
        transposed: [kernel**2, channels of the output, channels of the input].
        added: float32 [channels of the output], what is added behind it; None where nothing is.
    """

    kernel: int
    stride: int
    given: Shape
    made: Shape
    weight: Tensor
    transposed: Tensor
    added: Tensor | None = None


@dataclass(frozen=True)
class FusedBlock:
    """The convolutions of its units, and its skip: a projection, or every stride-th pixel with channels filled up.

    Attributes:
        first: the index of its first unit among all units of the network.
        activated: whether it is a post-activation block: the first unit has no BN, and the skip lies behind its ReLU
            whatever it is, not as a projection alone.
        ends: the indices, behind those of all units, of the BNs behind the last convolution and the projection, where
            their statistics are the batch's; otherwise they are in the convolutions.
    """

    convolutions: Sequence[Convolution]
    projection: Convolution | None
    first: int
    activated: bool = False
    ends: Sequence[int] = ()

    @property
    def given(self) -> Shape:
        return self.convolutions[0].given

    @property
    def made(self) -> Shape:
        return self.convolutions[-1].made

    @property
    def stride(self) -> int:
        """Of the skip."""
        return math.prod(conv.stride for conv in self.convolutions)

    @cached_property
    def identity(self) -> bool:
        return self.projection is None and self.given == self.made and not self.activated


@dataclass(frozen=True)
class TritonNetwork:
    """A network packed for the kernels.

    Attributes:
        affine: float32 [units, 2, widest], BN's gain and bias, channels filled up; behind the units' those of the
            blocks' ends, here and below.
        statistics: float32 [units, 2, widest], the running mean and variance; empty in BN mode ``batch``.
        epsilons, epsilon: of each unit, what BN adds to the variance; here, and float32 [units, 1] on the device.
        precision: of the walk; the forward pass is float32-accurate in each.
        magnitudes: what was taken out of the factors of the walk back; None where nothing was.
        scale_exponents: int32 [units, 1], the powers of two taken out of the factors of units and blocks' ends; None
            likewise.
    """

    blocks: Sequence[FusedBlock]
    affine: Tensor
    statistics: Tensor
    epsilons: Sequence[float]
    epsilon: Tensor
    bn: BatchNormMode
    precision: Precision
    magnitudes: Magnitudes | None = None
    scale_exponents: Tensor | None = None

    @property
    def walk_dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def post(self) -> bool:
        """Whether its blocks are post-activation ones, so that the last block's join is still to come."""
        return self.blocks[-1].activated

    def floor(self, unit: int) -> float:
        """Below what a unit's activations are cut off: what comes out of a stem meets no ReLU before the first of
        post-activation blocks."""
        return -math.inf if self.post and unit == 0 else 0.0

    @property
    def widest(self) -> int:
        """Channels of any activation, at most."""
        return self.affine.shape[2]

    @cached_property
    def convolutions(self) -> list[Convolution]:
        """Of unit after unit."""
        return [conv for block in self.blocks for conv in block.convolutions]

    @cached_property
    def normalized(self) -> list[Shape | None]:
        """What the BNs of units, and behind them those of blocks' ends, read; None of a unit that has none."""
        units = [
            None if block.activated and conv is block.convolutions[0] else conv.given
            for block in self.blocks
            for conv in block.convolutions
        ]
        return [*units, *(block.made for block in self.blocks for _ in block.ends)]

    @cached_property
    def most_states(self) -> int:
        """Of a routing at a time: before a block, inside it, behind it."""
        return max(1 + len(block.convolutions) + len(block.ends) for block in self.blocks)

    @cached_property
    def largest(self) -> int:
        """Elements of a sample's activation, at most."""
        return max(shape.size for conv in self.convolutions for shape in (conv.given, conv.made))

    def bits_sizes(self, batch: int) -> list[int]:
        """Bytes of the ReLU bits [B, H, W, ceil(C / 8)] of unit after unit."""
        return [batch * conv.given.pixels * -(-conv.given.channels // 8) for conv in self.convolutions]

    def bits_starts(self, batch: int) -> list[int]:
        """Where they begin, and where the last end."""
        return _starts(self.bits_sizes(batch))

    def normalized_sizes(self, batch: int) -> list[int]:
        """Elements of the normalised activations [B, H, W, C] of unit after unit, then of the blocks' ends."""
        return [0 if shape is None else batch * shape.size for shape in self.normalized]

    def normalized_starts(self, batch: int) -> list[int]:
        """Where they begin, and where the last end."""
        return _starts(self.normalized_sizes(batch))


def _starts(sizes: Iterable[int]) -> list[int]:
    """Multiples of 16, so that what begins there can be read in words of 16 bytes."""
    return list(accumulate((-(-size // 16) * 16 for size in sizes), initial=0))


def network_of(net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]) -> TritonNetwork:
    """A network of blocks that have fused forms, or all post-activation ones; for inputs [C, H, W] of the first."""
    build = _post_network if post_activation(net) else _pre_network
    return _divided(build(net, bn, precision, Shape(*y0_shape)), divided(tables(net, bn, y0_shape)))


def _divided(network: TritonNetwork, back: Divided) -> TritonNetwork:
    """The network with the factors of its walk back as they are divided in its tables."""
    if back.magnitudes is None:
        return network
    blocks = []
    units: list[int] = []
    ends: list[int] = []
    for block, row in zip(network.blocks, back.tables.blocks.tolist(), strict=True):
        first, count = row[BlockColumn.FIRST], row[BlockColumn.COUNT]
        projection = row[BlockColumn.PROJECTION]
        branches = [range(first, first + count), range(projection, projection + 1) if projection >= 0 else range(0)]
        units += branches[0]
        ends += [branch.stop for branch in branches if branch][: len(block.ends)]
        convolutions = [
            _divided_transposed(conv, int(back.weights[unit]), network.walk_dtype)
            for conv, unit in zip(block.convolutions, branches[0], strict=True)
        ]
        beside = block.projection
        if beside is not None:
            beside = _divided_transposed(beside, int(back.weights[projection]), network.walk_dtype)
        blocks.append(replace(block, convolutions=convolutions, projection=beside))
    exponents = back.scales[torch.tensor([*units, *ends])].int().to(network.affine.device)
    return replace(network, blocks=blocks, magnitudes=back.magnitudes, scale_exponents=exponents[:, None])


def _divided_transposed(conv: Convolution, exponent: int, dtype: torch.dtype) -> Convolution:
    weight = scaling.times_power_of_two(conv.weight, torch.tensor(-exponent, device=conv.weight.device))
    return replace(conv, transposed=weight.transpose(1, 2).to(dtype).contiguous())


def _pre_network(net: ResidualNet, bn: BatchNormMode, precision: Precision, shape: Shape) -> TritonNetwork:
    forms = [form for block in net if isinstance(form := block.form(), FusedForm)]
    units = [unit for form in forms for unit in form.units]
    norms = [unit.bn for unit in units]
    widest = max([forms[-1].units[-1].conv.out_channels, *(norm.num_features for norm in norms)])
    widest = -(-widest // 16) * 16
    affine = torch.stack([_filled(affine_of(unit), widest) for unit in units]).detach()
    statistics = affine.new_empty(0)
    if bn == "running":
        running = [(bn.running_mean, bn.running_var) for bn in norms]
        statistics = torch.stack([_filled([own for own in pair if own is not None], widest) for pair in running])
    return TritonNetwork(
        fused_blocks(forms, shape, torch.float32, DTYPES[precision]),
        affine,
        statistics,
        [norm.eps for norm in norms],
        torch.tensor([[norm.eps] for norm in norms], device=affine.device),
        bn,
        precision,
    )


def _post_network(net: ResidualNet, bn: BatchNormMode, precision: Precision, shape: Shape) -> TritonNetwork:
    """With running statistics each BN is what it multiplies by and adds, and that behind a block's last convolution
    or projection goes into it. With those of a batch it stays, and a bias before it goes with the mean taken off."""
    forms = [form for block in net if isinstance(form := block.form(), PostActivationForm)]
    device, backward, by_batch = next(net.parameters()).device, DTYPES[precision], bn == "batch"
    count = sum(len(form.convs) for form in forms)
    blocks: list[FusedBlock] = []
    units: list[tuple[Tensor, Tensor, float]] = []
    ends: list[tuple[Tensor, Tensor, float]] = []

    def norm_of(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor, float]:
        """Gain, bias and epsilon."""
        if by_batch:
            assert norm is not None
            return *affine_of(Unit(norm, conv)), norm.eps
        factor, shift = affine_behind(conv, norm, bn)
        return factor.to(device), shift.to(device), 0.0

    def ended(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, given: Shape) -> Convolution:
        own = norm_of(conv, norm)
        if by_batch:
            ends.append(own)
            return _convolution(conv, given, torch.float32, backward)
        weight = scaled(conv.weight, own[0].cpu()).to(device)
        return replace(_packed(weight, conv.stride[0], given, torch.float32, backward), added=own[1])

    for form in forms:
        given, convolutions, first, first_end = shape, [], len(units), count + len(ends)
        units.append((torch.ones(shape.channels, device=device), torch.zeros(shape.channels, device=device), 0.0))
        for conv, norm in zip(form.convs[:-1], form.bns[:-1], strict=True):
            convolutions.append(_convolution(conv, shape, torch.float32, backward))
            shape = convolutions[-1].made
            units.append(norm_of(conv, norm))
        convolutions.append(ended(form.convs[-1], form.bns[-1], shape))
        shape = convolutions[-1].made
        projection = None if form.projection is None else ended(form.projection, form.projection_bn, given)
        blocks.append(FusedBlock(convolutions, projection, first, True, range(first_end, count + len(ends))))
    everything = [*units, *ends]
    widest = -(-max(shape.channels, *(len(gain) for gain, _, _ in everything)) // 16) * 16
    affine = torch.stack([_filled(own[:2], widest) for own in everything]).detach()
    # Nothing is taken off, nothing is divided by: running statistics are in the factors.
    statistics = torch.stack([torch.zeros_like(affine[:, 0]), torch.ones_like(affine[:, 0])], 1)
    epsilons = [epsilon for _, _, epsilon in everything]
    return TritonNetwork(
        blocks,
        affine,
        statistics[: 0 if by_batch else None],
        epsilons,
        torch.tensor(epsilons, device=device)[:, None],
        bn,
        precision,
    )


def block_network(
    shape: Sequence[int],
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
) -> TritonNetwork:
    """A network of one block, for inputs [C, H, W] of that type; made anew for every step of a training.

    Args:
        weights, strides: of the units' convolutions, and of the projection where there is one more than BNs.
        running: mean and variance of each unit; none for BN mode ``batch``.
    """
    given = own = Shape(*shape)
    convolutions = []
    for weight, stride in zip(weights[: len(gains)], strides, strict=False):
        convolutions.append(_packed(weight, stride, own, dtype, dtype))
        own = convolutions[-1].made
    projection = None if len(weights) == len(gains) else _packed(weights[-1], strides[-1], given, dtype, dtype)
    widest = -(-max(own.channels, *(len(gain) for gain in gains)) // 16) * 16
    affine = _filled([own for pair in zip(gains, biases, strict=True) for own in pair], widest)
    statistics = _filled(running, widest) if running else affine[:0]
    return TritonNetwork(
        [FusedBlock(convolutions, projection, 0)],
        affine.reshape(-1, 2, widest),
        statistics.reshape(-1, 2, widest),
        list(epsilons),
        # By launches alone: a copy from the host would end the capture of a graph.
        torch.cat([affine.new_full((1, 1), epsilon) for epsilon in epsilons]),
        "running" if running else "batch",
        "bfloat16" if dtype == torch.bfloat16 else "float32",
    )


def fused_blocks(
    forms: Sequence[FusedForm], shape: Shape, forward: torch.dtype, backward: torch.dtype
) -> list[FusedBlock]:
    """Blocks in a row, for inputs of that shape; ``forward`` and ``backward`` are the types of the walks' weights."""
    blocks, first = [], 0
    for form in forms:
        given, convolutions = shape, []
        for unit in form.units:
            convolutions.append(_convolution(unit.conv, shape, forward, backward))
            shape = convolutions[-1].made
        projection = None if form.projection is None else _convolution(form.projection, given, forward, backward)
        blocks.append(FusedBlock(convolutions, projection, first))
        first += len(convolutions)
    return blocks


def _convolution(conv: nn.Conv2d, given: Shape, forward: torch.dtype, backward: torch.dtype) -> Convolution:
    return _packed(conv.weight.detach(), conv.stride[0], given, forward, backward)


def _packed(weight: Tensor, stride: int, given: Shape, forward: torch.dtype, backward: torch.dtype) -> Convolution:
    """Of a weight [C_out, C, kernel, kernel]."""
    out_channels, channels, kernel, _ = weight.shape
    made = Shape(out_channels, -(-given.height // stride), -(-given.width // stride))
    by_tap = weight.permute(2, 3, 1, 0).reshape(kernel * kernel, channels, out_channels)
    return Convolution(
        kernel,
        stride,
        given,
        made,
        by_tap.to(forward, copy=True, memory_format=torch.contiguous_format),
        by_tap.transpose(1, 2).to(backward, copy=True, memory_format=torch.contiguous_format),
    )


def _filled(rows: Sequence[Tensor], width: int) -> Tensor:
    """float32 [rows, width], zeros appended."""
    if all(len(row) == width for row in rows):
        return torch.stack([row.float() for row in rows])
    return torch.stack([F.pad(row.float(), (0, width - len(row))) for row in rows])


def affine_of(unit: Unit) -> tuple[Tensor, Tensor]:
    """BN's gain and bias, [C] each; those of a BN without."""
    bn, like = unit.bn, unit.conv.weight
    gain = like.new_ones(bn.num_features) if bn.weight is None else bn.weight
    return gain, like.new_zeros(bn.num_features) if bn.bias is None else bn.bias
