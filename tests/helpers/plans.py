"""A network and the inputs of passes through it, as arguments of the cpu engine's ops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet.engines.cpu import ops
from pathnet.engines.tables import GROUP, Skip, Tables, UnitColumn

IDENTITY, PROJECTION, PAD, ACTIVATED, ACTIVATED_PAD = Skip
BEFORE_RELU, BEHIND_RELU = (IDENTITY, PROJECTION, PAD), (PROJECTION, ACTIVATED, ACTIVATED_PAD)


@dataclass(frozen=True)
class Plan:
    """A network's tables and the other arguments of passes through it; see `pathnet.engines.cpu.ops`.

    ``bits`` and ``normalized``, float64 [B, C, H, W] of each unit, are as random as the weights: a backward pass is a
    linear map for any of them.
    """

    blocks: Tensor
    units: Tensor
    weights: Tensor
    scales: Tensor
    shifts: Tensor
    epsilons: Tensor
    biases: Tensor
    bits: list[Tensor | None]
    normalized: list[Tensor | None]
    y0: Tensor
    grad: Tensor
    exponent: Tensor
    routing: Tensor

    @property
    def least_values(self) -> int:
        """Return the number of values of a channel over the batch, at the BN that has fewest."""
        return min(len(values) * values[0, 0].numel() for values in self.normalized if values is not None)

    def weights_of(self, unit: int) -> slice:
        row = self.units[unit].tolist()
        size = row[UnitColumn.CHANNELS] * row[UnitColumn.OUT_CHANNELS] * row[UnitColumn.KERNEL] ** 2
        return slice(row[UnitColumn.WEIGHTS], row[UnitColumn.WEIGHTS] + size)

    def without_samples(self) -> Plan:
        bits, normalized = ([None if x is None else x[:0] for x in xs] for xs in (self.bits, self.normalized))
        return replace(self, bits=bits, normalized=normalized, y0=self.y0[:0], grad=self.grad[:0])

    def relu_bits(self) -> Tensor:
        """Return uint8 [B, bytes]: for each unit [H, W, groups], two bytes each, the first channel lowest."""
        rows = torch.zeros(len(self.y0), bits_size(self.units), dtype=torch.uint8)
        for unit, bits in zip(self.units.tolist(), self.bits, strict=True):
            if bits is not None:
                packed = np.packbits(by_pixel(bits).numpy().astype(bool), axis=3, bitorder="little")
                begin = unit[UnitColumn.BITS]
                end = begin + math.prod(packed.shape[1:])
                rows[:, begin:end] = torch.from_numpy(packed).flatten(1)
        return rows

    @property
    def tables(self) -> Tables:
        return Tables(self.blocks, self.units, self.weights, self.scales, self.shifts, self.epsilons, self.biases)

    def pack(self, backward: bool, bn: Any, bf16: bool = False) -> Tensor:
        return ops.cpu_pack(self.tables, backward, bn, bf16)

    def backward_arguments(self, bn: str, bf16: bool = False, gradients: bool = True) -> tuple[Any, ...]:
        """Return the arguments of `ops.cpu_backward_running` or, in BN mode ``batch``, `ops.cpu_backward_batch`."""
        exponent = self.exponent[: len(self.grad) if bn == "running" else 1]
        walk = self.grad, exponent, self.routing, self.pack(True, bn, bf16), self.relu_bits()
        if bn == "running":
            return *walk, gradients
        rows = torch.cat([by_pixel(x).flatten() for x in self.normalized if x is not None]).float()
        return *walk, rows, self.scales, gradients

    def sums_arguments(self, bn: str, bf16: bool = False, gradients: bool = True) -> tuple[Any, ...]:
        """Return the arguments of the sums by length, with the last routing."""
        grad, exponent, routings, *record = self.backward_arguments(bn, bf16, gradients)
        return grad, exponent, routings[-1].contiguous(), *record

    def forward_arguments(self, bn: str, record: bool = False) -> tuple[Any, ...]:
        routing = torch.ones_like(self.routing[:1]) if record else self.routing
        return self.y0, routing, self.pack(False, bn), record


BACKWARD = {"running": ops.cpu_backward_running, "batch": ops.cpu_backward_batch}
SUMS = {"running": ops.cpu_sums_by_length_running, "batch": ops.cpu_sums_by_length_batch}
FORWARD = {"running": ops.cpu_forward_running, "batch": ops.cpu_forward_batch}


def walked(plan: Plan, bn: str, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """Return the kernels' gradients as float64 [P, B, C, H, W], and norms [P, B]."""
    norms, grad, exponent = BACKWARD[bn](*plan.backward_arguments(bn, bf16))
    return torch.ldexp(grad.double(), exponent[:, :, None, None, None]), norms


def by_pixel(x: Tensor) -> Tensor:
    """Return [B, H, W, C zero-padded to groups of 16] from [B, C, H, W]."""
    return F.pad(x.permute(0, 2, 3, 1), (0, -x.shape[1] % GROUP))


def bits_size(units: Tensor) -> int:
    rectified = units[units[:, UnitColumn.BITS] >= 0]
    groups = (rectified[:, UnitColumn.CHANNELS] + GROUP - 1) // GROUP
    sizes = rectified[:, UnitColumn.HEIGHT] * rectified[:, UnitColumn.WIDTH] * groups * 2
    return max((rectified[:, UnitColumn.BITS] + sizes).tolist(), default=0)
