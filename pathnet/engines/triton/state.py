"""Device memory of backward and forward passes: the plan's numbers, a record's saved tensors, and the states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import LaunchPlan
from pathnet.engines.triton.schedule import NOTHING, Schedule

__all__ = ["ActivationStates", "Allocate", "GradientStates", "PlanBuffer", "Saved", "allocate_on"]

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""A function that allocates an uninitialised tensor of a shape and a dtype."""


def allocate_on(device: torch.device) -> Allocate:
    return lambda shape, dtype: torch.empty(*shape, dtype=dtype, device=device)


class PlanBuffer:
    """A `LaunchPlan` on a device: its tensors are slices of one tensor, so that one copy transfers them.

    Attributes:
        packed: int32, the numbers of all tensors below.
        mantissas, exponents, finals: float64, int32 and int32 [capacity]; 0, 0 and `NOTHING` beyond the routings.
        launches: int32 [launches, 2]
        states: int32 [states, 2]
        rows: int32 [rows, 5], the maximum number of rows.
    """

    def __init__(self, schedule: Schedule, allocate: Allocate) -> None:
        capacity = schedule.capacity
        # Rows last, since there are rarely as many as the maximum.
        words = [
            2 * capacity,
            capacity,
            capacity,
            2 * len(schedule.launches),
            2 * schedule.state_count,
            5 * schedule.row_count,
        ]
        # Aligned to 16 bytes, for which Triton specialises kernels.
        self._ends = np.cumsum([-(-count // 4) * 4 for count in words]).tolist()
        self.schedule, self.packed = schedule, allocate([self._ends[-1]], torch.int32)
        begins = [0, *self._ends]
        parts = [self.packed[begin : begin + count] for begin, count in zip(begins, words, strict=False)]
        self.mantissas, self.exponents, self.finals = parts[0].view(torch.float64), parts[1], parts[2]
        self.launches, self.states, self.rows = parts[3].view(-1, 2), parts[4].view(-1, 2), parts[5].view(-1, 5)

    def pack(self, plan: LaunchPlan) -> NDArray[np.int32]:
        """Return the contents of `packed` for a plan, on the host."""
        words = np.zeros(self._ends[-1], dtype=np.int32)
        self._write(plan, words)
        return words

    def copy(self, plan: LaunchPlan) -> None:
        """Copy a plan to the device without waiting."""
        used = self._ends[4] + plan.rows.size
        words = torch.empty(used, dtype=torch.int32, pin_memory=self.packed.device.type == "cuda")
        self._write(plan, words.numpy())
        self.packed[:used].copy_(words, non_blocking=True)

    def _write(self, plan: LaunchPlan, words: NDArray[np.int32]) -> None:
        count = len(plan.finals)
        begins = [0, *self._ends]
        parts = [words[first:last] for first, last in zip(begins, self._ends, strict=False)]
        for part, values, filling in (
            (parts[0].view(np.float64), plan.mantissas, 0.0),
            (parts[1], plan.exponents, 0),
            (parts[2], plan.finals, NOTHING),
        ):
            part[:count], part[count:] = values, filling
        parts[3][: plan.launches.size] = plan.launches.ravel()
        parts[4][: plan.states.size] = plan.states.ravel()
        parts[5][: plan.rows.size] = plan.rows.ravel()


@dataclass(frozen=True)
class Saved:
    """Tensors that a forward pass saves for the backward passes.

    Attributes:
        bits: uint8, the ReLU bits [B, H, W, ceil(C / 8)] of one unit after the other.
        bits_starts: first byte of each unit.
        normalized: x_hat, each BN's normalised input before gain and bias, in the backward passes' type, [B, H, W, C]
            of one unit after the other, then of the blocks' ends; empty unless statistics are the batch's.
        normalized_begin, normalized_starts: each unit's first element, on the host and on the device (int64 [units]).
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
    def room(network: TritonNetwork, batch: int, allocate: Allocate) -> Saved:
        """Allocate the tensors for batches of one size."""
        begin = network.normalized_starts(batch)
        return Saved(
            allocate([network.bits_starts(batch)[-1]], torch.uint8),
            network.bits_starts(batch),
            allocate([begin[-1] if network.bn == "batch" else 0], network.backward_dtype),
            begin,
            allocate([len(begin) - 1], torch.int64),
            allocate(network.affine[:, 0].shape, torch.float32),
        )

    def clone(self) -> Saved:
        bits, normalized, starts, scales = (tensor.clone() for tensor in self.tensors)
        return Saved(bits, self.bits_starts, normalized, self.normalized_begin, starts, scales)

    def copy(self, saved: Saved) -> None:
        """Copy the contents of another record of the same sizes."""
        for tensor, values in zip(self.tensors, saved.tensors, strict=True):
            tensor.copy_(values)

    def unit_bits(self, unit: int) -> Tensor:
        return self.bits[self.bits_starts[unit] :]

    def unit_normalized(self, unit: int) -> Tensor:
        return self.normalized[self.normalized_begin[unit] :] if self.normalized.numel() else self.normalized


@dataclass(frozen=True)
class GradientStates:
    """The states of a backward pass; see `schedule`.

    Attributes:
        values: float32 or bfloat16 [slots, elements], each [B, H, W, C] of its unit or block.
        rows: int32 [rows, 5]
        launches: int32 [launches, 2], each launch's first row and number of rows.
        states: int32 [states, 2]
        largest: int32 [states, B] or [states, 1], at blocks' outputs: the largest magnitude, as float32 bits.
        exponents: int32, alike: the value of a state is ``values * 2**exponents``.
        corrections: float32 [states, 2, widest], the two means that BN subtracts from a gradient.
        sums: float32, memory for the tiles' shares of them.
        folded, constants: in the type of ``values``, memory for weights and constants that they are folded into.
        by_batch: whether those means depend on the gradient; with running statistics they are zero.
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
    by_batch: bool


@dataclass(frozen=True)
class ActivationStates:
    """The states of a forward pass; see `schedule`.

    Attributes:
        values: float32 or bfloat16 [slots, elements], each [B, H, W, C] of its unit or block.
        rows: int32 [rows, 5]
        launches: int32 [launches, 2], each launch's first row and number of rows.
        states: int32 [states, 2]
        statistics: float32 [states, 2, widest], mean and variance of each state; empty in BN mode ``running``.
        moments: float32, memory for the tiles' shares of them.
    """

    values: Tensor
    rows: Tensor
    launches: Tensor
    states: Tensor
    statistics: Tensor
    moments: Tensor
    batch: int
