"""Networks and single blocks packed for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet import scaling
from pathnet.engines.forms import post_activation
from pathnet.engines.magnitudes import Divided, divided
from pathnet.engines.tables import BlockColumn, affine_behind, scaled, tables
from pathnet.engines.triton.network import DTYPES, FusedBlock, PackedConvolution, Shape, TritonNetwork
from pathnet.models.residual_net import FusedForm, PostActivationForm, ResidualNet, Unit
from pathnet.recording import BatchNormMode, Precision

__all__ = ["affine_of", "block_network", "network_of", "norm_tensors"]


def network_of(net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]) -> TritonNetwork:
    """Pack a network whose blocks all have fused forms, or are all post-activation ones.

    Args:
        y0_shape: [C, H, W] of the first block's input.
    """
    pack = _post_network if post_activation(net) else _pre_network
    return _divided(pack(net, bn, precision, Shape(*y0_shape)), divided(tables(net, bn, y0_shape)))


def _divided(network: TritonNetwork, division: Divided) -> TritonNetwork:
    """Return the network with the factors of backward passes divided as in its tables."""
    if division.magnitudes is None:
        return network
    blocks = []
    units: list[int] = []
    ends: list[int] = []
    for block, row in zip(network.blocks, division.tables.blocks.tolist(), strict=True):
        first, count = row[BlockColumn.FIRST], row[BlockColumn.COUNT]
        projection = row[BlockColumn.PROJECTION]
        branches = [range(first, first + count), range(projection, projection + 1) if projection >= 0 else range(0)]
        units += branches[0]
        ends += [branch.stop for branch in branches if branch][: len(block.ends)]
        convolutions = [
            _divided_transposed(conv, int(division.weights[unit]), network.backward_dtype)
            for conv, unit in zip(block.convolutions, branches[0], strict=True)
        ]
        skip = block.projection
        if skip is not None:
            skip = _divided_transposed(skip, int(division.weights[projection]), network.backward_dtype)
        blocks.append(replace(block, convolutions=convolutions, projection=skip))
    exponents = division.scales[torch.tensor([*units, *ends])].int().to(network.affine.device)
    return replace(network, blocks=blocks, magnitudes=division.magnitudes, scale_exponents=exponents[:, None])


def _divided_transposed(conv: PackedConvolution, exponent: int, dtype: torch.dtype) -> PackedConvolution:
    weight = scaling.times_power_of_two(conv.weight, torch.tensor(-exponent, device=conv.weight.device))
    return replace(conv, transposed=weight.transpose(1, 2).to(dtype).contiguous())


def _pre_network(net: ResidualNet, bn: BatchNormMode, precision: Precision, shape: Shape) -> TritonNetwork:
    forms = [form for block in net if isinstance(form := block.form(), FusedForm)]
    units = [unit for form in forms for unit in form.units]
    norms = [unit.bn for unit in units]
    widest = _aligned(max([forms[-1].units[-1].conv.out_channels, *(norm.num_features for norm in norms)]))
    affine = torch.stack([_filled(affine_of(unit), widest) for unit in units]).detach()
    statistics = affine.new_empty(0)
    if bn == "running":
        running = [(norm.running_mean, norm.running_var) for norm in norms]
        statistics = torch.stack([_filled([row for row in pair if row is not None], widest) for pair in running])
    return TritonNetwork(
        _fused_blocks(forms, shape, DTYPES[precision]),
        affine,
        statistics,
        [norm.eps for norm in norms],
        torch.tensor([[norm.eps] for norm in norms], device=affine.device),
        bn,
        precision,
    )


def _fused_blocks(forms: Sequence[FusedForm], shape: Shape, backward: torch.dtype) -> list[FusedBlock]:
    """Return consecutive blocks for inputs of that shape; ``backward`` is the type of the transposed weights."""
    blocks, first = [], 0
    for form in forms:
        block_input, convolutions = shape, []
        for unit in form.units:
            convolutions.append(_convolution(unit.conv, shape, backward))
            shape = convolutions[-1].output
        projection = None if form.projection is None else _convolution(form.projection, block_input, backward)
        blocks.append(FusedBlock(convolutions, projection, first, pad_before=form.pad_before))
        first += len(convolutions)
    return blocks


class _Norms:
    """BNs of a post-activation network in the order of its units: gain, bias and epsilon of each.

    With running statistics a BN is an affine map, and those after a block's last convolution and its projection are
    multiplied into the convolutions. With batch statistics they stay, and the mean cancels a bias before them.
    """

    def __init__(self, bn: BatchNormMode, device: torch.device) -> None:
        self.bn, self.device = bn, device
        self.units: list[tuple[Tensor, Tensor, float]] = []
        self.ends: list[tuple[Tensor, Tensor, float]] = []

    def add_relu(self, channels: int) -> None:
        """Add the first unit of a block, which has a ReLU without BN."""
        ones, zeros = torch.ones(channels, device=self.device), torch.zeros(channels, device=self.device)
        self.units.append((ones, zeros, 0.0))

    def add_unit(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        """Add the BN after a convolution inside a block."""
        self.units.append(self._affine(conv, norm))

    def end(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, shape: Shape, backward: torch.dtype
    ) -> PackedConvolution:
        """Return a branch's last convolution, which contains its BN if that is an affine map."""
        affine = self._affine(conv, norm)
        if self.bn == "batch":
            self.ends.append(affine)
            return _convolution(conv, shape, backward)
        weight = scaled(conv.weight, affine[0].cpu()).to(self.device)
        return replace(_packed(weight, conv.stride[0], shape, torch.float32, backward), shift=affine[1])

    def _affine(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor, float]:
        if self.bn == "batch":
            assert norm is not None
            return *affine_of(Unit(norm, conv)), norm.eps
        factor, shift = affine_behind(conv, norm, self.bn)
        return factor.to(self.device), shift.to(self.device), 0.0


