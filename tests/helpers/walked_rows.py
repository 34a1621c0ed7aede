"""Runs a plan's rows with small random matrices in place of kernels, and the same passes routing by routing.

Stored values and the means that are subtracted later are apart, as in the kernels: a state is in a slot, its means
next to it, and its reader subtracts them with the x_hat of the unit whose means the state awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pathnet.engines.triton.network import FusedBlock
from pathnet.engines.triton.plan import LaunchPlan
from pathnet.engines.triton.schedule import NOTHING, Launch

__all__ = ["Maps", "brute_force", "row_results"]

Floats = NDArray[np.float64]
SIZE = 3


class Maps:
    """Matrices of every block: for each unit, for the skip and for each BN after it, and for each BN's means."""

    def __init__(self, blocks: Sequence[FusedBlock], seed: int) -> None:
        rng = np.random.default_rng(seed)

        def matrix() -> Floats:
            return rng.normal(size=(SIZE, SIZE)) / SIZE**0.5

        self.blocks = blocks
        self.units = [[matrix() for _ in block.convolutions] for block in blocks]
        self.skips = [np.eye(SIZE) if block.identity else matrix() for block in blocks]
        self.ends = [[matrix() for _ in block.ends] for block in blocks]
        count = 1 + max(max((*block.ends, block.first + len(block.convolutions))) for block in blocks)
        self.means = [matrix() for _ in range(count)]


def brute_force(maps: Maps, coefficients: Floats, starts: Floats, back: bool, batch_mode: bool) -> Floats:
    """Return [P, SIZE], the results of one routing after the other, block by block.

    Args:
        starts: [P, SIZE], each routing's start.
    """
    results = []
    for routing, start in zip(coefficients, starts, strict=True):
        value, blocks = start, list(enumerate(zip(maps.blocks, routing, strict=True)))
        for index, (block, (a, c)) in reversed(blocks) if back else blocks:
            value = (_block_back if back else _block_forward)(maps, index, block, value, a, c, batch_mode)
        results.append(value)
    return np.array(results).reshape(-1, SIZE)


def _block_back(maps: Maps, index: int, block: FusedBlock, g: Floats, a: float, c: float, batch_mode: bool) -> Floats:
    def norm(value: Floats, unit: int) -> Floats:
        return value + maps.means[unit] @ value if batch_mode else value

    residual, skip = g, g
    for end, unit in enumerate(block.ends):
        through = norm(maps.ends[index][end] @ g, unit)
        residual, skip = (through, skip) if end == 0 else (residual, through)
    for unit in reversed(range(1, len(block.convolutions))):
        residual = norm(maps.units[index][unit] @ residual, block.first + unit)
    residual, skip = c * (maps.units[index][0] @ residual), a * (maps.skips[index] @ skip)
    if block.activated:
        return residual + skip
    if block.projection is not None:
        return norm(residual + skip, block.first)
    return norm(residual, block.first) + skip


def _block_forward(
    maps: Maps, index: int, block: FusedBlock, y: Floats, a: float, c: float, batch_mode: bool
) -> Floats:
    residual, skip = y, maps.skips[index] @ y
    for matrix in maps.units[index]:
        residual = matrix @ residual
    if block.ends:
        residual = maps.ends[index][0] @ residual
        skip = maps.ends[index][1] @ skip if block.projection is not None else skip
    return c * residual + a * skip


def row_results(maps: Maps, plan: LaunchPlan, starts: Floats, back: bool) -> Floats:
    """Return [P, SIZE], the results of the plan's rows in the order of its launches.

    Args:
        starts: [starts, SIZE], the first states.
    """
    schedule = plan.schedule
    assert len(plan.states) == schedule.state_count and plan.states[:, 0].max(initial=0) < schedule.slot_count
    slots: Floats = np.full((schedule.slot_count, SIZE), np.nan)
    means: Floats = np.full((schedule.state_count, SIZE), np.nan)
    slots[plan.states[: len(starts), 0]] = starts
    holds = {int(plan.states[state, 0]): state for state in range(len(starts))}

    slots_read: set[int] = set()

    def read(state: int) -> Floats:
        slot, waiting = plan.states[state]
        slots_read.add(int(slot))
        assert holds[int(slot)] == state, "overwritten before its last reader"
        return slots[slot] + maps.means[waiting] @ means[state] if waiting != NOTHING else slots[slot].copy()

    for launch in schedule.launches:
        rows = plan.rows_of(launch)
        assert len(rows) <= launch.count
        # Rows of a launch run concurrently: none may write a state that another reads.
        slots_read.clear()
        results = [(row[1], *_row(maps, launch, row, read, back)) for row in rows.tolist() if row[1] != NOTHING]
        slots_written = {int(plan.states[target, 0]) for target, _, _ in results}
        assert len(slots_written) == len(results) and not slots_written & slots_read
        for target, value, averaged in results:
            slot = int(plan.states[target, 0])
            slots[slot], means[target], holds[slot] = value, averaged, target
    finals = [np.zeros(SIZE) if state == NOTHING else read(state) for state in plan.finals.tolist()]
    return np.ldexp(np.array(finals).reshape(-1, SIZE) * plan.mantissas[:, None], plan.exponents[:, None])


def _row(
    maps: Maps, launch: Launch, row: Sequence[int], read: Callable[[int], Floats], back: bool
) -> tuple[Floats, Floats]:
    """Return the value that a row stores, and the part of it that BN's means are taken from."""
    source, _, entered, *bits = row
    a, c = np.array(bits, dtype=np.int32).view(np.float32).astype(np.float64)
    block, ends = maps.blocks[launch.block], maps.ends[launch.block]
    matrix, skip = maps.units[launch.block][launch.unit], maps.skips[launch.block]
    projects = bool(block.ends) and block.projection is not None
    inside = launch.unit > 0 or launch.ending
    if not back:
        inside = not launch.ending and (bool(block.ends) or launch.unit < len(block.convolutions) - 1)
        if projects and launch.skip and not launch.ending:
            matrix = skip
        if launch.ending:
            matrix, skip = ends[0], ends[1] if projects else skip
    elif launch.ending:
        matrix = ends[0] if launch.residual else ends[1]
    if inside:
        assert launch.residual != launch.skip and (a, c) == ((0, 1) if launch.residual else (1, 0))
        return matrix @ read(source), matrix @ read(source)
    assert (c != 0, a != 0) == (launch.residual, launch.skip)
    residual = c * (matrix @ read(source)) if launch.residual else np.zeros(SIZE)
    skipped = a * (skip @ read(entered)) if launch.skip else np.zeros(SIZE)
    return residual + skipped, residual + skipped if block.projection is not None else residual
