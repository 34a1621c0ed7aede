"""The cpu engine: BN-ReLU-conv blocks in BN mode ``running``, float32, every (path, sample) in one C++ walk.

In that mode BN is an affine map of each channel, so a walk needs of the forward pass only the ReLU bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet import native
from pathnet.engines import unfused
from pathnet.engines.tables import Tables, blocks_of, tables, unsupported_form
from pathnet.models.residual_net import Block, ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["CpuEngine", "Packed", "Plan"]


@dataclass(frozen=True)
class Packed:
    """The network as the kernel reads it.

    Attributes:
        modules: the blocks themselves, for the forward pass.
    """

    modules: Sequence[Block]
    tables: Tables

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.tables.blocks, self.tables.units, self.tables.weights, self.tables.scales


@dataclass(frozen=True)
class Plan:
    """A recorded pass as the kernel reads it.

    Attributes:
        packed: the network.
        relu_bits: uint8 [B, bytes]
    """

    packed: Packed
    relu_bits: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        return *self.packed.tensors, self.relu_bits

    @property
    def gradient_bytes(self) -> int:
        """Of the largest gradient at a block's input: float32 [B, C, H, W]."""
        return 4 * len(self.relu_bits) * int(self.packed.tables.blocks[:, 4:7].prod(1).max())

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][unit]``, bool [B, C, H, W]."""
        return [
            [self._unit_bits(unit) for unit in range(first, first + count)]
            for first, count in self.packed.tables.blocks[:, :2].tolist()
        ]

    def _unit_bits(self, unit: int) -> Tensor:
        row = self.packed.tables.units[unit].tolist()
        (channels, height, width), offset = row[:3], row[11]
        elements = channels * height * width
        packed = self.relu_bits[:, offset : offset + -(-elements // 8)]
        unpacked = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return unpacked.flatten(1)[:, :elements].bool().reshape(-1, channels, height, width)


class CpuEngine:
    """Native code for the processor, its instruction set chosen at run time."""

    name = "cpu"
    device_type: str | None = "cpu"

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
        return unsupported_form(net)

    def prepare(self, net: ResidualNet, y0_shape: Sequence[int], precision: Precision) -> Packed:
        return Packed(list(blocks_of(net)), tables(net, y0_shape))

    @torch.no_grad()
    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, Plan]:
        assert isinstance(prepared, Packed)
        bits: list[Tensor] = []
        y = y0
        for block in prepared.modules:
            y = _forward(block, y, bits)
        return y, Plan(prepared, torch.cat(bits, dim=1))

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
