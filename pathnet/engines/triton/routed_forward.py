"""Forward passes under routings."""

from __future__ import annotations

import torch
from torch import Tensor

from pathnet.engines.triton.endings import joined
from pathnet.engines.triton.forward import forward_tile, forward_unit, passed
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import Coefficients, Launch, Plan, plan_forward
from pathnet.engines.triton.state import Activations, Tables

__all__ = ["ends", "routed_forward", "start"]


def routed_forward(network: TritonNetwork, y0: Tensor, coefficients: Coefficients) -> Tensor:
    """float32 [P, B, C, H, W]: ``y_n`` under each routing, from ``y_0`` [B, C_0, H_0, W_0]."""
    plan = plan_forward(network.blocks, coefficients)
    activations = start(network, plan, Tables(plan, y0.device), y0)
    for task in plan.launches:
        (joined if task.ending else forward_unit)(network, activations, task)
    return ends(network, plan, activations).contiguous()


def start(network: TritonNetwork, plan: Plan, tables: Tables, y0: Tensor) -> Activations:
    """The states of a pass, ``y_0`` [B, C, H, W] in the first of them, in its type."""
    batch, device, states = len(y0), y0.device, len(plan.slots)
    most = max((task.count * _moments(network, task, batch) for task in plan.launches), default=0)
    by_batch = network.bn == "batch"
    activations = Activations(
        torch.empty(plan.slot_count, -(-batch * network.largest // 16) * 16, dtype=y0.dtype, device=device),
        tables.rows,
        tables.launches,
        tables.states,
        torch.zeros(states if by_batch else 0, 2, network.widest, device=device),
        torch.empty(most if by_batch else 0, device=device),
        batch,
    )
    activations.values[plan.slots[0], : y0.numel()] = y0.permute(0, 2, 3, 1).reshape(-1)
    # Of what a ReLU alone reads they stay so: nothing is taken off, nothing divided by.
    activations.statistics[:, 1] = 1
    if by_batch and not network.post:
        variance, mean = torch.var_mean(y0.float(), dim=(0, 2, 3), correction=0)
        activations.statistics[0, :, : y0.shape[1]] = torch.stack([mean, variance])
    return activations


def _moments(network: TritonNetwork, task: Launch, batch: int) -> int:
    """Numbers that the tiles of a row leave of their statistics."""
    if task.ending:
        return 0
    conv = passed(network.blocks[task.block], task)
    return 3 * conv.made.channels * forward_tile(conv).point_tiles(batch, conv.made.pixels)


def ends(network: TritonNetwork, plan: Plan, activations: Activations) -> Tensor:
    """[P, B, C, H, W], channels last: the routings' last states."""
    made, batch = network.blocks[-1].made, activations.batch
    own = [activations.values[plan.slots[state], : batch * made.size] for state in plan.finals]
    whole = torch.stack(own).reshape(-1, batch, made.height, made.width, made.channels)
    return whole.permute(0, 1, 4, 2, 3)
