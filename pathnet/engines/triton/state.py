"""What lies in memory during a walk back, and during a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathnet.engines.triton.plan import Plan

__all__ = ["Activations", "Gradients", "Kept", "Tables", "to_device"]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that waits for nothing that the device has been asked for before."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class Tables:
    """A plan's rows, launches and states on a device, int32 [rows, 5], [launches, 2] and [states, 2]."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.rows = to_device(torch.from_numpy(plan.row_table()), device)
        self.launches = to_device(torch.from_numpy(plan.launch_table()), device)
        self.states = to_device(torch.from_numpy(plan.state_table()), device)


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps of its units for the walks back.

    Attributes:
        bits: uint8, the ReLU bits [B, H, W, ceil(C / 8)] of unit after unit.
        bits_starts: where each unit's begin.
        normalized: in the walk's type, what each BN made of its input before gain and bias, [B, H, W, C] of unit
            after unit, then of the blocks' ends; empty where no statistics depend on the batch.
        normalized_begin, normalized_starts: where each unit's begin, here and on the device (int64 [units]).
        scales: float32 [units, widest], gain / deviation.
    """

    bits: Tensor
    bits_starts: list[int]
    normalized: Tensor
    normalized_begin: list[int]
    normalized_starts: Tensor
    scales: Tensor

    def unit_bits(self, unit: int) -> Tensor:
        return self.bits[self.bits_starts[unit] :]

    def unit_normalized(self, unit: int) -> Tensor:
        return self.normalized[self.normalized_begin[unit] :] if self.normalized.numel() else self.normalized


@dataclass(frozen=True)
class Gradients:
    """The states of a walk back; see `plan`.

    Attributes:
        values: float32 or bfloat16 [slots, elements], each [B, H, W, C] of its place in the network.
        rows: int32 [rows, 5]
        launches: int32 [launches, 2], the first row and the number of rows of each.
        states: int32 [states, 2]
        largest: int32 [states, B] or [states, 1], at blocks' outputs: the bits of the largest magnitude.
        exponents: int32, alike: the value of a state is ``values * 2**exponents``.
        corrections: float32 [states, 2, widest], the two means that BN takes off a gradient.
        sums: float32, room for the tiles' shares of them.
        folded, constants: in the walk's type, room for weights and numbers that they are folded into.
        waits: whether those means depend on the gradient; with running statistics they are zero.
    """

    values: Tensor
    rows: Tensor
    launches: Tensor
    states: Tensor
    largest: Tensor
    exponents: Tensor
    corrections: Tensor
    sums: Tensor
    folded: Tensor
    constants: Tensor
    batch: int
    waits: bool

    @property
    def per_sample(self) -> bool:
        return not self.waits


@dataclass(frozen=True)
class Activations:
    """The states of a forward pass; see `plan`.

    Attributes:
        values: float32 or bfloat16 [slots, elements], each [B, H, W, C] of its place in the network.
        rows: int32 [rows, 5]
        launches: int32 [launches, 2], the first row and the number of rows of each.
        states: int32 [states, 2]
        statistics: float32 [states, 2, widest], mean and variance of each state; empty in BN mode ``running``.
        moments: float32, room for the tiles' shares of them.
    """

    values: Tensor
    rows: Tensor
    launches: Tensor
    states: Tensor
    statistics: Tensor
    moments: Tensor
    batch: int
