"""The forward pass that leaves a record."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import Plan, steps_forward
from pathnet.engines.triton.routed_forward import Forward, schedule_forward
from pathnet.engines.triton.state import Allocate, Kept, Tables, allocate_on

__all__ = ["Recording", "plan_recording", "recorded"]


def plan_recording(network: TritonNetwork) -> Plan:
    """Plan the pass through both branches of every block."""
    steps = steps_forward(network.blocks, np.ones((1, len(network.blocks), 2)))
    return schedule_forward(network, 1, steps.exits).plan(steps)


class Recording:
    """A pass that takes ``y_0`` [B, C_0, H_0, W_0] of one size to ``y_n``, and keeps what the walks back need."""

    def __init__(self, network: TritonNetwork, plan: Plan, batch: int, allocate: Allocate) -> None:
        self.network, self.plan = network, plan
        self.kept = Kept.room(network, batch, allocate)
        self.forward = Forward(network, Tables(plan.schedule, allocate), batch, allocate)
        self._sources = _sources(network, plan)

    def begin(self, y0: Tensor) -> None:
        starts = torch.tensor(self.kept.normalized_begin[:-1], dtype=torch.int64, pin_memory=y0.device.type == "cuda")
        self.kept.normalized_starts.copy_(starts, non_blocking=True)
        self.forward.begin(self.plan, y0)

    def run(self) -> None:
        network, statistics = self.network, self.forward.activations.statistics
        self.forward.launch(self.plan.schedule.launches, self.kept)
        if network.bn == "batch":
            variances = torch.stack([statistics[source, 1] for source in self._sources])
        else:
            variances = network.statistics[:, 1]
        # gain / deviation of all units, as the walk back takes them.
        scales = network.affine[:, 0] * (variances + network.epsilon).rsqrt()
        exponents = network.scale_exponents
        if exponents is not None:
            scales = scaling.times_power_of_two(scales, -exponents)
        self.kept.scales.copy_(scales)

    def output(self) -> Tensor:
        """Return ``y_n`` [B, C, H, W]."""
        return self.forward.end(self.plan).clone(memory_format=torch.contiguous_format)


def recorded(network: TritonNetwork, plan: Plan, y0: Tensor) -> tuple[Tensor, Kept]:
    """Do so launch by launch."""
    recording = Recording(network, plan, len(y0), allocate_on(y0.device))
    recording.begin(y0)
    recording.run()
    return recording.output(), recording.kept


def _sources(network: TritonNetwork, plan: Plan) -> list[int]:
    """Return the states that units, and behind them blocks' ends, read; each launch has one row."""
    sources: dict[int, int] = {}
    for launch in plan.schedule.launches:
        block, row = network.blocks[launch.block], plan.rows_of(launch)[0].tolist()
        if launch.ending:
            sources.update(zip(block.ends, (row[0], row[2]), strict=False))
        elif launch.residual:
            sources[block.first + launch.unit] = row[0]
    return [sources[unit] for unit in range(len(sources))]
