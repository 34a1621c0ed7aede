"""The cpu engine: BN-ReLU-conv blocks of any width, both BN modes, and post-activation blocks; in C++.

Thin: tables and packed weights go in, norms, gradients or outputs come out. The kernels, and the arithmetic of their
limits, are in csrc/cpu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathnet import native
from pathnet.engines.tables import GROUP, Tables, post_activation, tables, unsupported_form
from pathnet.models.residual_net import ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["CpuEngine", "CpuNetwork", "CpuRecord"]


@dataclass(frozen=True)
class CpuNetwork:
    """A network packed for the kernels.

    Attributes:
        tables: without the weights.
        backward, forward: uint8, the weights of the two walks.
        post: whether the blocks are post-activation ones, which the kernels take from sum to sum.
    """

    bn: BatchNormMode
    tables: Tables
    backward: Tensor
    forward: Tensor
    post: bool


@dataclass(frozen=True)
class CpuRecord:
    """What one forward pass leaves: in BN mode ``running`` the ReLU bits alone.

    Attributes:
        tables, backward: of the network.
        relu_bits: uint8 [B, bytes], see `pathnet.native.routed_backward`.
        normalized: float32, in BN mode ``batch`` what each BN made of its input before weight and bias.
        scales: float32, in BN mode ``batch`` the factors weight / deviation of this batch.
        last: of a post-activation network, the bits of the last join's ReLU, bool [B, C, H, W].
    """

    tables: Tables
    backward: Tensor
    relu_bits: Tensor
    normalized: Tensor | None = None
    scales: Tensor | None = None
    last: Tensor | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        own = (self.backward, self.relu_bits, self.normalized, self.scales, self.last)
        return [tensor for tensor in own if tensor is not None]

    @property
    def bn(self) -> BatchNormMode:
        return "running" if self.normalized is None else "batch"

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; of post-activation blocks the join's last."""
        units = [
            [self._unit_bits(unit) for unit in range(first, first + count)]
            for first, count in self.tables.blocks[:, :2].tolist()
        ]
        if self.last is None:
            return units
        joins = [*(own[0] for own in units[1:]), self.last]
        return [[*own[1:], join] for own, join in zip(units, joins, strict=True)]

    def _unit_bits(self, unit: int) -> Tensor:
        row = self.tables.units[unit].tolist()
        (channels, height, width), offset = row[:3], row[11]
        groups = -(-channels // GROUP)
        own = self.relu_bits[:, offset : offset + height * width * groups * GROUP // 8]
        bits = own[:, :, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1
        return bits.reshape(-1, height, width, groups * GROUP)[..., :channels].permute(0, 3, 1, 2).bool().contiguous()


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
        if precision == "float64":
            return f'no precision="{precision}"'
        if post_activation(net) and bn != "running":
            return f'its activations lie behind the additions, for which there is no bn="{bn}"'
        return unsupported_form(net, bn)

    def prepare(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]
    ) -> CpuNetwork:
        own = tables(net, bn, y0_shape)
        given = own.blocks, own.units, own.weights, own.scales
        bf16 = precision == "bfloat16"
        backward = native.cpu_pack(*given, True, bn == "running", bf16)
        forward = native.cpu_pack(*given, False, False, bf16)
        return CpuNetwork(bn, replace(own, weights=own.weights.new_empty(0)), backward, forward, post_activation(net))

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, CpuRecord]:
        assert isinstance(prepared, CpuNetwork)
        everything = y0.new_ones(1, len(prepared.tables.blocks), 2)
        y, *kept = _forward(prepared, y0, everything, record=True)
        record = CpuRecord(prepared.tables, prepared.backward, *kept)
        if not prepared.post:
            return y[0], record
        # The first block begins behind a ReLU that is not its own: what comes out of it passes, zeros too.
        shape, begin = record.tables.units[0, :3].tolist(), int(record.tables.units[0, 11])
        record.relu_bits[:, begin : begin + shape[1] * shape[2] * -(-shape[0] // GROUP) * GROUP // 8] = 255
        return y[0].relu(), replace(record, last=y[0] > 0)

    def sums_by_length(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, gradient, exponents = _sums_by_length(blocks, grad, exponent, routing, gradients=True)
        return gradient, exponents

    def sums_by_length_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return _sums_by_length(blocks, grad, exponent, routing, gradients=False)[0]

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(prepared, CpuNetwork)
        output = _forward(prepared, y0, routing, record=False)[0]
        return output.relu_() if prepared.post else output

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, gradient, exponents = _backward(blocks, grad, exponent, routing, gradients=True)
        return gradient, exponents

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return _backward(blocks, grad, exponent, routing, gradients=False)[0]


def _forward(network: CpuNetwork, y0: Tensor, routing: Tensor, record: bool) -> tuple[Tensor, ...]:
    """The outputs, and what a record keeps.

    Raises:
        ValueError: what enters post-activation blocks did not come out of a ReLU, or batch statistics have one value.
    """
    own = network.tables
    if network.post and (y0 < 0).any():
        # The kernels take it behind the first unit's ReLU, which would cut it off.
        raise ValueError(
            "net: expected a stem that ends in a ReLU before post-activation blocks for the cpu engine, got values "
            f'below zero, down to {float(y0.min()):.3g}; engine="reference" serves'
        )
    given = y0.contiguous(), routing.to(y0.device).contiguous(), own.blocks, own.units, own.scales, own.shifts
    if network.bn == "running":
        return native.routed_forward(*given, own.biases, network.forward, record)
    if len(y0) == 1 and (own.units[own.units[:, 10] >= 0, 1:3].prod(1) == 1).any():
        raise ValueError("images: expected more than one value a channel for batch statistics, got one")
    return native.batch_forward(*given, own.epsilons, network.forward, record)


Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _given(blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> tuple[CpuRecord, Given]:
    """The record, and what all walks back are given."""
    assert isinstance(blocks, CpuRecord)
    if blocks.last is not None:
        grad = grad * blocks.last
    routing = routing.to(grad.device).contiguous()
    return blocks, (grad.contiguous(), exponent.contiguous(), routing, blocks.tables.blocks, blocks.tables.units)


def _backward(
    blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    record, given = _given(blocks, grad, exponent, routing)
    if record.normalized is None or record.scales is None:
        return native.routed_backward(*given, record.backward, record.relu_bits, gradients)
    return native.batch_backward(
        *given, record.backward, record.relu_bits, record.normalized, record.scales, gradients
    )


def _sums_by_length(
    blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    record, given = _given(blocks, grad, exponent, routing)
    if record.normalized is None or record.scales is None:
        return native.sums_by_length(*given, record.backward, record.relu_bits, gradients)
    return native.batch_sums_by_length(
        *given, record.backward, record.relu_bits, record.normalized, record.scales, gradients
    )
