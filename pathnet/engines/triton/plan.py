"""The numbers of a pass that kernels read: routings compacted into rows, before anything runs; see `schedule`.

Routings are sorted by their steps at one block after the other, those that pass a block unchanged first. Routings
that share a state are then adjacent. The first of a group is its leader and names the state. Where a group splits,
the routings that pass the block keep state and leader; each other part gets a new leader. Example: routings 0, 1 and
2 start with one state and leader 0; at a block that 0 passes and 1 and 2 enter, 0 keeps the state, and 1 becomes the
leader of a new state for 1 and 2.

A leader alternates between two slots for its states at block outputs, so no list of free slots is needed. That takes
two slots per routing, plus one per state inside a module, whereas the minimum is one per live state: 193 instead of
134 for 55 paths, one of each length, through ResNet-110.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pathnet.engines.triton.network import FusedBlock
from pathnet.engines.triton.schedule import ENTERED, FIRST_EXIT, NOTHING, RESIDUAL, Integers, Launch, Schedule
from pathnet.engines.triton.steps import Floats, Steps, steps_backward, steps_forward

__all__ = ["LaunchPlan", "plan_backward", "plan_forward", "plan_launches"]

_FILLING = (NOTHING, NOTHING, NOTHING, 0, 0)
"""A row that pads a tile."""


@dataclass(frozen=True)
class LaunchPlan:
    """The numbers of a pass that kernels read.

    Attributes:
        launches: int32 [launches, 2], each launch's first row and number of rows.
        rows: int32 [rows, 5], see `tiles.ROW_FIELDS`; `NOTHING` in place of states where a row pads a tile.
        states: int32 [states, 2]: slot, and the unit whose BN means are not subtracted yet.
        finals: int32 [P], each routing's last state, `NOTHING` where its result is zero.
        mantissas, exponents: float64 and int32 [P], scale factors still to be applied to the results.
    """

    schedule: Schedule
    launches: Integers
    rows: Integers
    states: Integers
    finals: Integers
    mantissas: Floats
    exponents: Integers

    def needed(self) -> list[Launch]:
        """Return the launches that have rows, with memory for those rows alone."""
        counts = self.launches[:, 1].tolist()
        return [
            replace(launch, count=count)
            for launch, count in zip(self.schedule.launches, counts, strict=True)
            if count
        ]

    def rows_of(self, launch: Launch) -> Integers:
        first, count = self.launches[launch.index]
        return self.rows[first : first + count]


def plan_launches(schedule: Schedule, steps: Steps, starts: Sequence[int] | None = None) -> LaunchPlan:
    """Return the rows of at most ``schedule.capacity`` routings.

    Args:
        starts: each routing's first state; by default the first state for all.
    """
    count, rules = steps.count, schedule.rules
    order, leaders = _sorted(steps.keys, starts)
    a, c, enters = steps.a[:, order], steps.c[:, order], steps.enters[:, order]
    blocks = np.arange(len(a))[:, None]
    residual, skip = c != 0, a != 0

    # The state in which each routing arrives at each block and at the end: its exit state of the last block that it
    # entered.
    left = np.zeros((len(a) + 1, count), dtype=np.int64)
    left[0] = 0 if starts is None else np.asarray(starts)[order]
    np.add(schedule.exit_states, leaders[1:], out=left[1:])
    waits = np.full(left.shape, NOTHING)
    waiting = (residual & schedule.residual_waits[:, None]) | schedule.skip_waits[:, None]
    waits[1:] = np.where(waiting, schedule.first_units[:, None], NOTHING)
    last = np.zeros(left.shape, dtype=np.int64)
    np.maximum.accumulate(np.where(enters, blocks + 1, 0), 0, out=last[1:])
    current = np.take_along_axis(left, last, 0)

    leading = enters & (leaders[1:] == np.arange(count))
    exits = 1 * residual + 2 * skip
    members = np.stack([leading & residual, leading & skip, *(leading & (exits == code) for code in range(4))])
    launch, routing = np.nonzero(members[rules.members, rules.step])
    step = rules.step[launch]
    group = launch
    if rules.grouped.any() and schedule.batch_mode:
        before = np.take_along_axis(waits, last, 0)[step, routing]
        group = launch * (waits.max(initial=0) + 2) + np.where(rules.grouped[launch], before + 1, 0)
        by_group = np.argsort(group, kind="stable")
        launch, routing, step, group = launch[by_group], routing[by_group], step[by_group], group[by_group]
    places, launches = _places(schedule, launch, group)

    rows = np.empty((int(launches[:, 1].sum()), 5), dtype=np.int32)
    rows[:] = _FILLING
    inside = rules.members[launch] < FIRST_EXIT
    inside_residual = rules.members[launch] == RESIDUAL
    entered = current[step, routing]
    rows[places, 0] = _states(rules.source[launch], entered, routing)
    rows[places, 1] = rules.target[launch] + routing
    rows[places, 2] = np.where(inside, entered, _states(rules.entered[launch], entered, routing))
    rows[places, 3] = np.where(inside, ~inside_residual, a[step, routing]).astype(np.float32).view(np.int32)
    rows[places, 4] = np.where(inside, inside_residual, c[step, routing]).astype(np.float32).view(np.int32)

    states = schedule.states.copy()
    exit_states = schedule.exit_states + np.arange(count)
    turn = np.cumsum(enters, 0) % schedule.turns
    states[exit_states, 0] = schedule.starts + schedule.turns * np.arange(count) + turn
    states[exit_states, 1] = waits[1:]

    finals = np.empty(count, dtype=np.int32)
    # A routing that neither passes nor enters a block is zero from there on.
    zero = ~(steps.passes | steps.enters).all(0)
    finals[order] = current[-1]
    finals[zero] = NOTHING
    exponents = steps.exponents.clip(-(1 << 30), 1 << 30).astype(np.int32)
    return LaunchPlan(schedule, launches, rows, states, finals, steps.mantissas, exponents)


def _places(
    schedule: Schedule, launch: NDArray[np.int64], group: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Integers]:
    """Return the indices of rows, each group padded to whole tiles, and each launch's first row and number of rows.

    Args:
        launch, group: those of each row, in ascending order.
    """
    first = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(first, append=len(group))
    tile = schedule.rules.tile[launch[first]]
    filled = -(-sizes // tile) * tile
    shift = np.cumsum(filled) - filled - first
    places = np.arange(len(group)) + np.repeat(shift, sizes)
    counts = np.bincount(launch[first], filled, len(schedule.launches)).astype(np.int32)
    return places, np.stack([np.cumsum(counts, dtype=np.int32) - counts, counts], 1)


def _sorted(keys: Floats, starts: Sequence[int] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of the routings, and int64 [n + 1, P], the leader of each as an index in that order, before
    the first block and after every block."""
    count, blocks = keys.shape[:2]
    sort_keys = np.zeros((count, blocks + 1, 2))
    sort_keys[:, 1:] = keys
    if starts is not None:
        sort_keys[:, 0, 0] = starts
    # As bytes: NumPy then compares all keys of a routing at once.
    as_bytes = sort_keys.reshape(count, 2 * (blocks + 1)).view(np.dtype((np.void, 16 * (blocks + 1))))
    order = np.argsort(as_bytes[:, 0], kind="stable")
    sort_keys = sort_keys[order]
    splits = np.ones((count, blocks + 1), dtype=bool)
    np.logical_or.accumulate((sort_keys[1:] != sort_keys[:-1]).any(2), 1, out=splits[1:])
    leaders = np.maximum.accumulate(np.where(splits, np.arange(count)[:, None], 0), 0)
    return order, np.ascontiguousarray(leaders.T)


def _states(first: NDArray[np.int64], entered: NDArray[np.int64], routing: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(first == ENTERED, entered, np.where(first == NOTHING, NOTHING, first + routing))


def plan_backward(
    blocks: Sequence[FusedBlock],
    coefficients: Floats,
    batch_mode: bool,
    paths: Callable[[int, int], int],
    starts: Sequence[int] | None = None,
) -> LaunchPlan:
    """Plan a backward pass, with memory for these routings alone; see `Schedule`."""
    steps = steps_backward(blocks, coefficients)
    count = 1 if starts is None else max(starts, default=0) + 1
    schedule = Schedule(blocks, True, len(coefficients), steps.exits, count, batch_mode, paths)
    return plan_launches(schedule, steps, starts)


def plan_forward(blocks: Sequence[FusedBlock], coefficients: Floats) -> LaunchPlan:
    """Plan a forward pass, with memory for these routings alone."""
    steps = steps_forward(blocks, coefficients)
    return plan_launches(Schedule(blocks, False, len(coefficients), steps.exits), steps)
