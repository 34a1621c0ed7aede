"""Backward passes under routings, over the record of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.transfers import to_device
from pathnet.engines.triton.arrivals import arrived, squared_norms
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles, dgrad_tile
from pathnet.engines.triton.endings import ending_backward, ending_point_tiles
from pathnet.engines.triton.folding import constants_size, folded_size
from pathnet.engines.triton.network import FusedBlock, TritonNetwork
from pathnet.engines.triton.plan import LaunchPlan, plan_backward, plan_launches
from pathnet.engines.triton.schedule import Launch, Schedule
from pathnet.engines.triton.state import Allocate, GradientStates, PlanBuffer, Saved, allocate_on
from pathnet.engines.triton.steps import Exit, Steps
from pathnet.scaling import ScaledGradient

__all__ = [
    "BackwardPass",
    "SingleBlocks",
    "dgrad_paths",
    "routed_backward",
    "routed_backward_norms",
    "schedule_backward",
]

Coefficients = Sequence[tuple[float, ...]]


def dgrad_paths(blocks: Sequence[FusedBlock]) -> Callable[[int, int], int]:
    """Return a function from block and unit to the number of rows in a tile."""
    return lambda block, unit: dgrad_tile(blocks[block].convolutions[unit]).paths


def schedule_backward(network: TritonNetwork, capacity: int, exits: frozenset[Exit]) -> Schedule:
    blocks = network.blocks
    return Schedule(blocks, True, capacity, exits, 1, network.bn == "batch", dgrad_paths(blocks))


class BackwardPass:
    """A backward pass over batches of one size: its states in memory, and the launches over them.

    Args:
        saved: tensors of the record.
        buffer: memory for its plans.
        sums: whether BN's two sums are requested; BN mode ``batch`` needs them.

    Attributes:
        norms: float64 [capacity, B], the result of `run`.
    """

    norms: Tensor

    def __init__(
        self,
        network: TritonNetwork,
        saved: Saved,
        buffer: PlanBuffer,
        batch: int,
        allocate: Allocate,
        sums: bool = False,
    ) -> None:
        self.network, self.saved, self.buffer, self.schedule = network, saved, buffer, buffer.schedule
        schedule = buffer.schedule
        states, by_batch = schedule.state_count, network.bn == "batch"
        size = -(-batch * network.largest // 16) * 16
        width = 1 if by_batch else batch
        sums_room, folded_room, constants_room = _room(network, schedule, batch)
        self.gradients = GradientStates(
            allocate([schedule.slot_count, size], network.backward_dtype),
            buffer.rows,
            buffer.launches,
            buffer.states,
            allocate([states, width], torch.int32),
            allocate([states, width], torch.int32),
            allocate([states if by_batch else 0, 2, network.widest], torch.float32),
            allocate([sums_room if sums or by_batch else 0], torch.float32),
            allocate([folded_room if by_batch else 0], network.backward_dtype),
            allocate([constants_room if by_batch else 0], network.backward_dtype),
            batch,
            by_batch,
        )

    def begin(self, plan: LaunchPlan, grads: Tensor, exponents: Tensor) -> None:
        """Copy a plan, and the scaled gradients [g, B, C, H, W] where its routings start, to the pass's tensors."""
        self.buffer.copy(plan)
        self.start(grads, exponents)

    def start(self, grads: Tensor, exponents: Tensor) -> None:
        channels_last = grads.permute(0, 1, 3, 4, 2)
        states = self.gradients.values[: len(grads), : channels_last[0].numel()]
        states.view(channels_last.shape).copy_(channels_last)
        self.gradients.exponents[: len(grads)] = exponents

    def run(self) -> None:
        """Launch the whole schedule, and compute the norms at ``y_0``."""
        self.launch(self.schedule.launches)
        self.norms = self.sample_norms()

    def launch(self, launches: Iterable[Launch]) -> None:
        self.gradients.largest.zero_()
        for launch in launches:
            block = self.network.blocks[launch.block]
            (ending_backward if launch.ending else dgrad)(self.gradients, self.saved, block, launch)

    def sample_norms(self) -> Tensor:
        """Return float64 [capacity, B], the norms of the samples' slices of the gradients at ``y_0``."""
        squares = squared_norms(self.gradients, self.saved, self.buffer.finals, self.network.blocks[0].input)
        norms = squares.sqrt() * self.buffer.mantissas.abs()[:, None]
        return scaling.times_power_of_two(norms, self._exponents(self.schedule.capacity).expand_as(norms))

    def arrived(self, count: int) -> ScaledGradient:
        """Return the scaled gradients at ``y_0`` of the first ``count`` routings.

        Returns:
            float32 [P, B, C, H, W], and int32 [P, B] or [P, 1].
        """
        finals, shape = self.buffer.finals[:count], self.network.blocks[0].input
        values = arrived(self.gradients, self.saved, finals, shape, torch.float32).permute(0, 1, 4, 2, 3)
        mantissas = self.buffer.mantissas[:count].float()
        return scaling.rescale((values * mantissas[:, None, None, None, None]).contiguous(), self._exponents(count))

    def _exponents(self, count: int) -> Tensor:
        """Return int32 [P, B] or [P, 1], the exponents of the final states plus those of the plan."""
        finals = self.buffer.finals[:count].clamp(min=0)
        return self.gradients.exponents.index_select(0, finals) + self.buffer.exponents[:count, None]


