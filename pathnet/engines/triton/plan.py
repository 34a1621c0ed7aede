"""Which gradients (or activations) go through which kernel: routings compacted into rows, before anything runs.

What is walked is a *state*: the gradient at a block's output, or inside a module, with what tells two of them apart.
Routings that agree so far share a state, so equal tails (going forward, equal heads) are walked once. A block that a
routing passes through an identity skip launches nothing for it; its coefficient waits as a number. A row is one state
made from another by one unit, or by a block's skip; a launch is the rows of one unit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pathnet.engines.triton.network import FusedBlock

__all__ = ["Launch", "Plan", "plan_backward", "plan_forward"]

NOTHING = -1

Row = tuple[int, int, int, float, float]
"""Source, target and the block's own state, and the coefficients a and c."""

_Key = tuple[int, float, float]
"""Who goes through a block together: their state, and a and c."""

Coefficients = Sequence[Sequence[tuple[float, float]]]
"""Of each routing and block: a and c."""


@dataclass(frozen=True)
class Launch:
    """The rows of one unit that go through its kernel together.

    Attributes:
        block: among the network's.
        unit: among the block's, in the order of the forward pass.
        residual, skip: which branches of the block end in this launch; a unit inside a module has the residual alone.
        ending: it is of the BNs behind the block's last convolution and its projection, whose statistics are the
            batch's. The projection before them is a launch of its own going forward, with the skip alone.
        first, count: of its rows, the filling of tiles included.
        index: its place among the plan's launches.
    """

    block: int
    unit: int
    residual: bool
    skip: bool
    ending: bool = False
    first: int = 0
    count: int = 0
    index: int = 0


@dataclass
class Plan:
    """What a walk runs, in order.

    Attributes:
        rows: of all launches; `NOTHING` in place of states where a tile is filled up.
        slots, waiting: of each state, where it lies, and the unit whose BN's means are not taken off yet.
        slot_count: how many slots are needed.
        finals: each routing's last state, `NOTHING` where its result is zero.
        mantissas, exponents: of each routing, what its result is to be multiplied by.
    """

    launches: list[Launch] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    slot_count: int = 0
    finals: list[int] = field(default_factory=list)
    mantissas: list[float] = field(default_factory=list)
    exponents: list[int] = field(default_factory=list)

    def row_table(self) -> NDArray[np.int32]:
        """int32 [rows, 5], coefficients as the bits of float32."""
        table = np.empty((len(self.rows), 5), dtype=np.int32)
        if self.rows:
            columns = list(zip(*self.rows, strict=True))
            table[:, :3] = np.array(columns[:3], dtype=np.int32).T
            table[:, 3:] = np.array(columns[3:], dtype=np.float32).T.copy().view(np.int32)
        return table

    def launch_table(self) -> NDArray[np.int32]:
        """int32 [launches, 2]: first row and number of rows."""
        table = [(launch.first, launch.count) for launch in self.launches]
        return np.array(table, dtype=np.int32).reshape(-1, 2)

    def state_table(self) -> NDArray[np.int32]:
        """int32 [states, 2]: slot and waiting unit."""
        return np.array([self.slots, self.waiting], dtype=np.int32).T.copy()


def plan_backward(
    blocks: Sequence[FusedBlock],
    coefficients: Coefficients,
    batch_mode: bool,
    paths: Callable[[int, int], int],
    starts: Sequence[int] | None = None,
) -> Plan:
    """From the last block to the first.

    Args:
        starts: which gradient each routing starts from; by default all from one. They are the first states.
        batch_mode: whether BN's means wait; rows whose block's gradient waits for different ones never share a tile.
        paths: how many rows a tile of a block's unit holds.
    """
    return _Planner(blocks, coefficients, batch_mode, paths, starts or [0] * len(coefficients)).backward()


def plan_forward(blocks: Sequence[FusedBlock], coefficients: Coefficients) -> Plan:
    """From the first block to the last."""
    return _Planner(blocks, coefficients, False, lambda block, unit: 1, [0] * len(coefficients)).forward()


