"""The triton engine: BN-ReLU-conv and post-activation blocks of any width, both BN modes, on GPUs that Triton serves.

The modules, in the order of a backward pass:

1. `packing` packs a `network`; `recording` records a forward pass.
2. `steps` holds what each routing does at every block, `schedule` the launches of a pass, `plan` the rows that they
   read, and `state` their tensors on the device.
3. `replay` runs a pass, as a graph if the device has graphs (`graphs`).
4. `routed_backward` launches one `dgrad` kernel per unit, `routed_forward` one `forward` kernel.
5. `sums`, `folding` (backward), `statistics` (forward) and `endings` (both) do the part of batch normalisation that
   depends on the whole batch.
6. `arrivals` copies the gradients or computes their norms.

`training` and `wgrad` serve `pathnet.nn`.

Kernels are compiled for a network's widths, kernel sizes and strides before their first use, by `ahead` on all cores;
Triton caches them on disk. They serve images and batches of any size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.engines import fallback
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_form
from pathnet.engines.self_check import disagreement
from pathnet.engines.triton import replay
from pathnet.engines.triton.graphs import Graphs
from pathnet.engines.triton.launch import on_device
from pathnet.engines.triton.limits import check_images, unsupported_side
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.packing import network_of
from pathnet.engines.triton.plan import LaunchPlan
from pathnet.engines.triton.state import Saved
from pathnet.engines.triton.steps import Steps, steps_backward, steps_forward
from pathnet.models.context import Context
from pathnet.recording import BatchNormMode
from pathnet.scaling import ScaledGradient

__all__ = ["TritonEngine", "TritonPrepared", "TritonWalk"]


class TritonEngine:
    """Triton kernels, compiled at run time."""

    name = "triton"
    device_type: str | None = "cuda"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            return "this process sees no GPU"
        return None

    def unsupported(self, job: Job) -> str | None:
        if job.device.type not in ("cuda", "xpu"):
            return f"the network is on {job.device}"
        if job.precision in ("float64", "network"):
            return f'no precision="{job.precision}"'
        reason = unsupported_form(job.net, job.bn) or unsupported_side(job.net)
        if reason is not None:
            return reason

        def precompile(work: Callable[[], object]) -> None:
            from pathnet.engines.triton.ahead import compile_for

            with on_device(job.device):
                compile_for(work)

        # The check launches exactly the network's kernels, so none is left to be compiled.
        return disagreement(self, job, precompile)

    def prepare(self, job: Job) -> TritonPrepared:
        from pathnet.engines.triton.recording import plan_recording

        network = network_of(job.net, job.bn, job.precision, job.y0_shape)
        return TritonPrepared(network, plan_recording(network))


@dataclass(frozen=True)
class TritonPrepared:
    """A packed network, the plan of its recording pass, and its graphs."""

    network: TritonNetwork
    recording: LaunchPlan
    graphs: Graphs = field(default_factory=Graphs)

    def bound(self, context: Context) -> TritonPrepared:
        return self

    def max_routings(self, y0: Tensor) -> int | None:
        return replay.most_forward(self.network, self.graphs, len(y0), self.network.affine.device)

    def record(self, y0: Tensor) -> tuple[Tensor, TritonWalk]:
        check_images(self.network, y0)
        with on_device(y0.device):
            y, saved = replay.record(self.network, self.recording, self.graphs, y0)
        walk = TritonWalk(self.network, saved, len(y0), self.graphs)
        return (y.relu(), replace(walk, last=y > 0)) if self.network.post else (y, walk)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        check_images(self.network, y0)
        steps = steps_forward(self.network.blocks, _on_host(routing))
        with on_device(y0.device):
            y = replay.forward(self.network, self.graphs, y0, steps)
        return y.relu_() if self.network.post else y


@dataclass(frozen=True)
class TritonWalk:
    """The record of one forward pass: ReLU bits, in BN mode ``batch`` also normalised activations.

    Attributes:
        graphs: graphs of the network's passes; they live as long as one of its records does.
        last: the bits of the last join's ReLU in a post-activation network, bool [B, C, H, W].
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
        network, saved = self.network, self.saved
        weights = [
            weight
            for block in network.blocks
            for conv in (*block.convolutions, block.projection)
            if conv is not None
            for weight in (conv.weight, conv.transposed, conv.shift)
        ]
        tensors = saved.bits, saved.normalized, saved.scales, self.last, network.affine, network.statistics, *weights
        return [tensor for tensor in tensors if tensor is not None]

    def max_routings(self) -> int | None:
        return replay.most_backward(self.network, self.graphs, self.batch, self.saved.bits.device)

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        from pathnet.engines.triton.routed_backward import routed_backward

        steps, start = _steps_backward(self.network, _on_host(routing)), self._before_last_join(start)
        with (
            on_device(start.mantissa.device),
            replay.replayed_backward(self.network, self.saved, self.graphs, start, steps) as backward,
        ):
            if backward is None:
                return routed_backward(self.network, self.saved, *start, steps)
            return backward.arrived(steps.count)

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        from pathnet.engines.triton.routed_backward import routed_backward_norms

        steps, start = _steps_backward(self.network, _on_host(routing)), self._before_last_join(start)
        with (
            on_device(start.mantissa.device),
            replay.replayed_backward(self.network, self.saved, self.graphs, start, steps) as backward,
        ):
            if backward is None:
                return routed_backward_norms(self.network, self.saved, *start, steps)
            # A copy, since the graph's next run overwrites them.
            return backward.norms[: steps.count].clone()

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        from pathnet.engines.triton.routed_backward import SingleBlocks

        coefficients, device = _on_host(routing), start.mantissa.device
        expected = [
            (index, [*[(a, 0.0)] * count, *[(0.0, c)] * count])
            for count, (index, (a, c)) in enumerate(reversed(list(enumerate(coefficients.tolist()))), 1)
        ]
        with on_device(device):
            through_block = SingleBlocks(self.network, self.saved, device, expected)
            start = self._before_last_join(start)
            return fallback.sums_by_length(through_block, start, torch.from_numpy(coefficients))

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return fallback.norms_of(self.sums_by_length(start, routing))

    def _before_last_join(self, start: ScaledGradient) -> ScaledGradient:
        """Return the scaled gradient at the sum that the last join reads."""
        return start if self.last is None else start._replace(mantissa=start.mantissa.where(self.last, 0.0))

    def bits(self) -> list[list[Tensor]]:
        """Return the recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; for post-activation blocks
        the join's bits come last."""
        units = [
            [self._unit_bits(block.first + unit) for unit in range(len(block.convolutions))]
            for block in self.network.blocks
        ]
        if self.last is None:
            return units
        joins = [*(bits[0] for bits in units[1:]), self.last]
        return [[*bits[1:], join] for bits, join in zip(units, joins, strict=True)]

    def _unit_bits(self, unit: int) -> Tensor:
        shape = self.network.convolutions[unit].input
        width = -(-shape.channels // 8)
        packed = self.saved.unit_bits(unit)[: self.batch * shape.pixels * width]
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        by_pixel = bits.reshape(self.batch, shape.height, shape.width, width * 8)[..., : shape.channels]
        return by_pixel.permute(0, 3, 1, 2).bool().contiguous()


def _on_host(routing: Tensor) -> NDArray[np.float64]:
    """Return the coefficients on the host, where plans are made; synchronises with their device."""
    return routing.detach().double().cpu().numpy()


def _steps_backward(network: TritonNetwork, coefficients: NDArray[np.float64]) -> Steps:
    """Return the steps of the divided network, with its divisors in the results' powers of two."""
    if network.magnitudes is None:
        return steps_backward(network.blocks, coefficients)
    divided, shifts = network.magnitudes.of_routing(torch.from_numpy(coefficients))
    steps = steps_backward(network.blocks, divided.numpy())
    return replace(steps, exponents=steps.exponents + shifts.numpy())
