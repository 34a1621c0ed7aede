"""The cpu engine: BN-ReLU-conv blocks in BN mode ``running``, float32, every (path, sample) in one C++ walk.

In that mode BN is an affine map of each channel, so a walk needs of the forward pass only the ReLU bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet import native
from pathnet.engines import unfused
from pathnet.models.residual_net import Block, FusedForm, ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["CpuEngine", "Packed", "Plan"]

IDENTITY, PROJECTION, PAD = 0, 1, 2


@dataclass(frozen=True)
class Packed:
    """The network as the kernel reads it; `pathnet.native.routed_backward` describes the tables.

    Attributes:
        modules: the blocks themselves, for the forward pass.
        blocks: int64 [n, 10]
        units: int64 [U, 12]
        weights: float32, the convolutions' weights one after the other.
        scales: float32, BN's factor for each channel of each unit's input.
    """

    modules: Sequence[Block]
    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.blocks, self.units, self.weights, self.scales


@dataclass(frozen=True)
class Plan:
    """A recorded pass as the kernel reads it: the tables of `Packed`, and the pass's ReLU bits.

    Attributes:
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

    @property
    def gradient_bytes(self) -> int:
        """Of the largest gradient at a block's input: float32 [B, C, H, W]."""
        return 4 * len(self.relu_bits) * int(self.blocks[:, 4:7].prod(1).max())

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
        self,
        net: ResidualNet,
        bn: BatchNormMode,
        precision: Precision,
        y0_shape: Sequence[int],
        device: torch.device,
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

    def prepare(self, net: ResidualNet, y0_shape: Sequence[int], precision: Precision) -> Packed:
        packer, shape = _Packer(), y0_shape
        for block in _blocks(net):
            shape = packer.add(block, shape)
        return packer.packed()

    @torch.no_grad()
    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, Plan]:
        assert isinstance(prepared, Packed)
        bits: list[Tensor] = []
        y = y0
        for block in prepared.modules:
            y = _forward(block, y, bits)
        return y, Plan(prepared.blocks, prepared.units, prepared.weights, prepared.scales, torch.cat(bits, dim=1))

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(blocks, Plan)
        return native.routed_backward(grad.contiguous(), exponent.contiguous(), routing.contiguous(), *blocks.tensors)

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(blocks, Plan)
        return unfused.norms(
            lambda part: self.routed_backward(blocks, grad, exponent, part),
            len(grad),
            max(blocks.gradient_bytes, grad.nbytes),
            routing,
        )

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(prepared, Packed)
        return unfused.routed_forward(prepared.modules, y0, routing)


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


def _forward(block: Block, x: Tensor, bits: list[Tensor]) -> Tensor:
    """The block's output for its input [B, C, H, W]; appends the ReLU bits of its units, uint8 [B, bytes]."""
    form = block.fused_form()
    assert form is not None
    kept: dict[nn.Module, Tensor] = {}
    hooks = [unit.bn.register_forward_hook(_keep_bits(kept)) for unit in form.units]
    y: Tensor = block(x)
    for hook in hooks:
        hook.remove()
    bits += [kept[unit.bn] for unit in form.units]
    return y


def _keep_bits(kept: dict[nn.Module, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[module] = native.pack_bits(output.contiguous())

    return hook


class _Packer:
    """Packs one block after the other, and knows where in the buffers the next one lies."""

    def __init__(self) -> None:
        self.modules: list[Block] = []
        self.blocks: list[list[int]] = []
        self.units: list[list[int]] = []
        self.weights: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.bits_offset = 0

    def add(self, block: Block, shape: Sequence[int]) -> Sequence[int]:
        """Takes the shape (C, H, W) of the block's input, returns that of its output."""
        form = block.fused_form()
        assert form is not None
        first, own = len(self.units), shape
        for unit in form.units:
            out = self._add_unit(unit.conv, own, sum(map(len, self.scales)), self.bits_offset)
            self.bits_offset += -(-math.prod(own) // 8)
            self.scales.append(_scale(unit.bn))
            own = out
        count, projection = len(self.units) - first, -1
        if form.projection is not None:
            projection = len(self.units)
            self._add_unit(form.projection, shape, -1, -1)
        skip = PROJECTION if form.projection is not None else PAD if form.pad else IDENTITY
        self.modules.append(block)
        self.blocks.append([first, count, skip, projection, *shape, *own])
        return own

    def _add_unit(self, conv: nn.Conv2d, shape: Sequence[int], scale_offset: int, bits_offset: int) -> Sequence[int]:
        """Appends one row of the unit table; ``shape`` (C, H, W) of its input, returns that of its output."""
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in shape[1:]]
        out = (conv.out_channels, *sides)
        weight_offset = sum(map(len, self.weights))
        self.units.append([*shape, *out, kernel, stride, padding, weight_offset, scale_offset, bits_offset])
        self.weights.append(conv.weight.detach().flatten())
        return out

    def packed(self) -> Packed:
        return Packed(
            self.modules,
            torch.tensor(self.blocks, dtype=torch.int64),
            torch.tensor(self.units, dtype=torch.int64),
            torch.cat(self.weights),
            torch.cat(self.scales),
        )


def _scale(bn: nn.BatchNorm2d) -> Tensor:
    """float32 [C]: the factor of the affine map that BN is in evaluation mode."""
    assert bn.running_var is not None
    deviation = (bn.running_var.double() + bn.eps).sqrt()
    weight = torch.ones_like(deviation) if bn.weight is None else bn.weight.detach().double()
    return torch.as_tensor(weight / deviation).float()
