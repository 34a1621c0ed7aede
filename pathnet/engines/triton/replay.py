"""Passes of a network by graphs, where its device has them, and otherwise kernel by kernel.

Kernels are imported on their first use, since the import of Triton takes a third of a second.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pathnet.engines.triton.graphs import Graphs, capacity_for, max_routings_within
from pathnet.engines.triton.limits import room_of
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import LaunchPlan, plan_launches
from pathnet.engines.triton.state import Allocate, PlanBuffer, Saved
from pathnet.engines.triton.steps import ALL_EXITS, USUAL_BACKWARD, USUAL_FORWARD, Exit, Steps
from pathnet.scaling import ScaledGradient

if TYPE_CHECKING:
    from pathnet.engines.triton.recording import RecordingPass
    from pathnet.engines.triton.routed_backward import BackwardPass
    from pathnet.engines.triton.routed_forward import ForwardPass

__all__ = ["forward", "most_backward", "most_forward", "record", "replayed_backward"]


def record(network: TritonNetwork, plan: LaunchPlan, graphs: Graphs, y0: Tensor) -> tuple[Tensor, Saved]:
    """Return ``y_n`` [B, C, H, W] and what backward passes need, from ``y_0`` [B, C_0, H_0, W_0]."""
    from pathnet.engines.triton.recording import RecordingPass, recorded

    def build(allocate: Allocate) -> RecordingPass:
        return RecordingPass(network, plan, len(y0), allocate)

    def begin(recording: RecordingPass) -> None:
        graphs.hold(None)
        recording.begin(y0)

    with graphs.replayed(("record", len(y0)), y0.device, build, begin) as recording:
        if recording is None:
            return recorded(network, plan, y0)
        output, saved = recording.output(), recording.saved.clone()
        graphs.hold(saved)
        return output, saved


def replayed_backward(
    network: TritonNetwork, saved: Saved, graphs: Graphs, start: ScaledGradient, steps: Steps
) -> AbstractContextManager[BackwardPass | None]:
    """Yield a backward pass that ran as a graph; None if its kernels are to be launched one by one."""
    grad, exponent = start
    batch, capacity, exits = len(grad), capacity_for(steps.count), USUAL_BACKWARD | steps.exits

    def begin(backward: BackwardPass) -> None:
        if not graphs.holds(saved):
            backward.saved.copy(saved)
            graphs.hold(saved)
        backward.begin(plan_launches(backward.schedule, steps), grad[None], exponent[None])

    key = "backward", batch, capacity, exits
    return graphs.replayed(key, grad.device, partial(_build_backward, network, batch, capacity, exits), begin)


def _build_backward(
    network: TritonNetwork, batch: int, capacity: int, exits: frozenset[Exit], allocate: Allocate
) -> BackwardPass:
    from pathnet.engines.triton.routed_backward import BackwardPass, schedule_backward

    saved, schedule = Saved.room(network, batch, allocate), schedule_backward(network, capacity, exits)
    return BackwardPass(network, saved, PlanBuffer(schedule, allocate), batch, allocate)


def most_backward(network: TritonNetwork, graphs: Graphs, batch: int, device: torch.device) -> int:
    """Return the maximum number of routings of one backward pass."""
    room = room_of(device)

    def count() -> int:
        return max_routings_within(
            room, lambda capacity: partial(_build_backward, network, batch, capacity, ALL_EXITS)
        )

    return graphs.most(("backward", batch, room), count)


def forward(network: TritonNetwork, graphs: Graphs, y0: Tensor, steps: Steps) -> Tensor:
    """Return ``y_n`` under each routing, float32 [P, B, C, H, W], from ``y_0`` [B, C_0, H_0, W_0]."""
    from pathnet.engines.triton.routed_forward import routed_forward

    batch, capacity, exits = len(y0), capacity_for(steps.count), USUAL_FORWARD | steps.exits

    def begin(forward: ForwardPass) -> None:
        graphs.hold(None)
        forward.begin(plan_launches(forward.schedule, steps), y0)

    key = "forward", batch, capacity, exits
    with graphs.replayed(key, y0.device, partial(_build_forward, network, batch, capacity, exits), begin) as forward:
        if forward is None:
            return routed_forward(network, y0, steps)
        return forward.ends(steps.count).contiguous()


def _build_forward(
    network: TritonNetwork, batch: int, capacity: int, exits: frozenset[Exit], allocate: Allocate
) -> ForwardPass:
    from pathnet.engines.triton.routed_forward import ForwardPass, schedule_forward

    return ForwardPass(network, PlanBuffer(schedule_forward(network, capacity, exits), allocate), batch, allocate)


def most_forward(network: TritonNetwork, graphs: Graphs, batch: int, device: torch.device) -> int:
    """Return the maximum number of routings of one forward pass."""
    room = room_of(device)

    def count() -> int:
        return max_routings_within(
            room, lambda capacity: partial(_build_forward, network, batch, capacity, ALL_EXITS)
        )

    return graphs.most(("forward", batch, room), count)
