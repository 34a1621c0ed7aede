"""The cpu engine: BN-ReLU-conv blocks and post-activation ones, of any width, in both BN modes; in C++.

Thin: tables and packed weights go in, norms, gradients or outputs come out. The kernels, and the arithmetic of their
limits, are in csrc/cpu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathnet import native, scaling
from pathnet.engines.cpu import ops
from pathnet.engines.forms import GROUP, Tables, post_activation, tables, unsupported_form
from pathnet.engines.magnitudes import Magnitudes, divided, multiplied
from pathnet.models.residual_net import ResidualNet
from pathnet.recording import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["CpuEngine", "CpuNetwork", "CpuRecord"]


@dataclass(frozen=True)
class CpuNetwork:
    """A network packed for the kernels.

    Attributes:
        tables: without the weights.
        backward, forward: uint8, the weights of the two walks.
        post: whether the blocks are post-activation ones, which the kernels take from sum to sum.
        magnitudes: what was taken out of the factors of the walk back; None where nothing was.
        scale_exponents: int32, one for each of ``tables.scales``: the powers of two taken out of them.
    """

    bn: BatchNormMode
    tables: Tables
    backward: Tensor
    forward: Tensor
    post: bool
    magnitudes: Magnitudes | None
    scale_exponents: Tensor


@dataclass(frozen=True)
class CpuRecord:
    """What one forward pass leaves: in BN mode ``running`` the ReLU bits alone.

    Attributes:
        tables, backward: of the network.
        relu_bits: uint8 [B, bytes], see `pathnet.engines.cpu.ops.cpu_backward_running`.
        normalized: float32, in BN mode ``batch`` what each BN made of its input before weight and bias.
        scales: float32, in BN mode ``batch`` the factors weight / deviation of this batch.
        last: of a post-activation network, the bits of the last join's ReLU, bool [B, C, H, W].
        magnitudes: of the network.
    """

    tables: Tables
    backward: Tensor
    magnitudes: Magnitudes | None
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
        first, *others = [
            [self._unit_bits(unit) for unit in range(first, first + count) if self.tables.units[unit, 11] >= 0]
            for first, count in self.tables.blocks[:, :2].tolist()
        ]
        if self.last is None:
            return [first, *others]
        # The first block's first unit has no ReLU, which would be the join of a block before it.
        joins, inner = [*(own[0] for own in others), self.last], [first, *(own[1:] for own in others)]
        return [[*own, join] for own, join in zip(inner, joins, strict=True)]

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
        return unsupported_form(net, bn)

    def prepare(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]
    ) -> CpuNetwork:
        forward = tables(net, bn, y0_shape)
        backward, bf16 = divided(forward), precision == "bfloat16"
        return CpuNetwork(
            bn,
            replace(forward, weights=forward.weights.new_empty(0)),
            ops.cpu_pack(backward.tables, True, bn, bf16),
            ops.cpu_pack(forward, False, bn, bf16),
            post_activation(net),
            backward.magnitudes,
            backward.by_channel,
        )

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, CpuRecord]:
        assert isinstance(prepared, CpuNetwork)
        everything = y0.new_ones(1, len(prepared.tables.blocks), 2)
        y, *kept = _forward(prepared, y0, everything, record=True)
        record = CpuRecord(prepared.tables, prepared.backward, prepared.magnitudes, *kept)
        if prepared.magnitudes is not None and record.scales is not None:
            scales = scaling.times_power_of_two(record.scales, -prepared.scale_exponents)
            record = replace(record, scales=scales)
        return (y[0].relu(), replace(record, last=y[0] > 0)) if prepared.post else (y[0], record)

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
        ValueError: batch statistics have one value.
    """
    units, routing = network.tables.units, routing.to(y0.device).contiguous()
    if network.bn == "running":
        return ops.cpu_forward_running(y0.contiguous(), routing, network.forward, record)
    if len(y0) == 1 and (units[units[:, 10] >= 0, 1:3].prod(1) == 1).any():
        raise ValueError("images: expected more than one value a channel for batch statistics, got one")
    return ops.cpu_forward_batch(y0.contiguous(), routing, network.forward, record)


Walked = tuple[Tensor, Tensor, Tensor]
"""Norms, gradients, exponents; see `pathnet.engines.cpu.ops.cpu_backward_running`."""


def _backward(blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool) -> Walked:
    assert isinstance(blocks, CpuRecord)
    if blocks.magnitudes is None:
        return _walked_back(blocks, grad, exponent, routing, gradients)
    routing, shifts = blocks.magnitudes.of_routing(routing)
    return multiplied(*_walked_back(blocks, grad, exponent, routing, gradients), shifts[:, None])


def _walked_back(record: CpuRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool) -> Walked:
    walk = _walk_arguments(record, grad, exponent, routing)
    if record.normalized is None or record.scales is None:
        return ops.cpu_backward_running(*walk, gradients)
    return ops.cpu_backward_batch(*walk, record.normalized, record.scales, gradients)


def _sums_by_length(blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool) -> Walked:
    assert isinstance(blocks, CpuRecord)
    if blocks.magnitudes is None:
        return _summed_up(blocks, grad, exponent, routing, gradients)
    routing, shift = blocks.magnitudes.of_sums(routing)
    return multiplied(*_summed_up(blocks, grad, exponent, routing, gradients), shift)


def _summed_up(record: CpuRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool) -> Walked:
    walk = _walk_arguments(record, grad, exponent, routing)
    if record.normalized is None or record.scales is None:
        return ops.cpu_sums_by_length_running(*walk, gradients)
    return ops.cpu_sums_by_length_batch(*walk, record.normalized, record.scales, gradients)


def _walk_arguments(
    record: CpuRecord, grad: Tensor, exponent: Tensor, routing: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments that all walks back begin with: gradient, exponents, routing, plan, ReLU bits."""
    if record.last is not None:
        grad = grad * record.last
    routing = routing.to(grad.device).contiguous()
    return grad.contiguous(), exponent.contiguous(), routing, record.backward, record.relu_bits
