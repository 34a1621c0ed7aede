"""One block's forward pass, and the gradients of its input and parameters, for `pathnet.nn.fused_residual`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pathnet.engines.triton.arrivals import arrived
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles
from pathnet.engines.triton.network import FusedBlock, PackedConvolution, TritonNetwork
from pathnet.engines.triton.numbers import write_numbers
from pathnet.engines.triton.plan import LaunchPlan, plan_backward, plan_forward
from pathnet.engines.triton.routed_backward import BackwardPass, dgrad_paths
from pathnet.engines.triton.routed_forward import ForwardPass
from pathnet.engines.triton.state import PlanBuffer, Saved, allocate_on
from pathnet.engines.triton.wgrad import wgrad

__all__ = ["BlockOutput", "block_backward", "block_forward"]


@dataclass(frozen=True)
class BlockOutput:
    """The output of a block's forward pass, and the inputs of its backward pass.

    Attributes:
        output: [B, C, H, W], channels last, in the type of the input.
        bits, normalized, scales: see `Saved`.
        statistics: float32 [units, 2, widest], mean and variance of the batch; in evaluation the running ones.
    """

    output: Tensor
    bits: Tensor
    normalized: Tensor
    scales: Tensor
    statistics: Tensor


def block_forward(network: TritonNetwork, x: Tensor, a: float, c: float) -> BlockOutput:
    """Run ``a skip(x) + c residual(x)``, for c other than 0, through a network of one block."""
    batch, by_batch = len(x), network.bn == "batch"
    plan, words = _forward_plan(_Key(network), a, c)
    saved = saved_for(
        network,
        batch,
        _room(x, torch.uint8, network.bits_starts(batch), network.bits_sizes(batch)),
        _room(x, x.dtype, network.normalized_starts(batch), network.normalized_sizes(batch)),
        network.affine[:, 0],
    )
    allocate = allocate_on(x.device)
    forward = ForwardPass(network, PlanBuffer(plan.schedule, allocate), batch, allocate, x.dtype)
    write_numbers(words, forward.buffer.packed)
    forward.start(x)
    forward.launch(plan.schedule.launches, saved)
    statistics = network.statistics
    if by_batch:
        sources = [int(plan.rows_of(launch)[0, 0]) for launch in plan.schedule.launches]
        statistics = torch.stack([forward.activations.statistics[source] for source in sources])
    scales = network.affine[:, 0] * (statistics[:, 1] + network.epsilon).rsqrt()
    return BlockOutput(forward.end(plan).clone(), saved.bits, saved.normalized, scales, statistics)


def _room(x: Tensor, dtype: torch.dtype, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return memory for all units, zeros in the gaps between: an operator's output may depend only on its input."""
    room = x.new_empty(starts[-1], dtype=dtype)
    for start, size, end in zip(starts, sizes, starts[1:], strict=False):
        if start + size < end:
            room[start + size : end].zero_()
    return room


def saved_for(network: TritonNetwork, batch: int, bits: Tensor, normalized: Tensor, scales: Tensor) -> Saved:
    begin = network.normalized_starts(batch)
    starts = torch.empty(len(begin) - 1, dtype=torch.int64, device=bits.device)
    write_numbers(np.array(begin[:-1], dtype=np.int64).view(np.int32).tolist(), starts.view(torch.int32))
    return Saved(bits, network.bits_starts(batch), normalized, begin, starts, scales)


def block_backward(
    network: TritonNetwork, saved: Saved, grad: Tensor, a: float, c: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of the input and the parameters, from the gradient at the output [B, C, H, W].

    Returns:
        The input's, channels last, in the type of ``grad``; the weights', in the order of the units, the projection's
        last where there is one and ``a`` is not 0; each unit's gradients of BN's gain and bias, float32 [2, C].
    """
    block = network.blocks[0]
    plan, words = _backward_plan(_Key(network), a, c)
    allocate, exponent = allocate_on(grad.device), int(plan.exponents[0])
    backward = BackwardPass(network, saved, PlanBuffer(plan.schedule, allocate), len(grad), allocate, sums=True)
    write_numbers(words, backward.buffer.packed)
    gradients = backward.gradients
    gradients.largest.zero_()
    backward.start(grad[None] * 2.0**exponent, gradients.exponents.new_zeros(()))
    # Inside the module, gradients lack c, and the power of two that the plan takes out of a and c.
    inner, skipped = c * 2.0**-exponent, a * 2.0**-exponent
    weights: dict[int, Tensor] = {}
    affine: dict[int, Tensor] = {}
    for launch in plan.schedule.launches:
        conv, unit = block.convolutions[launch.unit], launch.unit
        source, _, entered, _, _ = plan.rows_of(launch)[0].tolist()
        weights[unit] = _times(wgrad(gradients, saved, source, conv, unit, network.affine[unit]), inner)
        if unit == 0 and block.projection is not None and a != 0:
            projection_grad = wgrad(gradients, saved, entered, block.projection, 0, network.affine[0])
            weights[len(block.convolutions)] = _times(projection_grad, skipped)
        dgrad(gradients, saved, block, launch)
        tiles, channels = dgrad_point_tiles(conv, gradients.batch), conv.input.channels
        totals = gradients.sums[: tiles * 2 * channels].reshape(tiles, 2, channels).sum(0).flip(0)
        affine[unit] = totals if unit == 0 else _times(totals, inner)
    input_grad = arrived(gradients, saved, backward.buffer.finals, block.input, grad.dtype)[0].permute(0, 3, 1, 2)
    return input_grad, [weights[unit] for unit in sorted(weights)], [affine[unit] for unit in sorted(affine)]


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


class _Key:
    """A network of one block without values or device, which is all that plans depend on."""

    def __init__(self, network: TritonNetwork) -> None:
        block = network.blocks[0]
        self.projection = None if block.projection is None else _shape_of(block.projection)
        self.convolutions = [_shape_of(conv) for conv in block.convolutions]
        self.blocks, self.bn = [FusedBlock(self.convolutions, self.projection, 0)], network.bn
        shapes = [
            None if conv is None else (conv.kernel, conv.input, conv.output)
            for conv in (*self.convolutions, self.projection)
        ]
        self.key = tuple(shapes), network.bn, network.backward_dtype

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


def _shape_of(conv: PackedConvolution) -> PackedConvolution:
    weight, transposed = (torch.empty(0, dtype=tensor.dtype) for tensor in (conv.weight, conv.transposed))
    return replace(conv, weight=weight, transposed=transposed)


# Plans and their numbers are cached on the host alone: device memory belongs to a stream, and to a graph's pool while
# the graph is warmed up or captured.
@lru_cache(maxsize=256)
def _forward_plan(key: _Key, a: float, c: float) -> tuple[LaunchPlan, list[int]]:
    return _packed(plan_forward(key.blocks, np.array([[(a, c)]], dtype=np.float64)))


@lru_cache(maxsize=256)
def _backward_plan(key: _Key, a: float, c: float) -> tuple[LaunchPlan, list[int]]:
    coefficients = np.array([[(a, c)]], dtype=np.float64)
    return _packed(plan_backward(key.blocks, coefficients, key.bn == "batch", dgrad_paths(key.blocks)))


def _packed(plan: LaunchPlan) -> tuple[LaunchPlan, list[int]]:
    return plan, PlanBuffer(plan.schedule, allocate_on(torch.device("meta"))).pack(plan).tolist()
