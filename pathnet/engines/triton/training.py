"""One block forward, and back to its input and its parameters: what `pathnet.nn.fused_residual` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pathnet.engines.triton.arrivals import arrived
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles
from pathnet.engines.triton.forward import forward_unit
from pathnet.engines.triton.network import Convolution, FusedBlock, TritonNetwork
from pathnet.engines.triton.plan import Plan, plan_backward, plan_forward
from pathnet.engines.triton.routed_backward import dgrad_paths
from pathnet.engines.triton.routed_backward import start as start_backward
from pathnet.engines.triton.routed_forward import ends
from pathnet.engines.triton.routed_forward import start as start_forward
from pathnet.engines.triton.state import Kept, Tables
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
    plan, tables, sources = _forward_plan(_Key(network, x.device), a, c)
    batch, by_batch = len(x), network.bn == "batch"
    kept = kept_for(
        network,
        batch,
        _room(x, torch.uint8, network.bits_starts(batch), network.bits_sizes(batch)),
        _room(x, x.dtype, network.normalized_starts(batch), network.normalized_sizes(batch)),
        network.affine[:, 0],
    )
    activations = start_forward(network, plan, tables, x)
    for task in plan.launches:
        forward_unit(network, activations, task, kept)
    statistics = activations.statistics[sources] if by_batch else network.statistics
    scales = network.affine[:, 0] * (statistics[:, 1] + network.epsilon).rsqrt()
    output = ends(network, plan, activations)[0]
    return Pass(output, kept.bits, kept.normalized, scales, statistics)


def _room(x: Tensor, dtype: torch.dtype, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """For all units, zeros in the gaps between: what an operator gives is to be a function of what it is given."""
    room = x.new_empty(starts[-1], dtype=dtype)
    for start, size, end in zip(starts, sizes, starts[1:], strict=False):
        if start + size < end:
            room[start + size : end].zero_()
    return room


def kept_for(network: TritonNetwork, batch: int, bits: Tensor, normalized: Tensor, scales: Tensor) -> Kept:
    begin = network.normalized_starts(batch)
    starts = _numbers(tuple(begin[:-1]), bits.device)
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
    plan, tables = _backward_plan(_Key(network, grad.device), a, c)
    gradients = start_backward(network, plan, tables, grad[None] * 2.0 ** plan.exponents[0], sums=True)
    # Inside the module gradients have neither c nor the power of two that the plan takes out of a and c.
    inner, skipped = c * 2.0 ** -plan.exponents[0], a * 2.0 ** -plan.exponents[0]
    weights: dict[int, Tensor] = {}
    affine: dict[int, Tensor] = {}
    for task in plan.launches:
        conv, unit = block.convolutions[task.unit], task.unit
        source, _, entered, _, _ = plan.rows[task.first]
        weights[unit] = _times(wgrad(gradients, kept, source, conv, unit, network.affine[unit]), inner)
        if unit == 0 and block.projection is not None and a != 0:
            own = wgrad(gradients, kept, entered, block.projection, 0, network.affine[0])
            weights[len(block.convolutions)] = _times(own, skipped)
        dgrad(gradients, kept, block, task)
        tiles, channels = dgrad_point_tiles(conv, gradients.batch), conv.given.channels
        totals = gradients.sums[: tiles * 2 * channels].reshape(tiles, 2, channels).sum(0).flip(0)
        affine[unit] = totals if unit == 0 else _times(totals, inner)
    finals = _numbers(tuple(plan.finals), grad.device, torch.int32)
    made = arrived(gradients, kept, finals, block.given, grad.dtype)[0].permute(0, 3, 1, 2)
    return made, [weights[unit] for unit in sorted(weights)], [affine[unit] for unit in sorted(affine)]


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


class _Key:
    """A network of one block, as the plans see it: without its values."""

    def __init__(self, network: TritonNetwork, device: torch.device) -> None:
        block = network.blocks[0]
        self.projection = None if block.projection is None else _shape_of(block.projection)
        self.convolutions = [_shape_of(conv) for conv in block.convolutions]
        self.blocks, self.bn = [FusedBlock(self.convolutions, self.projection, 0)], network.bn
        shapes = [
            None if conv is None else (conv.kernel, conv.given, conv.made)
            for conv in (*self.convolutions, self.projection)
        ]
        self.key = tuple(shapes), network.bn, network.walk_dtype, device

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


def _shape_of(conv: Convolution) -> Convolution:
    return replace(conv, weight=conv.weight.new_empty(0), transposed=conv.transposed.new_empty(0))


@lru_cache(maxsize=256)
def _forward_plan(key: _Key, a: float, c: float) -> tuple[Plan, Tables, Tensor]:
    """With the states that units read. Kept, since a graph cannot be captured over copies to the device."""
    plan, device = plan_forward(key.blocks, [[(a, c)]]), key.key[3]
    return plan, Tables(plan, device), torch.tensor([row[0] for row in plan.rows], device=device)


@lru_cache(maxsize=256)
def _backward_plan(key: _Key, a: float, c: float) -> tuple[Plan, Tables]:
    plan = plan_backward(key.blocks, [[(a, c)]], key.bn == "batch", dgrad_paths(key.blocks))
    return plan, Tables(plan, key.key[3])


@lru_cache(maxsize=1024)
def _numbers(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
