"""The triton engine: BN-ReLU-conv and post-activation blocks of any width, both BN modes, on GPUs that Triton serves.

`plan` compacts routings into rows, `routed_backward` and `routed_forward` launch one kernel a unit for them (`dgrad`,
`forward`), one by one or, where a device has graphs, as a graph (`graphs`); `sums`, `folding`, `statistics` and
`endings` finish what batch normalisation needs of a whole batch, `arrivals` takes gradients and norms out. Kernels
are compiled for a network's widths, kernel sizes and strides before their first use, by `ahead` on all cores, and
kept on disk by Triton; they serve images and batches of any size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.engines import fallback
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_block, unsupported_form
from pathnet.engines.self_check import disagreement
from pathnet.engines.triton.graphs import Graphs, capacity_for, most_within
from pathnet.engines.triton.network import TritonNetwork, network_of
from pathnet.engines.triton.plan import (
    ALL_EXITS,
    USUAL_BACKWARD,
    USUAL_FORWARD,
    Exit,
    Plan,
    Steps,
    steps_backward,
    steps_forward,
)
from pathnet.engines.triton.state import Allocate, Kept, Tables
from pathnet.models.residual_net import ResidualNet
from pathnet.recording import BatchNormMode
from pathnet.scaling import ScaledGradient

if TYPE_CHECKING:
    from pathnet.engines.triton.recording import Recording
    from pathnet.engines.triton.routed_backward import Walk as Backward
    from pathnet.engines.triton.routed_forward import Forward

__all__ = [
    "MOST_ELEMENTS",
    "TritonEngine",
    "TritonPrepared",
    "TritonWalk",
    "check_sides",
    "on_device",
    "room_of",
    "unsupported_side",
]

ROOM = 4 << 30
"""Bytes for the gradients of one walk: some hundred routings of a CIFAR network at batch 128."""

MOST_ELEMENTS = (1 << 31) - (1 << 16)
"""Of an activation: kernels number its places in int32, those beside it in the last tile too."""

MOST_PIXELS = 1 << 19
"""Of an image's side, for which `tiles.quotient` is exact."""


class TritonEngine:
    """Triton kernels, compiled at run time."""

    name = "triton"
    device_type: str | None = "cuda"

    def unavailable(self) -> str | None:
        # Kernels are imported on their first use: Triton takes a third of a second.
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            return "this process sees no GPU"
        return None

    def unsupported(self, job: Job) -> str | None:
        if job.device.type not in ("cuda", "xpu"):
            return f"the network is on {job.device}"
        if job.precision == "float64":
            return f'no precision="{job.precision}"'
        reason = unsupported_form(job.net, job.bn) or unsupported_side(job.net)
        if reason is not None:
            return reason

        def ahead(work: Callable[[], object]) -> None:
            from pathnet.engines.triton.ahead import compile_for

            with on_device(job.device):
                compile_for(work)

        # The check launches what the network will launch, and no more, so that nothing is left to be compiled.
        return disagreement(self, job, ahead)

    def prepare(self, job: Job) -> TritonPrepared:
        from pathnet.engines.triton.recording import plan_recording

        network = network_of(job.net, job.bn, job.precision, job.y0_shape)
        return TritonPrepared(network, plan_recording(network))


@dataclass(frozen=True)
class TritonPrepared:
    """A packed network, the plan of its recording pass, and its graphs."""

    network: TritonNetwork
    recording: Plan
    graphs: Graphs = field(default_factory=Graphs)

    def most_routings(self, y0: Tensor) -> int | None:
        batch, room = len(y0), room_of(self.network.affine.device)

        def count() -> int:
            return most_within(room, lambda capacity: partial(_pass, self.network, batch, capacity, ALL_EXITS))

        return self.graphs.most(("forward", batch, room), count)

    def record(self, y0: Tensor) -> tuple[Tensor, TritonWalk]:
        _check_images(self.network, y0)
        with on_device(y0.device):
            y, kept = _recorded(self, y0)
        walk = TritonWalk(self.network, kept, len(y0), self.graphs)
        return (y.relu(), replace(walk, last=y > 0)) if self.network.post else (y, walk)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        _check_images(self.network, y0)
        steps = steps_forward(self.network.blocks, _on_host(routing))
        with on_device(y0.device):
            y = _forward(self, y0, steps)
        return y.relu_() if self.network.post else y