def _room(network: TritonNetwork, schedule: Schedule, batch: int) -> list[int]:
    """Return the maximum numbers of elements of launches: tiles' BN sums, folded weights, and their constants."""
    sizes = [[0, 0, 0]]
    for launch in schedule.launches:
        block = network.blocks[launch.block]
        if launch.ending:
            sizes.append([launch.count * 2 * block.output.channels * ending_point_tiles(block, batch), 0, 0])
            continue
        conv = block.convolutions[launch.unit]
        row_sizes = 2 * conv.input.channels * dgrad_point_tiles(conv, batch), folded_size(conv), constants_size(conv)
        sizes.append([launch.count * size for size in row_sizes])
    return [max(column) for column in zip(*sizes, strict=True)]


def routed_backward(
    network: TritonNetwork, saved: Saved, grad: Tensor, exponent: Tensor, steps: Steps
) -> ScaledGradient:
    """Return the scaled gradients at ``y_0``: float32 [P, B, C, H, W] and int32 [P, B] or [P, 1]."""
    return _launched(network, saved, grad, exponent, steps).arrived(steps.count)


def routed_backward_norms(
    network: TritonNetwork, saved: Saved, grad: Tensor, exponent: Tensor, steps: Steps
) -> Tensor:
    """Return float64 [P, B], the norms of the samples' slices."""
    return _launched(network, saved, grad, exponent, steps).sample_norms()


def _launched(network: TritonNetwork, saved: Saved, grad: Tensor, exponent: Tensor, steps: Steps) -> BackwardPass:
    """Return a backward pass that was launched kernel by kernel, with memory for these routings alone."""
    schedule = schedule_backward(network, steps.count, steps.exits)
    allocate, plan = allocate_on(grad.device), plan_launches(schedule, steps)
    backward = BackwardPass(network, saved, PlanBuffer(schedule, allocate), len(grad), allocate)
    backward.begin(plan, grad[None], exponent[None])
    backward.launch(plan.needed())
    return backward


class SingleBlocks:
    """Backward passes through one block at a time; one copy brings the plans of all of them to the device.

    Args:
        expected: each block's index, and the (a, c) of every gradient that it will be called with.
    """

    def __init__(
        self, network: TritonNetwork, saved: Saved, device: torch.device, expected: Sequence[tuple[int, Coefficients]]
    ) -> None:
        self.network, self.saved, self.allocate = network, saved, allocate_on(device)
        keys = [(index, tuple(coefficients)) for index, coefficients in expected]
        plans = [self._plan(*key) for key in keys]
        words = [PlanBuffer(plan.schedule, allocate_on(torch.device("meta"))).pack(plan) for plan in plans]
        all_words = to_device(torch.from_numpy(np.concatenate(words)), device)
        parts = torch.split(all_words, [len(part) for part in words])
        self._expected = dict(zip(keys, zip(plans, parts, strict=True), strict=True))

    def __call__(self, index: int, grads: ScaledGradient, coefficients: Coefficients) -> ScaledGradient:
        """Return the scaled gradients at a block's input, from those [g, B, C, H, W] at its output.

        Args:
            coefficients: the block's (a, c) for each gradient.
        """
        plan, buffer = self._buffered(index, tuple(coefficients))
        network = replace(self.network, blocks=[self.network.blocks[index]])
        backward = BackwardPass(network, self.saved, buffer, grads.mantissa.shape[1], self.allocate)
        backward.start(*grads)
        backward.launch(plan.needed())
        return backward.arrived(len(coefficients))

    def _buffered(self, index: int, coefficients: tuple[tuple[float, ...], ...]) -> tuple[LaunchPlan, PlanBuffer]:
        """Return a plan and its buffer on the device."""
        if (index, coefficients) in self._expected:
            plan, words = self._expected[index, coefficients]
            return plan, PlanBuffer(plan.schedule, lambda shape, dtype: words)
        # If memory is short, the caller passes fewer gradients at a time than expected.
        plan = self._plan(index, coefficients)
        buffer = PlanBuffer(plan.schedule, self.allocate)
        buffer.copy(plan)
        return plan, buffer

    def _plan(self, index: int, coefficients: Coefficients) -> LaunchPlan:
        count, shifts = len(coefficients), np.zeros(len(coefficients), dtype=np.int32)
        if self.network.magnitudes is not None:
            coefficients, powers = self.network.magnitudes.of_block(index, coefficients)
            shifts = powers.numpy()
        blocks, routings = [self.network.blocks[index]], np.array(coefficients, dtype=np.float64)[:, None]
        plan = plan_backward(blocks, routings, self.network.bn == "batch", dgrad_paths(blocks), range(count))
        return replace(plan, exponents=plan.exponents + shifts)
