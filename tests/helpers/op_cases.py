"""Right arguments of the cpu engine's ops, for tests that make them wrong."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.plans import ACTIVATED, PROJECTION, Plan
from helpers.random_plans import plan_of
from pathnet.engines.cpu import ops
from pathnet.recording import BatchNormMode

Packing = tuple[bool, BatchNormMode]
"""True for plans packed for backward passes, and the BN mode."""

PACKED: list[Packing] = [(True, "running"), (True, "batch"), (False, "running"), (False, "batch")]
WALKS: dict[str, Packing] = {
    "cpu_backward_running": (True, "running"),
    "cpu_backward_batch": (True, "batch"),
    "cpu_sums_by_length_running": (True, "running"),
    "cpu_sums_by_length_batch": (True, "batch"),
    "cpu_forward_running": (False, "running"),
    "cpu_forward_batch": (False, "batch"),
}


def pack(plan: Plan, packing: Packing) -> Tensor:
    backward, bn = packing
    return plan.pack(backward, bn)


def arguments(name: str, plan: Plan, record: bool = False) -> dict[str, Any]:
    """Return the arguments of a pass by name."""
    backward, bn = WALKS[name]
    if not backward:
        values = plan.forward_arguments(bn, record)
    else:
        values = plan.sums_arguments(bn) if "sums" in name else plan.backward_arguments(bn)
    return dict(zip(inspect.signature(getattr(ops, name)).parameters, values, strict=True))


@functools.cache
def two_blocks() -> Plan:
    """Return a block with a projection, 3 channels of 9 x 7 to 6 of 5 x 4, and one with an identity skip."""
    blocks = torch.tensor([[0, 2, 1, 2, 3, 9, 7, 6, 5, 4, 0], [3, 2, 0, -1, 6, 5, 4, 6, 5, 4, 0]])
    rows = [[3, 9, 7, 5, 9, 7, 3, 1, 1], [5, 9, 7, 6, 5, 4, 3, 2, 1], [3, 9, 7, 6, 5, 4, 1, 2, 0]]
    rows += [[6, 5, 4, 2, 3, 2, 3, 1, 0], [2, 3, 2, 6, 5, 4, 3, 1, 2]]
    return plan_of(np.random.default_rng(0), 3, blocks, rows)


@functools.cache
def closed_plan() -> Plan:
    """Return a block that ends in a projection with its BN, after no ReLU, and one after it with an identity."""
    shape, out = (3, 9, 7), (6, 5, 4)
    blocks = torch.tensor([[0, 1, PROJECTION, 2, *shape, *out, 0], [4, 1, ACTIVATED, -1, *out, *out, 0]])
    ends = [*out, *out, 0, 1, 0]
    rows = [[*shape, *out, 3, 2, 1], ends, [*shape, *out, 1, 2, 0], ends, [*out, *out, 3, 1, 1], ends]
    return plan_of(np.random.default_rng(0), 3, blocks, rows, opens=True)