@dataclass(frozen=True)
class TritonWalk:
    """The record of one forward pass: ReLU bits, in BN mode ``batch`` also normalised activations.

    Attributes:
        graphs: graphs of the network's walks; they live as long as one of its records does.
        last: the bits of the last join's ReLU in a post-activation network, bool [B, C, H, W].
    """

    network: TritonNetwork
    kept: Kept
    batch: int
    graphs: Graphs
    last: Tensor | None = None

    @property
    def bn(self) -> BatchNormMode:
        return self.network.bn

    @property
    def tensors(self) -> Sequence[Tensor]:
        network, kept = self.network, self.kept
        weights = [
            weight
            for block in network.blocks
            for conv in (*block.convolutions, block.projection)
            if conv is not None
            for weight in (conv.weight, conv.transposed, conv.added)
        ]
        tensors = kept.bits, kept.normalized, kept.scales, self.last, network.affine, network.statistics, *weights
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def most_routings(self) -> int | None:
        room = room_of(self.kept.bits.device)

        def count() -> int:
            return most_within(room, lambda capacity: partial(_walk, self.network, self.batch, capacity, ALL_EXITS))

        return self.graphs.most(("walk", self.batch, room), count)

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        from pathnet.engines.triton.routed_backward import routed_backward

        steps, start = _steps_backward(self.network, _on_host(routing)), self._before_last_join(start)
        with on_device(start.mantissa.device), _replayed(self, start, steps) as walk:
            if walk is None:
                return routed_backward(self.network, self.kept, *start, steps)
            return walk.arrived(steps.count)

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        from pathnet.engines.triton.routed_backward import routed_backward_norms

        steps, start = _steps_backward(self.network, _on_host(routing)), self._before_last_join(start)
        with on_device(start.mantissa.device), _replayed(self, start, steps) as walk:
            if walk is None:
                return routed_backward_norms(self.network, self.kept, *start, steps)
            # A copy, since the graph's next run overwrites them.
            return walk.norms[: steps.count].clone()

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        from pathnet.engines.triton.routed_backward import SingleBlocks

        coefficients, device = _on_host(routing), start.mantissa.device
        expected = [
            (index, [*[(a, 0.0)] * count, *[(0.0, c)] * count])
            for count, (index, (a, c)) in enumerate(reversed(list(enumerate(coefficients.tolist()))), 1)
        ]
        with on_device(device):
            through_block = SingleBlocks(self.network, self.kept, device, expected)
            start = self._before_last_join(start)
            return fallback.sums_by_length(through_block, start, torch.from_numpy(coefficients))

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return fallback.norms_of(self.sums_by_length(start, routing))

    def _before_last_join(self, start: ScaledGradient) -> ScaledGradient:
        """Return the scaled gradient at the sum that the last join reads."""
        return start if self.last is None else start._replace(mantissa=start.mantissa.where(self.last, 0.0))

    def bits(self) -> list[list[Tensor]]:
        """Return the recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; of post-activation blocks the join's
        last."""
        units = [
            [self._unit_bits(block.first + unit) for unit in range(len(block.convolutions))]
            for block in self.network.blocks
        ]
        if self.last is None:
            return units
        joins = [*(bits[0] for bits in units[1:]), self.last]
        return [[*bits[1:], join] for bits, join in zip(units, joins, strict=True)]

    def _unit_bits(self, unit: int) -> Tensor:
        given, width = self.network.convolutions[unit].given, -(-self.network.convolutions[unit].given.channels // 8)
        packed = self.kept.unit_bits(unit)[: self.batch * given.pixels * width]
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        whole = bits.reshape(self.batch, given.height, given.width, width * 8)[..., : given.channels]
        return whole.permute(0, 3, 1, 2).bool().contiguous()


def _on_host(routing: Tensor) -> NDArray[np.float64]:
    """Return the coefficients, which plans are made of on the host; where they lie on a device, this waits for it."""
    return routing.detach().double().cpu().numpy()


def _steps_backward(network: TritonNetwork, coefficients: NDArray[np.float64]) -> Steps:
    """Return the steps of the divided network, what it was divided by among the powers of two of the results."""
    if network.magnitudes is None:
        return steps_backward(network.blocks, coefficients)
    divided, shifts = network.magnitudes.of_routing(torch.from_numpy(coefficients))
    steps = steps_backward(network.blocks, divided.numpy())
    return replace(steps, exponents=steps.exponents + shifts.numpy())


def _recorded(prepared: TritonPrepared, y0: Tensor) -> tuple[Tensor, Kept]:
    from pathnet.engines.triton.recording import Recording, recorded

    graphs, key = prepared.graphs, ("record", len(y0))

    def build(allocate: Allocate) -> Recording:
        return Recording(prepared.network, prepared.recording, len(y0), allocate)

    def begin(recording: Recording) -> None:
        graphs.hold(None)
        recording.begin(y0)

    with graphs.replayed(key, y0.device, build, begin) as recording:
        if recording is None:
            return recorded(prepared.network, prepared.recording, y0)
        output, kept = recording.output(), recording.kept.clone()
        graphs.hold(kept)
        return output, kept


def _replayed(record: TritonWalk, start: ScaledGradient, steps: Steps) -> AbstractContextManager[Backward | None]:
    """Give the walk, run as a graph; None where its launches are to be run one by one."""
    graphs, (grad, exponent) = record.graphs, start
    batch, capacity, exits = len(grad), capacity_for(steps.count), USUAL_BACKWARD | steps.exits

    def begin(walk: Backward) -> None:
        if not graphs.holds(record.kept):
            walk.kept.copy(record.kept)
            graphs.hold(record.kept)
        walk.begin(walk.schedule.plan(steps), grad[None], exponent[None])

    key = "walk", batch, capacity, exits
    return graphs.replayed(key, grad.device, partial(_walk, record.network, batch, capacity, exits), begin)


def _walk(network: TritonNetwork, batch: int, capacity: int, exits: frozenset[Exit], allocate: Allocate) -> Backward:
    from pathnet.engines.triton.routed_backward import Walk, schedule_backward

    kept = Kept.room(network, batch, allocate)
    return Walk(network, kept, Tables(schedule_backward(network, capacity, exits), allocate), batch, allocate)


def room_of(device: torch.device) -> int:
    """Return the bytes for the gradients of one walk: `ROOM`, on a small GPU a quarter of its memory."""
    if device.type not in ("cuda", "xpu"):
        return ROOM
    return min(ROOM, int(torch.get_device_module(device).get_device_properties(device).total_memory) // 4)


def _forward(prepared: TritonPrepared, y0: Tensor, steps: Steps) -> Tensor:
    """Return ``y_n`` under each routing, float32 [P, B, C, H, W]."""
    from pathnet.engines.triton.routed_forward import routed_forward

    graphs, network, batch = prepared.graphs, prepared.network, len(y0)
    capacity, exits = capacity_for(steps.count), USUAL_FORWARD | steps.exits

    def begin(forward: Forward) -> None:
        graphs.hold(None)
        forward.begin(forward.schedule.plan(steps), y0)

    key = "forward", batch, capacity, exits
    with graphs.replayed(key, y0.device, partial(_pass, network, batch, capacity, exits), begin) as forward:
        if forward is None:
            return routed_forward(network, y0, steps)
        return forward.ends(steps.count).contiguous()


def _pass(network: TritonNetwork, batch: int, capacity: int, exits: frozenset[Exit], allocate: Allocate) -> Forward:
    from pathnet.engines.triton.routed_forward import Forward, schedule_forward

    return Forward(network, Tables(schedule_forward(network, capacity, exits), allocate), batch, allocate)


def unsupported_side(net: ResidualNet) -> str | None:
    """Return why the kernels cannot run a network that has tables, or None."""
    for index, block in enumerate(net):
        form = block.form()
        reason = None if form is None else unsupported_block(form)
        if reason is not None:
            return f"block {index + 1}: {reason}"
    return None


def _check_images(network: TritonNetwork, y0: Tensor) -> None:
    if len(y0) * network.largest >= MOST_ELEMENTS:
        most = (MOST_ELEMENTS - 1) // network.largest
        raise ValueError(f"images: expected at most {most} for the triton engine, got {len(y0)}")
    check_sides("images", y0)
    pixels = [shape.pixels for shape in network.normalized if shape is not None]
    if network.bn == "batch" and len(y0) == 1 and 1 in pixels:
        raise ValueError("images: expected more than one value a channel for batch statistics, got one")


def check_sides(name: str, images: Tensor) -> None:
    """Refuse images [B, C, H, W] that are too long for the kernels, whatever they are called."""
    if max(images.shape[2:]) > MOST_PIXELS:
        shape = list(images.shape[2:])
        raise ValueError(f"{name}: expected sides of at most {MOST_PIXELS} pixels for the triton engine, got {shape}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
