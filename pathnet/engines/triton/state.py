"""What lies in memory during a walk back, and during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import NOTHING, Plan, Schedule

__all__ = ["Activations", "Allocate", "Gradients", "Kept", "Tables", "allocate_on"]

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Takes a shape and a type to a tensor of whatever lies there."""


def allocate_on(device: torch.device) -> Allocate:
    return lambda shape, dtype: torch.empty(*shape, dtype=dtype, device=device)


class Tables:
    """A plan's numbers on a device, each kind at a fixed place of one tensor, so that one copy brings them there.

    Attributes:
        packed: int32, all of them.
        mantissas, exponents, finals: float64, int32 and int32 [capacity]; without routings 0, 0 and `NOTHING`.
        launches: int32 [launches, 2]
        states: int32 [states, 2]
        rows: int32 [rows, 5], as many as there can be.
    """

    def __init__(self, schedule: Schedule, allocate: Allocate) -> None:
        capacity = schedule.capacity
        # Rows last, of which there are rarely as many as there can be.
        words = [
            2 * capacity,
            capacity,
            capacity,
            2 * len(schedule.launches),
            2 * schedule.state_count,
            5 * schedule.row_count,
        ]
        # Each from 16 bytes to 16 bytes, as Triton likes pointers.
        self._ends = np.cumsum([-(-count // 4) * 4 for count in words]).tolist()
        self.schedule, self.packed = schedule, allocate([self._ends[-1]], torch.int32)
        begins = [0, *self._ends]
        parts = [self.packed[begin : begin + count] for begin, count in zip(begins, words, strict=False)]
        self.mantissas, self.exponents, self.finals = parts[0].view(torch.float64), parts[1], parts[2]
        self.launches, self.states, self.rows = parts[3].view(-1, 2), parts[4].view(-1, 2), parts[5].view(-1, 5)

    def pack(self, plan: Plan) -> NDArray[np.int32]:
        """Return on the host what `packed` is to hold."""
        words = np.zeros(self._ends[-1], dtype=np.int32)
        self._write(plan, words)
        return words

    def copy(self, plan: Plan) -> None:
        """Bring the plan to the device; waits for nothing."""
        used = self._ends[4] + plan.rows.size
        words = torch.empty(used, dtype=torch.int32, pin_memory=self.packed.device.type == "cuda")
        self._write(plan, words.numpy())
        self.packed[:used].copy_(words, non_blocking=True)

    def _write(self, plan: Plan, words: NDArray[np.int32]) -> None:
        count = len(plan.finals)
        begins = [0, *self._ends]
        whole = [words[first:last] for first, last in zip(begins, self._ends, strict=False)]
        for part, values, rest in (
            (whole[0].view(np.float64), plan.mantissas, 0.0),
            (whole[1], plan.exponents, 0),
            (whole[2], plan.finals, NOTHING),
        ):
            part[:count], part[count:] = values, rest
        whole[3][: plan.launches.size] = plan.launches.ravel()
        whole[4][: plan.states.size] = plan.states.ravel()
        whole[5][: plan.rows.size] = plan.rows.ravel()


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.bits, self.normalized, self.normalized_starts, self.scales

    @staticmethod
    def room(network: TritonNetwork, batch: int, allocate: Allocate) -> Kept:
        """Return room for what batches of one size leave."""
        begin = network.normalized_starts(batch)
        return Kept(
            allocate([network.bits_starts(batch)[-1]], torch.uint8),
            network.bits_starts(batch),
            allocate([begin[-1] if network.bn == "batch" else 0], network.walk_dtype),
            begin,
            allocate([len(begin) - 1], torch.int64),
            allocate(network.affine[:, 0].shape, torch.float32),
        )

    def clone(self) -> Kept:
        bits, normalized, starts, scales = (tensor.clone() for tensor in self.tensors)
        return Kept(bits, self.bits_starts, normalized, self.normalized_begin, starts, scales)

    def copy(self, kept: Kept) -> None:
        """Take over what lies elsewhere."""
        for tensor, values in zip(self.tensors, kept.tensors, strict=True):
            tensor.copy_(values)

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
