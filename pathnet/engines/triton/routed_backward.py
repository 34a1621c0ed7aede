"""Walks back under routings, over what a forward pass has kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.triton.arrivals import arrived, squared_norms
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles, dgrad_tile
from pathnet.engines.triton.endings import ending_backward, ending_point_tiles
from pathnet.engines.triton.folding import constants_size, folded_size
from pathnet.engines.triton.network import FusedBlock, TritonNetwork
from pathnet.engines.triton.plan import Coefficients, Plan, plan_backward
from pathnet.engines.triton.state import Gradients, Kept, Tables, to_device

__all__ = ["dgrad_paths", "routed_backward", "routed_backward_norms", "start", "through_block"]


def routed_backward(
    network: TritonNetwork, kept: Kept, grad: Tensor, exponent: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor]:
    """The scaled gradients at ``y_0``: float32 [P, B, C, H, W] and int32 [P, B] or [P, 1]."""
    return _arrived(network, kept, *_walk(network, kept, grad[None], exponent[None], coefficients))


def through_block(
    network: TritonNetwork,
    kept: Kept,
    index: int,
    grads: Tensor,
    exponents: Tensor,
    ways: Sequence[tuple[float, float]],
) -> tuple[Tensor, Tensor]:
    """Each of the scaled gradients [g, B, C, H, W] at a block's output by its own (a, c) to the block's input."""
    alone = replace(network, blocks=[network.blocks[index]])
    plan, gradients = _walk(alone, kept, grads, exponents, [[way] for way in ways], range(len(ways)))
    return _arrived(alone, kept, plan, gradients)


def _arrived(network: TritonNetwork, kept: Kept, plan: Plan, gradients: Gradients) -> tuple[Tensor, Tensor]:
    device = gradients.values.device
    finals = _finals(plan, device)
    values = arrived(gradients, kept, finals, network.blocks[0].given, torch.float32).permute(0, 1, 4, 2, 3)
    mantissas = to_device(torch.tensor(plan.mantissas), device)
    return scaling.rescale(
        (values * mantissas[:, None, None, None, None]).contiguous(), _exponents(plan, gradients, finals)
    )


def routed_backward_norms(
    network: TritonNetwork, kept: Kept, grad: Tensor, exponent: Tensor, coefficients: Coefficients
) -> Tensor:
    """float64 [P, B]: the norms of the samples' slices."""
    plan, gradients = _walk(network, kept, grad[None], exponent[None], coefficients)
    finals = _finals(plan, grad.device)
    squares = squared_norms(gradients, kept, finals, network.blocks[0].given)
    mantissas = to_device(torch.tensor(plan.mantissas, dtype=torch.float64).abs(), grad.device)
    exponents = _exponents(plan, gradients, finals).expand_as(squares)
    return scaling.times_power_of_two(squares.sqrt() * mantissas[:, None], exponents)


def _walk(
    network: TritonNetwork,
    kept: Kept,
    grads: Tensor,
    exponents: Tensor,
    coefficients: Coefficients,
    starts: Sequence[int] | None = None,
) -> tuple[Plan, Gradients]:
    """From the scaled gradients [g, B, C, H, W], of which each routing starts from one."""
    plan = plan_backward(network.blocks, coefficients, network.bn == "batch", dgrad_paths(network.blocks), starts)
    gradients = start(network, plan, Tables(plan, grads.device), grads, sums=network.bn == "batch")
    gradients.exponents[: len(exponents)] = exponents
    for task in plan.launches:
        (ending_backward if task.ending else dgrad)(gradients, kept, network.blocks[task.block], task)
    return plan, gradients


def dgrad_paths(blocks: Sequence[FusedBlock]) -> Callable[[int, int], int]:
    """How many rows a tile of a block's unit holds."""
    return lambda block, unit: dgrad_tile(blocks[block].convolutions[unit]).paths


def start(network: TritonNetwork, plan: Plan, tables: Tables, grads: Tensor, sums: bool) -> Gradients:
    """The states of a walk, ``grads`` [g, B, C, H, W] in the first of them.

    Args:
        sums: whether BN's two sums are wanted.
    """
    batch, device, states, by_batch = grads.shape[1], grads.device, len(plan.slots), network.bn == "batch"
    room = _room(network, plan, batch)
    width = 1 if by_batch else batch
    gradients = Gradients(
        torch.empty(plan.slot_count, -(-batch * network.largest // 16) * 16, dtype=network.walk_dtype, device=device),
        tables.rows,
        tables.launches,
        tables.states,
        torch.zeros(states, width, dtype=torch.int32, device=device),
        torch.zeros(states, width, dtype=torch.int32, device=device),
        torch.empty(states if by_batch else 0, 2, network.widest, device=device),
        torch.empty(room[0] if sums else 0, device=device),
        torch.empty(room[1] if by_batch else 0, dtype=network.walk_dtype, device=device),
        torch.empty(room[2] if by_batch else 0, dtype=network.walk_dtype, device=device),
        batch,
        by_batch,
    )
    for slot, grad in zip(plan.slots, grads, strict=False):
        gradients.values[slot, : grad.numel()] = grad.permute(0, 2, 3, 1).reshape(-1).to(network.walk_dtype)
    return gradients


def _room(network: TritonNetwork, plan: Plan, batch: int) -> list[int]:
    """Numbers that the largest launches leave: tiles' shares of BN's two sums, folded weights, their constants."""
    sizes = [[0, 0, 0]]
    for task in plan.launches:
        block = network.blocks[task.block]
        if task.ending:
            sizes.append([task.count * 2 * block.made.channels * ending_point_tiles(block, batch), 0, 0])
            continue
        conv = block.convolutions[task.unit]
        each = 2 * conv.given.channels * dgrad_point_tiles(conv, batch), folded_size(conv), constants_size(conv)
        sizes.append([task.count * size for size in each])
    return [max(column) for column in zip(*sizes, strict=True)]


def _finals(plan: Plan, device: torch.device) -> Tensor:
    return to_device(torch.tensor(plan.finals, dtype=torch.int32), device)


def _exponents(plan: Plan, gradients: Gradients, finals: Tensor) -> Tensor:
    """int32 [P, B] or [P, 1]: those of the final states, and what was set aside on the way."""
    aside = torch.tensor(plan.exponents, dtype=torch.int64).clamp(-(1 << 30), 1 << 30).int()
    return gradients.exponents[finals.clamp(min=0).long()] + to_device(aside, finals.device)[:, None]
