"""Forward passes under routings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pathnet.engines.triton.endings import ending_forward
from pathnet.engines.triton.forward import forward_tile, forward_unit, passed
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import LaunchPlan, plan_launches
from pathnet.engines.triton.schedule import Launch, Schedule
from pathnet.engines.triton.state import ActivationStates, Allocate, PlanBuffer, Saved, allocate_on
from pathnet.engines.triton.steps import Exit, Steps

__all__ = ["ForwardPass", "routed_forward", "schedule_forward"]


def schedule_forward(network: TritonNetwork, capacity: int, exits: frozenset[Exit]) -> Schedule:
    return Schedule(network.blocks, False, capacity, exits)


class ForwardPass:
    """A forward pass of batches of one size: its states in memory, and the launches over them.

    Args:
        buffer: memory for its plans.
        dtype: the type of the activations.
    """

    def __init__(
        self,
        network: TritonNetwork,
        buffer: PlanBuffer,
        batch: int,
        allocate: Allocate,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.buffer, self.schedule = network, buffer, buffer.schedule
        schedule, by_batch = buffer.schedule, network.bn == "batch"
        most = max((launch.count * _moments(network, launch, batch) for launch in schedule.launches), default=0)
        self.activations = ActivationStates(
            allocate([schedule.slot_count, -(-batch * network.largest // 16) * 16], dtype),
            buffer.rows,
            buffer.launches,
            buffer.states,
            allocate([schedule.state_count if by_batch else 0, 2, network.widest], torch.float32),
            allocate([most if by_batch else 0], torch.float32),
            batch,
        )
        shape = network.blocks[0].input
        self._y0 = self.activations.values[0, : batch * shape.size].view(
            batch, shape.height, shape.width, shape.channels
        )

    def begin(self, plan: LaunchPlan, y0: Tensor) -> None:
        """Copy a plan, and ``y_0`` [B, C, H, W] that its routings start from, to the pass's tensors."""
        self.buffer.copy(plan)
        self.start(y0)

    def start(self, y0: Tensor) -> None:
        self._y0.copy_(y0.permute(0, 2, 3, 1))

    def run(self) -> None:
        """Launch the whole schedule."""
        self.launch(self.schedule.launches)

    def launch(self, launches: Iterable[Launch], saved: Saved | None = None) -> None:
        """Run the launches; if ``saved`` is given, save in it what backward passes need."""
        network, statistics = self.network, self.activations.statistics
        # States that only a ReLU reads keep mean 0 and variance 1.
        statistics[:, 0] = 0
        statistics[:, 1] = 1
        if network.bn == "batch" and not network.post:
            variance, mean = torch.var_mean(self._y0.float(), dim=(0, 1, 2), correction=0)
            statistics[0, :, : len(mean)] = torch.stack([mean, variance])
        for launch in launches:
            (ending_forward if launch.ending else forward_unit)(network, self.activations, launch, saved)

    def end(self, plan: LaunchPlan) -> Tensor:
        """Return a view of the last state of a plan's only routing: [B, C, H, W], channels last."""
        shape, batch = self.network.blocks[-1].output, self.activations.batch
        state = self.activations.values[int(plan.states[plan.finals[0], 0]), : batch * shape.size]
        return state.view(batch, shape.height, shape.width, shape.channels).permute(0, 3, 1, 2)

    def ends(self, count: int) -> Tensor:
        """Return the last states of the first ``count`` routings: [P, B, C, H, W], channels last."""
        shape, batch = self.network.blocks[-1].output, self.activations.batch
        slots = self.buffer.states.index_select(0, self.buffer.finals[:count])[:, 0]
        states = self.activations.values[:, : batch * shape.size].index_select(0, slots)
        return states.view(count, batch, shape.height, shape.width, shape.channels).permute(0, 1, 4, 2, 3)


def _moments(network: TritonNetwork, launch: Launch, batch: int) -> int:
    """Return the number of elements that the tiles of a row store for the statistics."""
    if launch.ending:
        return 0
    conv = passed(network.blocks[launch.block], launch)
    return 3 * conv.output.channels * forward_tile(conv).point_tiles(batch, conv.output.pixels)


def routed_forward(network: TritonNetwork, y0: Tensor, steps: Steps) -> Tensor:
    """Return float32 [P, B, C, H, W], ``y_n`` under each routing, from ``y_0`` [B, C_0, H_0, W_0]."""
    schedule, allocate = schedule_forward(network, steps.count, steps.exits), allocate_on(y0.device)
    forward = ForwardPass(network, PlanBuffer(schedule, allocate), len(y0), allocate)
    plan = plan_launches(schedule, steps)
    forward.begin(plan, y0)
    forward.launch(plan.needed())
    return forward.ends(steps.count).contiguous()
