"""One block forward, and back to its input and its parameters: what `pathnet.nn.fused_residual` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pathnet.engines.triton.arrivals import arrived
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles
from pathnet.engines.triton.network import Convolution, FusedBlock, TritonNetwork
from pathnet.engines.triton.numbers import write_numbers
from pathnet.engines.triton.plan import Plan, plan_backward, plan_forward
from pathnet.engines.triton.routed_backward import Walk, dgrad_paths
from pathnet.engines.triton.routed_forward import Forward
from pathnet.engines.triton.state import Kept, Tables, allocate_on
from pathnet.engines.triton.wgrad import wgrad

__all__ = ["Pass", "block_backward", "block_forward"]


@dataclass(frozen=True)
class Pass:
    """What a forward pass leaves.

    Attributes:
        output: [B, C, H, W], channels last, in the type of the input.
        bits, normalized, scales: see `Kept`.
        statistics: float32 [units, 2, widest], the batch's mean and variance; those given in evaluation.
    """

    output: Tensor
    bits: Tensor
    normalized: Tensor
    scales: Tensor
    statistics: Tensor


def block_forward(network: TritonNetwork, x: Tensor, a: float, c: float) -> Pass:
    """``a skip(x) + c residual(x)``, for c other than 0, of a network of one block."""
    batch, by_batch = len(x), network.bn == "batch"
    plan, words = _forward_plan(_Key(network), a, c)
    kept = kept_for(
        network,
        batch,
        _room(x, torch.uint8, network.bits_starts(batch), network.bits_sizes(batch)),
        _room(x, x.dtype, network.normalized_starts(batch), network.normalized_sizes(batch)),
        network.affine[:, 0],
    )
    allocate = allocate_on(x.device)
    forward = Forward(network, Tables(plan.schedule, allocate), batch, allocate, x.dtype)
    write_numbers(words, forward.tables.packed)
    forward.start(x)
    forward.launch(plan.schedule.launches, kept)
    statistics = network.statistics
    if by_batch:
        sources = [int(plan.rows_of(launch)[0, 0]) for launch in plan.schedule.launches]
        statistics = torch.stack([forward.activations.statistics[source] for source in sources])
    scales = network.affine[:, 0] * (statistics[:, 1] + network.epsilon).rsqrt()
    return Pass(forward.end(plan).clone(), kept.bits, kept.normalized, scales, statistics)


def _room(x: Tensor, dtype: torch.dtype, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """For all units, zeros in the gaps between: what an operator gives is to be a function of what it is given."""
    room = x.new_empty(starts[-1], dtype=dtype)
    for start, size, end in zip(starts, sizes, starts[1:], strict=False):
        if start + size < end:
            room[start + size : end].zero_()
    return room


def kept_for(network: TritonNetwork, batch: int, bits: Tensor, normalized: Tensor, scales: Tensor) -> Kept:
    begin = network.normalized_starts(batch)
    starts = torch.empty(len(begin) - 1, dtype=torch.int64, device=bits.device)
    write_numbers(np.array(begin[:-1], dtype=np.int64).view(np.int32).tolist(), starts.view(torch.int32))
    return Kept(bits, network.bits_starts(batch), normalized, begin, starts, scales)


def block_backward(
    network: TritonNetwork, kept: Kept, grad: Tensor, a: float, c: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """From the gradient at the output [B, C, H, W] to those of the input and the parameters.

    Returns:
        The input's, channels last, in the type of ``grad``; the weights', in the order of the units, the projection's
        last where there is one and ``a`` is not 0; of each unit float32 [2, C], those of BN's gain and bias.
    """
    block = network.blocks[0]
    plan, words = _backward_plan(_Key(network), a, c)
    allocate, exponent = allocate_on(grad.device), int(plan.exponents[0])
    walk = Walk(network, kept, Tables(plan.schedule, allocate), len(grad), allocate, sums=True)
    write_numbers(words, walk.tables.packed)
    gradients = walk.gradients
    gradients.largest.zero_()
    walk.start(grad[None] * 2.0**exponent, gradients.exponents.new_zeros(()))
    # Inside the module gradients have neither c nor the power of two that the plan takes out of a and c.
    inner, skipped = c * 2.0**-exponent, a * 2.0**-exponent
    weights: dict[int, Tensor] = {}
    affine: dict[int, Tensor] = {}
    for launch in plan.schedule.launches:
        conv, unit = block.convolutions[launch.unit], launch.unit
        source, _, entered, _, _ = plan.rows_of(launch)[0].tolist()
        weights[unit] = _times(wgrad(gradients, kept, source, conv, unit, network.affine[unit]), inner)
        if unit == 0 and block.projection is not None and a != 0:
            of_projection = wgrad(gradients, kept, entered, block.projection, 0, network.affine[0])
            weights[len(block.convolutions)] = _times(of_projection, skipped)
        dgrad(gradients, kept, block, launch)
        tiles, channels = dgrad_point_tiles(conv, gradients.batch), conv.given.channels
        totals = gradients.sums[: tiles * 2 * channels].reshape(tiles, 2, channels).sum(0).flip(0)
        affine[unit] = totals if unit == 0 else _times(totals, inner)
    of_input = arrived(gradients, kept, walk.tables.finals, block.given, grad.dtype)[0].permute(0, 3, 1, 2)
    return of_input, [weights[unit] for unit in sorted(weights)], [affine[unit] for unit in sorted(affine)]


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


class _Key:
    """A network of one block, as the plans see it: without its values, and on no device."""

    def __init__(self, network: TritonNetwork) -> None:
        block = network.blocks[0]
        self.projection = None if block.projection is None else _shape_of(block.projection)
        self.convolutions = [_shape_of(conv) for conv in block.convolutions]
        self.blocks, self.bn = [FusedBlock(self.convolutions, self.projection, 0)], network.bn
        shapes = [
            None if conv is None else (conv.kernel, conv.given, conv.made)
            for conv in (*self.convolutions, self.projection)
        ]
        self.key = tuple(shapes), network.bn, network.walk_dtype

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


def _shape_of(conv: Convolution) -> Convolution:
    weight, transposed = (torch.empty(0, dtype=tensor.dtype) for tensor in (conv.weight, conv.transposed))
    return replace(conv, weight=weight, transposed=transposed)


# Plans alone are kept, and their numbers on the host: what lies on a device belongs to a stream, and while graphs are
# warmed up or captured to their pool.
@lru_cache(maxsize=256)
def _forward_plan(key: _Key, a: float, c: float) -> tuple[Plan, list[int]]:
    return _packed(plan_forward(key.blocks, np.array([[(a, c)]], dtype=np.float64)))


@lru_cache(maxsize=256)
def _backward_plan(key: _Key, a: float, c: float) -> tuple[Plan, list[int]]:
    coefficients = np.array([[(a, c)]], dtype=np.float64)
    return _packed(plan_backward(key.blocks, coefficients, key.bn == "batch", dgrad_paths(key.blocks)))


def _packed(plan: Plan) -> tuple[Plan, list[int]]:
    return plan, Tables(plan.schedule, allocate_on(torch.device("meta"))).pack(plan).tolist()
