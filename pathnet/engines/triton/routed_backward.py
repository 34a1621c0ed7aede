"""Walks back under routings, over what a forward pass has kept."""

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
from pathnet.engines.triton.plan import Exit, Launch, Plan, Schedule, Steps, plan_backward
from pathnet.engines.triton.state import Allocate, Gradients, Kept, Tables, allocate_on
from pathnet.scaling import ScaledGradient

__all__ = [
    "SingleBlocks",
    "Walk",
    "dgrad_paths",
    "routed_backward",
    "routed_backward_norms",
    "schedule_backward",
]

Coefficients = Sequence[tuple[float, float]]


def dgrad_paths(blocks: Sequence[FusedBlock]) -> Callable[[int, int], int]:
    """How many rows a tile of a block's unit holds."""
    return lambda block, unit: dgrad_tile(blocks[block].convolutions[unit]).paths


def schedule_backward(network: TritonNetwork, capacity: int, exits: frozenset[Exit]) -> Schedule:
    blocks = network.blocks
    return Schedule(blocks, True, capacity, exits, 1, network.bn == "batch", dgrad_paths(blocks))


class Walk:
    """A walk back at one size of the batch: its states in memory, and what is launched over them.

    Args:
        kept: of the record that is walked over.
        tables: of the walk's plans.
        sums: whether BN's two sums are wanted; in BN mode ``batch`` they are needed.

    Attributes:
        norms: float64 [capacity, B], what `run` leaves.
    """

    norms: Tensor

    def __init__(
        self,
        network: TritonNetwork,
        kept: Kept,
        tables: Tables,
        batch: int,
        allocate: Allocate,
        sums: bool = False,
    ) -> None:
        self.network, self.kept, self.tables, self.schedule = network, kept, tables, tables.schedule
        schedule = tables.schedule
        states, by_batch = schedule.state_count, network.bn == "batch"
        size = -(-batch * network.largest // 16) * 16
        width = 1 if by_batch else batch
        room = _room(network, schedule, batch)
        self.gradients = Gradients(
            allocate([schedule.slot_count, size], network.walk_dtype),
            tables.rows,
            tables.launches,
            tables.states,
            allocate([states, width], torch.int32),
            allocate([states, width], torch.int32),
            allocate([states if by_batch else 0, 2, network.widest], torch.float32),
            allocate([room[0] if sums or by_batch else 0], torch.float32),
            allocate([room[1] if by_batch else 0], network.walk_dtype),
            allocate([room[2] if by_batch else 0], network.walk_dtype),
            batch,
            by_batch,
        )

    def begin(self, plan: Plan, grads: Tensor, exponents: Tensor) -> None:
        """Bring a plan, and the scaled gradients [g, B, C, H, W] that its routings start from."""
        self.tables.copy(plan)
        self.start(grads, exponents)

    def start(self, grads: Tensor, exponents: Tensor) -> None:
        channels_last = grads.permute(0, 1, 3, 4, 2)
        states = self.gradients.values[: len(grads), : channels_last[0].numel()]
        states.view(channels_last.shape).copy_(channels_last)
        self.gradients.exponents[: len(grads)] = exponents

    def run(self) -> None:
        """Launch everything, and take the norms of what arrives."""
        self.launch(self.schedule.launches)
        self.norms = self.sample_norms()

    def launch(self, launches: Iterable[Launch]) -> None:
        self.gradients.largest.zero_()
        for launch in launches:
            block = self.network.blocks[launch.block]
            (ending_backward if launch.ending else dgrad)(self.gradients, self.kept, block, launch)

    def sample_norms(self) -> Tensor:
        """Return float64 [capacity, B], the norms of the samples' slices of the gradients that have arrived."""
        squares = squared_norms(self.gradients, self.kept, self.tables.finals, self.network.blocks[0].given)
        norms = squares.sqrt() * self.tables.mantissas.abs()[:, None]
        return scaling.times_power_of_two(norms, self._exponents(self.schedule.capacity).expand_as(norms))

    def arrived(self, count: int) -> ScaledGradient:
        """Return the scaled gradients of the first so many routings.

        Returns:
            float32 [P, B, C, H, W], and int32 [P, B] or [P, 1].
        """
        finals, shape = self.tables.finals[:count], self.network.blocks[0].given
        values = arrived(self.gradients, self.kept, finals, shape, torch.float32).permute(0, 1, 4, 2, 3)
        mantissas = self.tables.mantissas[:count].float()
        return scaling.rescale((values * mantissas[:, None, None, None, None]).contiguous(), self._exponents(count))

    def _exponents(self, count: int) -> Tensor:
        """int32 [P, B] or [P, 1]: those of the final states, and what was set aside on the way."""
        finals = self.tables.finals[:count].clamp(min=0)
        return self.gradients.exponents.index_select(0, finals) + self.tables.exponents[:count, None]


def _room(network: TritonNetwork, schedule: Schedule, batch: int) -> list[int]:
    """Numbers that the largest launches leave: tiles' shares of BN's two sums, folded weights, their constants."""
    sizes = [[0, 0, 0]]
    for launch in schedule.launches:
        block = network.blocks[launch.block]
        if launch.ending:
            sizes.append([launch.count * 2 * block.made.channels * ending_point_tiles(block, batch), 0, 0])
            continue
        conv = block.convolutions[launch.unit]
        each = 2 * conv.given.channels * dgrad_point_tiles(conv, batch), folded_size(conv), constants_size(conv)
        sizes.append([launch.count * size for size in each])
    return [max(column) for column in zip(*sizes, strict=True)]


def routed_backward(
    network: TritonNetwork, kept: Kept, grad: Tensor, exponent: Tensor, steps: Steps
) -> ScaledGradient:
    """Return the scaled gradients at ``y_0``: float32 [P, B, C, H, W] and int32 [P, B] or [P, 1]."""
    return _walked(network, kept, grad, exponent, steps).arrived(steps.count)


def routed_backward_norms(network: TritonNetwork, kept: Kept, grad: Tensor, exponent: Tensor, steps: Steps) -> Tensor:
    """Return float64 [P, B], the norms of the samples' slices."""
    return _walked(network, kept, grad, exponent, steps).sample_norms()


def _walked(network: TritonNetwork, kept: Kept, grad: Tensor, exponent: Tensor, steps: Steps) -> Walk:
    """Walk launch by launch, with room for these routings alone."""
    schedule = schedule_backward(network, steps.count, steps.exits)
    allocate, plan = allocate_on(grad.device), schedule.plan(steps)
    walk = Walk(network, kept, Tables(schedule, allocate), len(grad), allocate)
    walk.begin(plan, grad[None], exponent[None])
    walk.launch(plan.needed())
    return walk


class SingleBlocks:
    """Walks through one block at a time, the tables of all of them brought to the device in one copy.

    Args:
        expected: the blocks and, of each, the (a, c) of every gradient that is to come.
    """

    def __init__(
        self, network: TritonNetwork, kept: Kept, device: torch.device, expected: Sequence[tuple[int, Coefficients]]
    ) -> None:
        self.network, self.kept, self.allocate = network, kept, allocate_on(device)
        keys = [(index, tuple(coefficients)) for index, coefficients in expected]
        plans = [self._plan(*key) for key in keys]
        words = [Tables(plan.schedule, allocate_on(torch.device("meta"))).pack(plan) for plan in plans]
        whole = to_device(torch.from_numpy(np.concatenate(words)), device)
        parts = torch.split(whole, [len(part) for part in words])
        self._expected = dict(zip(keys, zip(plans, parts, strict=True), strict=True))

    def __call__(self, index: int, grads: ScaledGradient, coefficients: Coefficients) -> ScaledGradient:
        """Take scaled gradients [g, B, C, H, W] at a block's output to its input, each by its own (a, c)."""
        plan, tables = self._tables(index, tuple(coefficients))
        alone = replace(self.network, blocks=[self.network.blocks[index]])
        walk = Walk(alone, self.kept, tables, grads.mantissa.shape[1], self.allocate)
        walk.start(*grads)
        walk.launch(plan.needed())
        return walk.arrived(len(coefficients))

    def _tables(self, index: int, coefficients: tuple[tuple[float, float], ...]) -> tuple[Plan, Tables]:
        """Return a plan and its tables on the device."""
        if (index, coefficients) in self._expected:
            plan, words = self._expected[index, coefficients]
            return plan, Tables(plan.schedule, lambda shape, dtype: words)
        # Less at a time than expected, where memory is short.
        plan = self._plan(index, coefficients)
        tables = Tables(plan.schedule, self.allocate)
        tables.copy(plan)
        return plan, tables

    def _plan(self, index: int, coefficients: Coefficients) -> Plan:
        count, shifts = len(coefficients), np.zeros(len(coefficients), dtype=np.int32)
        if self.network.magnitudes is not None:
            coefficients, powers = self.network.magnitudes.of_block(index, coefficients)
            shifts = powers.numpy()
        blocks, routings = [self.network.blocks[index]], np.array(coefficients, dtype=np.float64)[:, None]
        plan = plan_backward(blocks, routings, self.network.bn == "batch", dgrad_paths(blocks), range(count))
        return replace(plan, exponents=plan.exponents + shifts)