class _Planner:
    def __init__(
        self,
        blocks: Sequence[FusedBlock],
        coefficients: Coefficients,
        batch_mode: bool,
        paths: Callable[[int, int], int],
        starts: Sequence[int],
    ) -> None:
        self.blocks, self.coefficients, self.batch_mode, self.paths = blocks, coefficients, batch_mode, paths
        count = len(coefficients)
        # [n, 2, P]
        self.columns = np.array(coefficients, dtype=np.float64).reshape(count, len(blocks), 2).transpose(1, 2, 0)
        self.plan = Plan(mantissas=[1.0] * count, exponents=[0] * count)
        self.free: list[int] = []
        first = [self._state(NOTHING) for _ in range(max(starts, default=0) + 1)]
        self.current = [first[start] for start in starts]

    def backward(self) -> Plan:
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            self._pass(index, list(reversed(range(len(block.convolutions)))), self._backward_wishes(index), back=True)
        return self._finished()

    def forward(self) -> Plan:
        for index, block in enumerate(self.blocks):
            self._pass(index, list(range(len(block.convolutions))), self._forward_wishes(index), back=False)
        return self._finished()

    def _entering(self, index: int) -> list[int]:
        """The routings that do not pass a block by its identity as they are."""
        a, c = self.columns[index]
        if not self.blocks[index].identity:
            return list(range(len(a)))
        return np.flatnonzero((c != 0) | (a != 1)).tolist()

    def _backward_wishes(self, index: int) -> list[tuple[int, float, float]]:
        """Who enters a block, with which coefficients: of size one, their power of two set aside.

        All is linear: where a block is passed by an identity, its coefficient is multiplied into what comes next.
        """
        wishes, identity, plan = [], self.blocks[index].identity, self.plan
        for routing in self._entering(index):
            if self.current[routing] == NOTHING:
                continue
            a, c = self.coefficients[routing][index]
            size, exponent = math.frexp(max(abs(a), abs(c)))
            if size == 0:
                self.current[routing] = NOTHING
            elif identity and c == 0:
                mantissa, more = math.frexp(plan.mantissas[routing] * a)
                plan.mantissas[routing] = mantissa
                plan.exponents[routing] += more
            else:
                plan.exponents[routing] += exponent
                wishes.append((routing, math.ldexp(a, -exponent), math.ldexp(c, -exponent)))
        return wishes

    def _forward_wishes(self, index: int) -> list[tuple[int, float, float]]:
        return [(routing, *self.coefficients[routing][index]) for routing in self._entering(index)]

    def _pass(self, index: int, units: list[int], wishes: list[tuple[int, float, float]], back: bool) -> None:
        """One block, its units in the order they are run in, for the routings that enter it."""
        block, plan = self.blocks[index], self.plan
        made: dict[_Key, int] = {}
        order: dict[_Key, list[int]] = defaultdict(list)
        for routing, a, c in wishes:
            order[self.current[routing], a, c].append(routing)
        entering = sorted(order, key=lambda own: plan.waiting[own[0]])
        # What the next launch of either branch reads.
        residuals = {key: key[0] for key in entering if key[2] != 0}
        skips = {key: key[0] for key in entering if key[1] != 0}
        within: list[int] = []
        last = units[-1]
        if block.ends and back:
            residuals = self._inside(Launch(index, units[0], True, False, True), residuals, block.ends[0], within)
        if block.ends and block.projection is not None:
            waiting = block.ends[1] if back else NOTHING
            skips = self._inside(Launch(index, 0, False, True, back), skips, waiting, within)
        for unit in units if block.ends and not back else units[:-1]:
            residuals = self._inside(Launch(index, unit, True, False), residuals, block.first + unit, within)
        kinds: dict[tuple[bool, bool], list[Row]] = defaultdict(list)
        for key in entering:
            state, a, c = key
            residual, skip = c != 0, a != 0
            waits = not block.activated and (residual or block.projection is not None)
            made[key] = self._state(block.first if waits else NOTHING)
            kinds[residual, skip].append((residuals.get(key, NOTHING), made[key], skips.get(key, state), a, c))
        for (residual, skip), rows in kinds.items():
            launch = Launch(index, last, residual, skip, bool(block.ends) and not back)
            self._launch(launch, rows, grouped=skip or len(units) == 1)
        left = {state for state, _, _ in entering}
        for key, routings in order.items():
            for routing in routings:
                self.current[routing] = made[key]
        self._release(within)
        self._release(left - set(self.current))

    def _inside(self, launch: Launch, sources: dict[_Key, int], waiting: int, within: list[int]) -> dict[_Key, int]:
        """One launch of one branch; adds the states that it makes to those ``within`` the block."""
        made = {key: self._state(waiting) for key in sources}
        within += made.values()
        a, c = (0.0, 1.0) if launch.residual else (1.0, 0.0)
        rows = [(source, made[key], key[0], a, c) for key, source in sources.items()]
        self._launch(launch, rows, grouped=all(source == key[0] for key, source in sources.items()))
        return made

    def _state(self, unit: int) -> int:
        plan = self.plan
        if not self.free:
            self.free.append(plan.slot_count)
            plan.slot_count += 1
        plan.slots.append(self.free.pop())
        plan.waiting.append(unit if self.batch_mode else NOTHING)
        return len(plan.slots) - 1

    def _release(self, states: Sequence[int] | set[int]) -> None:
        self.free.extend(sorted(self.plan.slots[state] for state in states))

    def _launch(self, launch: Launch, rows: list[Row], grouped: bool) -> None:
        """Adds rows, filled up to whole tiles.

        Args:
            grouped: rows read blocks' gradients, and only those that wait for the same means may share a tile; inside
                a module all do.
        """
        if not rows:
            return
        plan, paths = self.plan, 1 if launch.ending else self.paths(launch.block, launch.unit)
        first = len(plan.rows)
        for _, group in groupby(rows, key=lambda row: plan.waiting[row[2]] if grouped else NOTHING):
            plan.rows += group
            plan.rows += [_FILLING] * (-(len(plan.rows) - first) % paths)
        plan.launches.append(replace(launch, first=first, count=len(plan.rows) - first, index=len(plan.launches)))

    def _finished(self) -> Plan:
        self.plan.finals = self.current
        return self.plan


_FILLING: Row = (NOTHING, NOTHING, NOTHING, 0.0, 0.0)
