"""The forward pass of a record, which saves the inputs of backward passes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import LaunchPlan, plan_launches
from pathnet.engines.triton.routed_forward import ForwardPass, schedule_forward
from pathnet.engines.triton.state import Allocate, PlanBuffer, Saved, allocate_on
from pathnet.engines.triton.steps import steps_forward

__all__ = ["RecordingPass", "plan_recording", "recorded"]


def plan_recording(network: TritonNetwork) -> LaunchPlan:
    """Plan the forward pass through both branches of every block."""
    steps = steps_forward(network.blocks, np.ones((1, len(network.blocks), 2)))
    return plan_launches(schedule_forward(network, 1, steps.exits), steps)


class RecordingPass:
    """A forward pass from ``y_0`` [B, C_0, H_0, W_0] of one size to ``y_n`` that saves what backward passes need."""

    def __init__(self, network: TritonNetwork, plan: LaunchPlan, batch: int, allocate: Allocate) -> None:
        self.network, self.plan = network, plan
        self.saved = Saved.room(network, batch, allocate)
        self.forward = ForwardPass(network, PlanBuffer(plan.schedule, allocate), batch, allocate)
        self._sources = _sources(network, plan)

    def begin(self, y0: Tensor) -> None:
        starts = torch.tensor(
            self.saved.normalized_begin[:-1], dtype=torch.int64, pin_memory=y0.device.type == "cuda"
        )
        self.saved.normalized_starts.copy_(starts, non_blocking=True)
        self.forward.begin(self.plan, y0)

    def run(self) -> None:
        network, statistics = self.network, self.forward.activations.statistics
        self.forward.launch(self.plan.schedule.launches, self.saved)
        if network.bn == "batch":
            variances = torch.stack([statistics[source, 1] for source in self._sources])
        else:
            variances = network.statistics[:, 1]
        # gain / deviation of all units, by which backward passes multiply.
        scales = network.affine[:, 0] * (variances + network.epsilon).rsqrt()
        exponents = network.scale_exponents
        if exponents is not None:
            scales = scaling.times_power_of_two(scales, -exponents)
        self.saved.scales.copy_(scales)

    def output(self) -> Tensor:
        """Return ``y_n`` [B, C, H, W]."""
        return self.forward.end(self.plan).clone(memory_format=torch.contiguous_format)


def recorded(network: TritonNetwork, plan: LaunchPlan, y0: Tensor) -> tuple[Tensor, Saved]:
    """Return ``y_n`` and the saved tensors, launched kernel by kernel."""
    recording = RecordingPass(network, plan, len(y0), allocate_on(y0.device))
    recording.begin(y0)
    recording.run()
    return recording.output(), recording.saved


def _sources(network: TritonNetwork, plan: LaunchPlan) -> list[int]:
    """Return the states that units read, then those that blocks' ends read; each launch has one row."""
    sources: dict[int, int] = {}
    for launch in plan.schedule.launches:
        block, row = network.blocks[launch.block], plan.rows_of(launch)[0].tolist()
        if launch.ending:
            sources.update(zip(block.ends, (row[0], row[2]), strict=False))
        elif launch.residual:
            sources[block.first + launch.unit] = row[0]
    return [sources[unit] for unit in range(len(sources))]
