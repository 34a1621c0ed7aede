"""Forward passes under routings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pathnet.engines.triton.endings import joined
from pathnet.engines.triton.forward import forward_tile, forward_unit, passed
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import Exit, Launch, Plan, Schedule, Steps
from pathnet.engines.triton.state import Activations, Allocate, Kept, Tables, allocate_on

__all__ = ["Forward", "routed_forward", "schedule_forward"]


def schedule_forward(network: TritonNetwork, capacity: int, exits: frozenset[Exit]) -> Schedule:
    return Schedule(network.blocks, False, capacity, exits)


class Forward:
    """A forward pass at one size of the batch: its states in memory, and what is launched over them.

    Args:
        tables: of its plans.
        dtype: of the activations.
    """

    def __init__(
        self,
        network: TritonNetwork,
        tables: Tables,
        batch: int,
        allocate: Allocate,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.tables, self.schedule = network, tables, tables.schedule
        schedule, by_batch = tables.schedule, network.bn == "batch"
        most = max((launch.count * _moments(network, launch, batch) for launch in schedule.launches), default=0)
        self.activations = Activations(
            allocate([schedule.slot_count, -(-batch * network.largest // 16) * 16], dtype),
            tables.rows,
            tables.launches,
            tables.states,
            allocate([schedule.state_count if by_batch else 0, 2, network.widest], torch.float32),
            allocate([most if by_batch else 0], torch.float32),
            batch,
        )
        shape = network.blocks[0].given
        self._y0 = self.activations.values[0, : batch * shape.size].view(
            batch, shape.height, shape.width, shape.channels
        )

    def begin(self, plan: Plan, y0: Tensor) -> None:
        """Bring a plan, and what its routings start from: [B, C, H, W]."""
        self.tables.copy(plan)
        self.start(y0)

    def start(self, y0: Tensor) -> None:
        self._y0.copy_(y0.permute(0, 2, 3, 1))

    def run(self) -> None:
        """Launch everything."""
        self.launch(self.schedule.launches)

    def launch(self, launches: Iterable[Launch], kept: Kept | None = None) -> None:
        """Launch one after the other; ``kept`` takes what the walks back need."""
        network, statistics = self.network, self.activations.statistics
        # Of what a ReLU alone reads they stay so: nothing is taken off, nothing divided by.
        statistics[:, 0] = 0
        statistics[:, 1] = 1
        if network.bn == "batch" and not network.post:
            variance, mean = torch.var_mean(self._y0.float(), dim=(0, 1, 2), correction=0)
            statistics[0, :, : len(mean)] = torch.stack([mean, variance])
        for launch in launches:
            (joined if launch.ending else forward_unit)(network, self.activations, launch, kept)

    def end(self, plan: Plan) -> Tensor:
        """Return [B, C, H, W], channels last, the last state of a plan's one routing, where it lies."""
        shape, batch = self.network.blocks[-1].made, self.activations.batch
        state = self.activations.values[int(plan.states[plan.finals[0], 0]), : batch * shape.size]
        return state.view(batch, shape.height, shape.width, shape.channels).permute(0, 3, 1, 2)

    def ends(self, count: int) -> Tensor:
        """Return [P, B, C, H, W], channels last, the last states of the first so many routings."""
        shape, batch = self.network.blocks[-1].made, self.activations.batch
        slots = self.tables.states.index_select(0, self.tables.finals[:count])[:, 0]
        states = self.activations.values[:, : batch * shape.size].index_select(0, slots)
        return states.view(count, batch, shape.height, shape.width, shape.channels).permute(0, 1, 4, 2, 3)


def _moments(network: TritonNetwork, launch: Launch, batch: int) -> int:
    """Numbers that the tiles of a row leave of their statistics."""
    if launch.ending:
        return 0
    conv = passed(network.blocks[launch.block], launch)
    return 3 * conv.made.channels * forward_tile(conv).point_tiles(batch, conv.made.pixels)


def routed_forward(network: TritonNetwork, y0: Tensor, steps: Steps) -> Tensor:
    """Return float32 [P, B, C, H, W], ``y_n`` under each routing, from ``y_0`` [B, C_0, H_0, W_0]."""
    schedule, allocate = schedule_forward(network, steps.count, steps.exits), allocate_on(y0.device)
    forward, plan = Forward(network, Tables(schedule, allocate), len(y0), allocate), schedule.plan(steps)
    forward.begin(plan, y0)
    forward.launch(plan.needed())
    return forward.ends(steps.count).contiguous()