def _post_network(net: ResidualNet, bn: BatchNormMode, precision: Precision, shape: Shape) -> TritonNetwork:
    forms = [form for block in net if isinstance(form := block.form(), PostActivationForm)]
    device, backward = next(net.parameters()).device, DTYPES[precision]
    unit_count = sum(len(form.convs) for form in forms)
    norms = _Norms(bn, device)
    blocks: list[FusedBlock] = []
    for form in forms:
        block_input, convolutions = shape, []
        first, first_end = len(norms.units), unit_count + len(norms.ends)
        norms.add_relu(shape.channels)
        for conv, norm in zip(form.convs[:-1], form.bns[:-1], strict=True):
            convolutions.append(_convolution(conv, shape, backward))
            shape = convolutions[-1].output
            norms.add_unit(conv, norm)
        convolutions.append(norms.end(form.convs[-1], form.bns[-1], shape, backward))
        shape = convolutions[-1].output
        projection = None
        if form.projection is not None:
            projection = norms.end(form.projection, form.projection_bn, block_input, backward)
        ends = range(first_end, unit_count + len(norms.ends))
        blocks.append(FusedBlock(convolutions, projection, first, True, ends, form.pad_before))
    rows = [*norms.units, *norms.ends]
    widest = _aligned(max(shape.channels, *(len(gain) for gain, _, _ in rows)))
    affine = torch.stack([_filled(row[:2], widest) for row in rows]).detach()
    # Mean 0 and variance 1, since the affine maps contain the running statistics.
    statistics = torch.stack([torch.zeros_like(affine[:, 0]), torch.ones_like(affine[:, 0])], 1)
    epsilons = [epsilon for _, _, epsilon in rows]
    return TritonNetwork(
        blocks,
        affine,
        statistics[: 0 if bn == "batch" else None],
        epsilons,
        torch.tensor(epsilons, device=device)[:, None],
        bn,
        precision,
    )


