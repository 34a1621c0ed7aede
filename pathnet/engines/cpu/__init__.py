"""The cpu engine, in C++: BN-ReLU-conv and post-activation blocks of any width, in both BN modes.

This layer only packs tables and weights, and returns norms, gradients or outputs. The kernels, and the arithmetic of
their limits, are in csrc/cpu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathnet import native, scaling
from pathnet.engines.cpu import ops
from pathnet.engines.engine import Job
from pathnet.engines.forms import post_activation, unsupported_form
from pathnet.engines.magnitudes import Magnitudes, divided, multiplied
from pathnet.engines.tables import GROUP, BlockColumn, Tables, UnitColumn, tables
from pathnet.models.context import Context
from pathnet.recording import BatchNormMode
from pathnet.scaling import ScaledGradient

__all__ = ["CpuEngine", "CpuPrepared", "CpuWalk"]


class CpuEngine:
    """Native code for the processor, its instruction set chosen at run time."""

    name = "cpu"
    device_type: str | None = "cpu"

    def unavailable(self) -> str | None:
        return None if native.LOADED else native.WHY_NOT

    def unsupported(self, job: Job) -> str | None:
        if job.device.type != "cpu":
            return f"the network is on {job.device}"
        if job.precision in ("float64", "network"):
            return f'no precision="{job.precision}"'
        return unsupported_form(job.net, job.bn)

    def prepare(self, job: Job) -> CpuPrepared:
        forward = tables(job.net, job.bn, job.y0_shape)
        backward, bf16 = divided(forward), job.precision == "bfloat16"
        return CpuPrepared(
            job.bn,
            replace(forward, weights=forward.weights.new_empty(0)),
            ops.cpu_pack(backward.tables, True, job.bn, bf16),
            ops.cpu_pack(forward, False, job.bn, bf16),
            post_activation(job.net),
            backward.magnitudes,
            backward.by_channel,
        )


@dataclass(frozen=True)
class CpuPrepared:
    """A network packed for the kernels.

    Attributes:
        tables: the network's tables, without the weights.
        backward, forward: uint8, the plans as each direction's kernels read them.
        post: whether the blocks are post-activation ones, whose boundaries are at the additions.
        magnitudes: the powers of two that the backward pass's factors were divided by; None if nothing was divided.
        scale_exponents: int32, the power of two that each of ``tables.scales`` is divided by.
    """

    bn: BatchNormMode
    tables: Tables
    backward: Tensor
    forward: Tensor
    post: bool
    magnitudes: Magnitudes | None
    scale_exponents: Tensor

    def bound(self, context: Context) -> CpuPrepared:
        return self

    def max_routings(self, y0: Tensor) -> int | None:
        return None

    def record(self, y0: Tensor) -> tuple[Tensor, CpuWalk]:
        ones = y0.new_ones(1, len(self.tables.blocks), 2)
        y, *recorded = self._forward(y0, ones, record=True)
        walk = CpuWalk(self.tables, self.backward, self.magnitudes, *recorded)
        if self.magnitudes is not None and walk.scales is not None:
            walk = replace(walk, scales=scaling.times_power_of_two(walk.scales, -self.scale_exponents))
        return (y[0].relu(), replace(walk, last=y[0] > 0)) if self.post else (y[0], walk)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        output = self._forward(y0, routing, record=False)[0]
        return output.relu_() if self.post else output

    def _forward(self, y0: Tensor, routing: Tensor, record: bool) -> tuple[Tensor, ...]:
        """Return the outputs, and the tensors of a record.

        Raises:
            ValueError: batch statistics over a single value.
        """
        arguments = y0.contiguous(), routing.to(y0.device).contiguous(), self.forward, record
        if self.bn == "running":
            return ops.cpu_forward_running(*arguments)
        units = self.tables.units
        pixels = units[:, UnitColumn.HEIGHT] * units[:, UnitColumn.WIDTH]
        if len(y0) == 1 and (pixels[units[:, UnitColumn.SCALES] >= 0] == 1).any():
            raise ValueError("images: expected more than one value per channel for batch statistics, got one")
        return ops.cpu_forward_batch(*arguments)


Walked = tuple[Tensor, Tensor, Tensor]
"""Norms, mantissas and exponents, as the ops return them; see `ops.cpu_backward_running`."""

Op = Callable[..., Walked]


@dataclass(frozen=True)
class CpuWalk:
    """The record of one forward pass: in BN mode ``running`` only the ReLU bits.

    Attributes:
        tables, backward, magnitudes: those of the network.
        relu_bits: uint8 [B, bytes], see `ops.cpu_backward_running`.
        normalized: float32, in BN mode ``batch`` the output of each BN before weight and bias.
        scales: float32, in BN mode ``batch`` the factors weight / deviation of this batch.
        last: the bits of the last join's ReLU in a post-activation network, bool [B, C, H, W].
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
        tensors = (self.backward, self.relu_bits, self.normalized, self.scales, self.last)
        return [tensor for tensor in tensors if tensor is not None]

    def max_routings(self) -> int | None:
        return None

    @property
    def bn(self) -> BatchNormMode:
        return "running" if self.normalized is None else "batch"

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        return ScaledGradient(*self._walk(*self._backward(routing), start, gradients=True)[1:])

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return self._walk(*self._backward(routing), start, gradients=False)[0]

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        return ScaledGradient(*self._walk(*self._sums(routing), start, gradients=True)[1:])

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return self._walk(*self._sums(routing), start, gradients=False)[0]

    def _backward(self, routing: Tensor) -> tuple[Op, Tensor, Tensor | None]:
        """Return the op, the routing of the divided network, and the powers of two that it leaves out."""
        op = ops.cpu_backward_running if self.bn == "running" else ops.cpu_backward_batch
        if self.magnitudes is None:
            return op, routing, None
        routing, shifts = self.magnitudes.of_routing(routing)
        return op, routing, shifts[:, None]

    def _sums(self, routing: Tensor) -> tuple[Op, Tensor, Tensor | None]:
        op = ops.cpu_sums_by_length_running if self.bn == "running" else ops.cpu_sums_by_length_batch
        return op, *((routing, None) if self.magnitudes is None else self.magnitudes.of_sums(routing))

    def _walk(self, op: Op, routing: Tensor, shifts: Tensor | None, start: ScaledGradient, gradients: bool) -> Walked:
        mantissa, exponent = start
        if self.last is not None:
            mantissa = mantissa * self.last
        walked = op(
            mantissa.contiguous(),
            exponent.contiguous(),
            routing.to(mantissa.device).contiguous(),
            self.backward,
            self.relu_bits,
            *(() if self.normalized is None else (self.normalized, self.scales)),
            gradients,
        )
        return walked if shifts is None else multiplied(*walked, shifts)

    def bits(self) -> list[list[Tensor]]:
        """Return the recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; for post-activation blocks
        the join's bits come last."""
        bits = [
            [self._unit_bits(unit) for unit in range(first, first + count) if self._has_relu(unit)]
            for first, count in self.tables.blocks[:, [BlockColumn.FIRST, BlockColumn.COUNT]].tolist()
        ]
        if self.last is None:
            return bits
        # A join is the ReLU of the next block's first unit; the first block's first unit has none.
        joins = [*(bits_of_block[0] for bits_of_block in bits[1:]), self.last]
        inner = [bits[0], *(bits_of_block[1:] for bits_of_block in bits[1:])]
        return [[*bits_of_block, join] for bits_of_block, join in zip(inner, joins, strict=True)]

    def _has_relu(self, unit: int) -> bool:
        return bool(self.tables.units[unit, UnitColumn.BITS] >= 0)

    def _unit_bits(self, unit: int) -> Tensor:
        row = self.tables.units[unit].tolist()
        channels, height, width = (
            row[column] for column in (UnitColumn.CHANNELS, UnitColumn.HEIGHT, UnitColumn.WIDTH)
        )
        offset, groups = row[UnitColumn.BITS], -(-channels // GROUP)
        packed = self.relu_bits[:, offset : offset + height * width * groups * GROUP // 8]
        bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1
        return bits.reshape(-1, height, width, groups * GROUP)[..., :channels].permute(0, 3, 1, 2).bool().contiguous()
