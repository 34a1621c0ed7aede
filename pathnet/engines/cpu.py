"""The cpu engine: BN-ReLU-conv blocks in BN mode ``running``, float32, every (path, sample) in one C++ walk.

In that mode BN is an affine map of each channel, so a walk needs of the forward pass only the ReLU bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet import native
from pathnet.models.residual_net import Block, FusedForm, ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision

__all__ = ["CpuEngine", "Plan"]

IDENTITY, PROJECTION, PAD = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """The blocks as the kernel reads them; `pathnet.native.routed_backward` describes the tables.

    Attributes:
        blocks: int64 [n, 10]
        units: int64 [U, 12]
        weights: float32, the convolutions' weights one after the other.
        scales: float32, BN's factor for each channel of each unit's input.
        relu_bits: uint8 [B, bytes]
    """

    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor
    relu_bits: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.blocks, self.units, self.weights, self.scales, self.relu_bits

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][unit]``, bool [B, C, H, W]."""
        return [
            [self._unit_bits(unit) for unit in range(first, first + count)]
            for first, count in self.blocks[:, :2].tolist()
        ]

    def _unit_bits(self, unit: int) -> Tensor:
        channels, height, width = self.units[unit, :3].tolist()
        offset, elements = int(self.units[unit, 11]), channels * height * width
        packed = self.relu_bits[:, offset : offset + -(-elements // 8)]
        unpacked = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return unpacked.flatten(1)[:, :elements].bool().reshape(-1, channels, height, width)


class CpuEngine:
    """Native code for the processor, its instruction set chosen at run time."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return None if native.LOADED else native.WHY_NOT

    def unsupported(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, device: torch.device
    ) -> str | None:
        if device.type != "cpu":
            return f"the network is on {device}"
        if bn != "running":
            return f'no bn="{bn}"'
        if precision != "float32":
            return f'no precision="{precision}"'
        for index, block in enumerate(_blocks(net)):
            form = block.fused_form()
            if form is None:
                return f"block {index + 1} has no fused form"
            for conv in _convolutions(form):
                if not _plain(conv):
                    return f"block {index + 1} has a convolution that is grouped, dilated or not square"
            if any(unit.bn.running_var is None for unit in form.units):
                return f"block {index + 1} keeps no running statistics"
        return None

    def record(self, net: ResidualNet, y0: Tensor) -> tuple[Tensor, Plan]:
        packer = _Packer()
        y = y0
        with torch.no_grad():
            for block in _blocks(net):
                y = packer.add(block, y)
        return y, packer.plan()

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(blocks, Plan)
        return native.routed_backward(grad.contiguous(), exponent.contiguous(), routing.contiguous(), *blocks.tensors)


def _blocks(net: ResidualNet) -> Iterator[Block]:
    return iter(net.blocks)  # type: ignore[arg-type]


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


class _Packer:
    """Runs blocks forward one after the other and packs what the walk back needs of them."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []
        self.units: list[list[int]] = []
        self.weights: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.bits: list[Tensor] = []

    def add(self, block: Block, x: Tensor) -> Tensor:
        """The block's output for its input ``x``, [B, C, H, W]."""
        form = block.fused_form()
        assert form is not None
        bits: dict[nn.Module, Tensor] = {}
        hooks = [unit.bn.register_forward_hook(_keep_bits(bits)) for unit in form.units]
        y: Tensor = block(x)
        for hook in hooks:
            hook.remove()
        first = len(self.units)
        shape: Sequence[int] = x.shape[1:]
        for unit in form.units:
            shape = self._add_unit(unit.conv, shape, sum(map(len, self.scales)), sum(b.shape[1] for b in self.bits))
            self.scales.append(_scale(unit.bn))
            self.bits.append(bits[unit.bn])
        count = len(self.units) - first
        projection = -1
        if form.projection is not None:
            projection = len(self.units)
            self._add_unit(form.projection, x.shape[1:], -1, -1)
        skip = PROJECTION if form.projection is not None else PAD if form.pad else IDENTITY
        self.blocks.append([first, count, skip, projection, *x.shape[1:], *y.shape[1:]])
        return y

    def _add_unit(self, conv: nn.Conv2d, shape: Sequence[int], scale_offset: int, bits_offset: int) -> Sequence[int]:
        """Appends one row of the unit table; ``shape`` (C, H, W) of its input, returns that of its output."""
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in shape[1:]]
        out = (conv.out_channels, *sides)
        weight_offset = sum(map(len, self.weights))
        self.units.append([*shape, *out, kernel, stride, padding, weight_offset, scale_offset, bits_offset])
        self.weights.append(conv.weight.detach().flatten())
        return out

    def plan(self) -> Plan:
        return Plan(
            torch.tensor(self.blocks, dtype=torch.int64),
            torch.tensor(self.units, dtype=torch.int64),
            torch.cat(self.weights),
            torch.cat(self.scales),
            torch.cat(self.bits, dim=1),
        )


def _keep_bits(kept: dict[nn.Module, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[module] = native.pack_bits(output.contiguous())

    return hook


def _scale(bn: nn.BatchNorm2d) -> Tensor:
    """float32 [C]: the factor of the affine map that BN is in evaluation mode."""
    assert bn.running_var is not None
    deviation = (bn.running_var.double() + bn.eps).sqrt()
    weight = torch.ones_like(deviation) if bn.weight is None else bn.weight.detach().double()
    return torch.as_tensor(weight / deviation).float()