def block_network(
    shape: Sequence[int],
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    pad_before: int = 0,
) -> TritonNetwork:
    """Pack a network of one block, again in every training step, for inputs [C, H, W] of a type.

    Args:
        weights, strides: those of the units' convolutions, then the projection's if there is one more than BNs.
        norms: the `norm_tensors` of each unit, one after the other.
        epsilons: that of each unit.
        pad_before: see `FusedBlock`.
    """
    units, block_input = len(epsilons), Shape(*shape)
    each = len(norms) // units
    output, convolutions = block_input, []
    for weight, stride in zip(weights[:units], strides, strict=False):
        convolutions.append(_packed(weight, stride, output, dtype, dtype))
        output = convolutions[-1].output
    projection = None if len(weights) == units else _packed(weights[-1], strides[-1], block_input, dtype, dtype)
    widest = _aligned(max(output.channels, *(len(norm) for norm in norms)))
    rows = _filled(norms, widest).reshape(units, each, widest)
    affine = rows[:, :2]
    return TritonNetwork(
        [FusedBlock(convolutions, projection, 0, pad_before=0 if projection else pad_before)],
        affine,
        rows[:, 2:] if each > 2 else affine[:0],
        list(epsilons),
        # By launches alone: a copy from the host would end the capture of a graph.
        torch.cat([affine.new_full((1, 1), epsilon) for epsilon in epsilons]),
        "running" if each > 2 else "batch",
        "bfloat16" if dtype == torch.bfloat16 else "float32",
    )


def _convolution(conv: nn.Conv2d, shape: Shape, backward: torch.dtype) -> PackedConvolution:
    return _packed(conv.weight.detach(), conv.stride[0], shape, torch.float32, backward)


def _packed(
    weight: Tensor, stride: int, shape: Shape, forward: torch.dtype, backward: torch.dtype
) -> PackedConvolution:
    """Pack a weight [C_out, C, kernel, kernel] for inputs of that shape, in the types of the two passes."""
    out_channels, channels, kernel, _ = weight.shape
    by_tap = weight.permute(2, 3, 1, 0).reshape(kernel * kernel, channels, out_channels)
    return PackedConvolution(
        kernel,
        stride,
        shape,
        Shape(out_channels, -(-shape.height // stride), -(-shape.width // stride)),
        by_tap.to(forward, copy=True, memory_format=torch.contiguous_format),
        by_tap.transpose(1, 2).to(backward, copy=True, memory_format=torch.contiguous_format),
    )


def _aligned(channels: int) -> int:
    """Return the smallest multiple of 16 that is at least ``channels``, for aligned rows."""
    return -(-channels // 16) * 16


def _filled(rows: Sequence[Tensor], width: int) -> Tensor:
    """Return float32 [rows, width], zeros appended."""
    if all(len(row) == width for row in rows):
        return torch.stack([row.float() for row in rows])
    return torch.stack([F.pad(row.float(), (0, width - len(row))) for row in rows])


def affine_of(unit: Unit) -> tuple[Tensor, Tensor]:
    """Return BN's gain and bias, [C] each; ones and zeros for a BN without them."""
    bn, like = unit.bn, unit.conv.weight
    gain = like.new_ones(bn.num_features) if bn.weight is None else bn.weight
    return gain, like.new_zeros(bn.num_features) if bn.bias is None else bn.bias


def norm_tensors(unit: Unit, by_batch: bool) -> list[Tensor]:
    """Return BN's gain and bias, [C] each, then its running mean and variance unless it uses the batch's."""
    bn = unit.bn
    gain, bias = bn.weight, bn.bias
    affine = affine_of(unit) if gain is None or bias is None else (gain, bias)
    running = () if by_batch else (bn.running_mean, bn.running_var)
    return [*affine, *[row for row in running if row is not None]]
