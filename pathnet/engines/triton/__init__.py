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

from pathnet.chunks import in_chunks
from pathnet.engines import fallback
from pathnet.engines.forms import blocks_of, unsupported_block, unsupported_form
from pathnet.engines.self_check import disagreement
from pathnet.engines.triton.graphs import Graphs, capacity_for, most_within
from pathnet.engines.triton.network import TritonNetwork, network_of
from pathnet.engines.triton.plan import LaunchPlan, plan_launches
from pathnet.engines.triton.state import Allocate, PlanBuffer, Saved
from pathnet.engines.triton.steps import (
    ALL_EXITS,
    USUAL_BACKWARD,
    USUAL_FORWARD,
    Exit,
    Steps,
    steps_backward,
    steps_forward,
)
from pathnet.models.residual_net import ResidualNet
from pathnet.recording import BatchNormMode, BlockRecord, Precision, Prepared

if TYPE_CHECKING:
    from pathnet.engines.triton.recording import RecordingPass
    from pathnet.engines.triton.routed_backward import BackwardPass
    from pathnet.engines.triton.routed_forward import ForwardPass

__all__ = [
    "MOST_ELEMENTS",
    "TritonEngine",
    "TritonPrepared",
    "TritonRecord",
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


@dataclass(frozen=True)
class TritonPrepared:
    """A packed network, the plan of its recording pass, and its graphs."""

    network: TritonNetwork
    recording: LaunchPlan
    graphs: Graphs = field(default_factory=Graphs)


@dataclass(frozen=True)
class TritonRecord:
    """What one forward pass leaves: ReLU bits, in BN mode ``batch`` also normalised activations.

    Attributes:
        graphs: of the network's walks; they are there as long as one of its records is.
        last: of a post-activation network, the bits of the last join's ReLU, bool [B, C, H, W].
    """

    network: TritonNetwork
    saved: Saved
    batch: int
    graphs: Graphs
    last: Tensor | None = None

    @property
    def bn(self) -> BatchNormMode:
        return self.network.bn

    @property
    def tensors(self) -> Sequence[Tensor]:
        own, saved = self.network, self.saved
        weights = [
            weight
            for block in own.blocks
            for conv in (*block.convolutions, block.projection)
            if conv is not None
            for weight in (conv.weight, conv.transposed, conv.shift)
        ]
        everything = saved.bits, saved.normalized, saved.scales, self.last, own.affine, own.statistics, *weights
        return [tensor for tensor in everything if tensor is not None]

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; of post-activation blocks the join's last."""
        units = [
            [self._unit_bits(block.first + unit) for unit in range(len(block.convolutions))]
            for block in self.network.blocks
        ]
        if self.last is None:
            return units
        joins = [*(own[0] for own in units[1:]), self.last]
        return [[*own[1:], join] for own, join in zip(units, joins, strict=True)]

    def given(self, grad: Tensor) -> Tensor:
        """What the walks begin with, of the gradient [B, C, H, W] at ``y_n``: what passes the last join."""
        return grad if self.last is None else grad.where(self.last, 0.0)

    def _unit_bits(self, unit: int) -> Tensor:
        given, width = self.network.convolutions[unit].input, -(-self.network.convolutions[unit].input.channels // 8)
        packed = self.saved.unit_bits(unit)[: self.batch * given.pixels * width]
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        whole = bits.reshape(self.batch, given.height, given.width, width * 8)[..., : given.channels]
        return whole.permute(0, 3, 1, 2).bool().contiguous()


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

    def unsupported(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int], device: torch.device
    ) -> str | None:
        if device.type not in ("cuda", "xpu"):
            return f"the network is on {device}"
        if precision == "float64":
            return f'no precision="{precision}"'
        reason = unsupported_form(net, bn) or unsupported_side(net)
        if reason is not None:
            return reason

        def ahead(work: Callable[[], object]) -> None:
            from pathnet.engines.triton.ahead import compile_for

            with on_device(device):
                compile_for(work)

        # What it takes the network takes, and no more, so that nothing is left to be compiled.
        return disagreement(self, net, bn, precision, y0_shape, device, ahead)

    def prepare(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]
    ) -> TritonPrepared:
        from pathnet.engines.triton.recording import plan_recording

        network = network_of(net, bn, precision, y0_shape)
        return TritonPrepared(network, plan_recording(network))

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, TritonRecord]:
        assert isinstance(prepared, TritonPrepared)
        _check_images(prepared.network, y0)
        with on_device(y0.device):
            y, saved = _recorded(prepared, y0)
        record = TritonRecord(prepared.network, saved, len(y0), prepared.graphs)
        return (y.relu(), replace(record, last=y > 0)) if prepared.network.post else (y, record)

    def sums_by_length(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        from pathnet.engines.triton.routed_backward import SingleBlocks

        assert isinstance(blocks, TritonRecord)
        coefficients = _on_host(routing)
        expected = [
            (index, [*[(a, 0.0)] * count, *[(0.0, c)] * count])
            for count, (index, (a, c)) in enumerate(reversed(list(enumerate(coefficients.tolist()))), 1)
        ]
        with on_device(grad.device):
            through = SingleBlocks(blocks.network, blocks.saved, grad.device, expected)
            return fallback.sums_by_length(through, blocks.given(grad), exponent, torch.from_numpy(coefficients))

    def sums_by_length_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return fallback.norms_of(*self.sums_by_length(blocks, grad, exponent, routing))

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(prepared, TritonPrepared)
        network = prepared.network
        _check_images(network, y0)
        coefficients = _on_host(routing)
        with on_device(y0.device):
            parts = in_chunks(
                len(coefficients),
                1,
                lambda part: _forward(prepared, y0, steps_forward(network.blocks, coefficients[part])),
                _most_forward(prepared, len(y0)),
            )
            y = torch.cat([outputs for _, outputs in parts])
        return y.relu_() if network.post else y

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        from pathnet.engines.triton.routed_backward import routed_backward

        assert isinstance(blocks, TritonRecord)
        steps, start = _steps_backward(blocks.network, _on_host(routing)), (blocks.given(grad), exponent)
        with on_device(grad.device), _replayed(blocks, *start, steps) as walk:
            if walk is None:
                return routed_backward(blocks.network, blocks.saved, *start, steps)
            return walk.arrived(steps.count)

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        from pathnet.engines.triton.routed_backward import routed_backward_norms

        assert isinstance(blocks, TritonRecord)
        network, coefficients, start = blocks.network, _on_host(routing), (blocks.given(grad), exponent)
        norms = torch.empty(len(routing), len(grad), dtype=torch.float64, device=grad.device)

        def walk_part(part: slice) -> None:
            steps = _steps_backward(network, coefficients[part])
            with _replayed(blocks, *start, steps) as walk:
                if walk is None:
                    norms[part] = routed_backward_norms(network, blocks.saved, *start, steps)
                else:
                    norms[part] = walk.norms[: steps.count]

        with on_device(grad.device):
            for _ in in_chunks(len(coefficients), 1, walk_part, _most_backward(blocks)):
                pass
        return norms


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


def _recorded(prepared: TritonPrepared, y0: Tensor) -> tuple[Tensor, Saved]:
    from pathnet.engines.triton.recording import RecordingPass, recorded

    graphs, key = prepared.graphs, ("record", len(y0))

    def build(allocate: Allocate) -> RecordingPass:
        return RecordingPass(prepared.network, prepared.recording, len(y0), allocate)

    def begin(recording: RecordingPass) -> None:
        graphs.hold(None)
        recording.begin(y0)

    with graphs.replayed(key, y0.device, build, begin) as recording:
        if recording is None:
            return recorded(prepared.network, prepared.recording, y0)
        output, saved = recording.output(), recording.saved.clone()
        graphs.hold(saved)
        return output, saved


def _replayed(
    record: TritonRecord, grad: Tensor, exponent: Tensor, steps: Steps
) -> AbstractContextManager[BackwardPass | None]:
    """Give the walk, run as a graph; None where its launches are to be run one by one."""
    graphs, batch = record.graphs, len(grad)
    capacity, exits = capacity_for(steps.count), USUAL_BACKWARD | steps.exits

    def begin(walk: BackwardPass) -> None:
        if not graphs.holds(record.saved):
            walk.saved.copy(record.saved)
            graphs.hold(record.saved)
        walk.begin(plan_launches(walk.schedule, steps), grad[None], exponent[None])

    key = "walk", batch, capacity, exits
    return graphs.replayed(key, grad.device, partial(_walk, record.network, batch, capacity, exits), begin)


def _walk(
    network: TritonNetwork, batch: int, capacity: int, exits: frozenset[Exit], allocate: Allocate
) -> BackwardPass:
    from pathnet.engines.triton.routed_backward import BackwardPass, schedule_backward

    saved = Saved.room(network, batch, allocate)
    return BackwardPass(
        network, saved, PlanBuffer(schedule_backward(network, capacity, exits), allocate), batch, allocate
    )


def room_of(device: torch.device) -> int:
    """Return the bytes for the gradients of one walk: `ROOM`, on a small GPU a quarter of its memory."""
    if device.type not in ("cuda", "xpu"):
        return ROOM
    return min(ROOM, int(torch.get_device_module(device).get_device_properties(device).total_memory) // 4)


def _most_backward(record: TritonRecord) -> int:
    """Return how many routings are walked at once."""

    def count() -> int:
        return most_within(room, lambda capacity: partial(_walk, record.network, record.batch, capacity, ALL_EXITS))

    room = room_of(record.saved.bits.device)
    return record.graphs.most(("walk", record.batch, room), count)


def _forward(prepared: TritonPrepared, y0: Tensor, steps: Steps) -> Tensor:
    """Return ``y_n`` under each routing, float32 [P, B, C, H, W]."""
    from pathnet.engines.triton.routed_forward import routed_forward

    graphs, network, batch = prepared.graphs, prepared.network, len(y0)
    capacity, exits = capacity_for(steps.count), USUAL_FORWARD | steps.exits

    def begin(forward: ForwardPass) -> None:
        graphs.hold(None)
        forward.begin(plan_launches(forward.schedule, steps), y0)

    key = "forward", batch, capacity, exits
    with graphs.replayed(key, y0.device, partial(_pass, network, batch, capacity, exits), begin) as forward:
        if forward is None:
            return routed_forward(network, y0, steps)
        return forward.ends(steps.count).contiguous()


def _pass(
    network: TritonNetwork, batch: int, capacity: int, exits: frozenset[Exit], allocate: Allocate
) -> ForwardPass:
    from pathnet.engines.triton.routed_forward import ForwardPass, schedule_forward

    return ForwardPass(network, PlanBuffer(schedule_forward(network, capacity, exits), allocate), batch, allocate)


def _most_forward(prepared: TritonPrepared, batch: int) -> int:
    """Return how many routings go forward at once."""

    def count() -> int:
        return most_within(room, lambda capacity: partial(_pass, prepared.network, batch, capacity, ALL_EXITS))

    room = room_of(prepared.network.affine.device)
    return prepared.graphs.most(("forward", batch, room), count)


def unsupported_side(net: ResidualNet) -> str | None:
    """Why the kernels have no form for a network that has tables, or None."""
    for index, block in enumerate(blocks_of(net)):
        form = block.post_activation_form() or block.fused_form()
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
