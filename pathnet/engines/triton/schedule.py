"""The launches of a pass, and the states in memory that they read and write, for up to ``capacity`` routings.

A *state* is the gradient (or activation) at a block's output, or inside a residual module. Routings that agree so far
share a state, so a common tail (in a forward pass, a common head) is computed once. Where a routing passes a block
through an identity, nothing is launched; its coefficient is applied to the result. A *row* takes one state to
another, through one unit or through a block's skip; a launch processes all rows of one unit.

A schedule depends on the network and on the number of routings alone. The numbers that kernels read from device
memory (rows, states, and each launch's share of the rows) depend on the routings: see `plan`. So a graph captures the
launches once, and a batch costs a copy of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pathnet.engines.triton.network import FusedBlock
from pathnet.engines.triton.steps import EXITS, Exit

__all__ = ["ENTERED", "FIRST_EXIT", "NOTHING", "RESIDUAL", "SKIP", "Integers", "Launch", "RowRules", "Schedule"]

NOTHING = -1
"""Stands for no state, and for no unit."""

ENTERED = -2
"""Stands for the state in which a routing arrives at the block."""

RESIDUAL, SKIP, FIRST_EXIT = 0, 1, 2
"""Members of a launch: all routings with the residual module, all with the skip, or those of one of four exits."""

Integers = NDArray[np.int32]


@dataclass(frozen=True)
class Launch:
    """The rows of one unit, which go through its kernel together.

    Attributes:
        block: its index in the network.
        unit: its index in the block, in the order of the forward pass.
        residual, skip: the branches of the block that end in this launch; inside a module the residual alone.
        ending: whether it is the launch of the BNs after the block's last convolution and its projection, in BN mode
            ``batch``. In a forward pass, the projection before them is a launch with the skip alone.
        index: its row in the table of launches.
        count: maximum number of its rows, those that pad tiles included.
    """

    block: int
    unit: int
    residual: bool
    skip: bool
    ending: bool = False
    index: int = 0
    count: int = 0


@dataclass(frozen=True)
class _RowRule:
    """The rule by which a launch's rows follow from the routings.

    The row of leader r reads and writes the states ``source + r``, ``entered + r`` and ``target + r``.

    Attributes:
        members: the routings that take part: `RESIDUAL`, `SKIP`, or `FIRST_EXIT` and the exit's code.
        step: the block's index in the order of the pass.
        source, entered, target: first of the states that are read, read by the skip, and written; `ENTERED` for the
            states in which routings arrive at the block, `NOTHING` for none.
        tile: number of rows in a tile.
    """

    members: int
    step: int
    source: int
    entered: int
    target: int
    tile: int = 1

    @property
    def grouped(self) -> bool:
        """True if sources may await different means; after a block's entrance all await the same."""
        skips = self.members >= FIRST_EXIT and bool(self.members - FIRST_EXIT & 2)
        return self.source == ENTERED or (skips and self.entered == ENTERED)


class RowRules:
    """The `_RowRule` of every launch, by field, int64 [launches]."""

    def __init__(self, rules: Sequence[_RowRule]) -> None:
        def column(field: str) -> NDArray[np.int64]:
            return np.array([getattr(rule, field) for rule in rules], dtype=np.int64)

        self.members, self.step, self.tile, self.grouped = map(column, ("members", "step", "tile", "grouped"))
        self.source, self.entered, self.target = map(column, ("source", "entered", "target"))


class Schedule:
    """The launches of a pass, in order, for up to ``capacity`` routings.

    Args:
        backward: whether the pass goes from the last block to the first.
        exits: the kinds of launches that end blocks.
        starts: number of states that routings may start from; they are the first states.
        batch_mode: whether gradients await BN's means; rows whose gradients await different ones share no tile.
        paths: returns the number of rows in a tile, for a block and a unit.

    Attributes:
        launches: each with memory for the maximum number of its rows.
        states: int32 [states, 2], each state's slot and unit as in `plan.LaunchPlan`, except at blocks' outputs.
        slot_count: number of slots, which hold one state each.
        turns: number of slots that a leader's states at blocks' outputs use in turn.
        rules: how rows follow from routings.
        exit_states: int64 [n, 1], first state at each block's output, in the order of the pass.
        first_units: int64 [n], each block's first unit.
        residual_waits, skip_waits: bool [n], whether gradients from a branch await the means of that unit.
    """

    def __init__(
        self,
        blocks: Sequence[FusedBlock],
        backward: bool,
        capacity: int,
        exits: frozenset[Exit],
        starts: int = 1,
        batch_mode: bool = False,
        paths: Callable[[int, int], int] | None = None,
    ) -> None:
        self.blocks, self.capacity, self.starts = blocks, capacity, starts
        self.exits, self.batch_mode, self._paths = exits, batch_mode, paths
        self.launches: list[Launch] = []
        self.turns = min(2, len(blocks))
        self._rules: list[_RowRule] = []
        self._slots, self._waiting = [np.arange(starts)], [np.full(starts, NOTHING)]
        self._exit_states, self._inside, most_inside, self._groups = list[int](), 0, 0, 1
        for step, index in enumerate(reversed(range(len(blocks))) if backward else range(len(blocks))):
            self._inside = 0
            (self._add_backward if backward else self._add_forward)(step, index, blocks[index])
            most_inside = max(most_inside, self._inside)
            # States may await the means of this block, and of all blocks since the last one without an identity.
            self._groups = 1 + (self._groups if blocks[index].identity else 1)
        self.states = np.stack([np.concatenate(self._slots), np.concatenate(self._waiting)], 1).astype(np.int32)
        self.slot_count = starts + capacity * (self.turns + most_inside)
        self.rules = RowRules(self._rules)
        self.exit_states = np.array(self._exit_states)[:, None]
        in_order = blocks[::-1] if backward else blocks
        self.first_units = np.array([block.first for block in in_order])
        self.residual_waits = np.array([batch_mode and not block.activated for block in in_order], dtype=bool)
        self.skip_waits = self.residual_waits & [block.projection is not None for block in in_order]

    def _add_backward(self, step: int, index: int, block: FusedBlock) -> None:
        *units, last = reversed(range(len(block.convolutions)))
        source, entered = ENTERED, ENTERED
        if block.ends:
            ending = Launch(index, [*units, last][0], True, False, True)
            source = self._add_inside(ending, step, ENTERED, block.ends[0])
            if block.projection is not None:
                entered = self._add_inside(Launch(index, 0, False, True, True), step, ENTERED, block.ends[1])
        for unit in units:
            source = self._add_inside(Launch(index, unit, True, False), step, source, block.first + unit)
        self._add_exits(Launch(index, last, True, True), step, source, entered)

    def _add_forward(self, step: int, index: int, block: FusedBlock) -> None:
        *units, last = range(len(block.convolutions))
        source, entered = ENTERED, ENTERED
        if block.ends and block.projection is not None:
            entered = self._add_inside(Launch(index, 0, False, True), step, ENTERED, NOTHING)
        for unit in [*units, last] if block.ends else units:
            source = self._add_inside(Launch(index, unit, True, False), step, source, NOTHING)
        self._add_exits(Launch(index, last, True, True, bool(block.ends)), step, source, entered)

    def _add_inside(self, launch: Launch, step: int, source: int, waiting: int) -> int:
        """Add a launch of one branch; return the first of its target states, which end with the block."""
        target = self._add_states(self.starts + self.capacity * (self.turns + self._inside), waiting)
        self._inside += 1
        self._add(launch, _RowRule(RESIDUAL if launch.residual else SKIP, step, source, source, target))
        return target

    def _add_exits(self, launch: Launch, step: int, source: int, entered: int) -> None:
        # Slot and awaited unit depend on the routing, so the plan fills them in.
        target = self._add_states(0, NOTHING)
        self._exit_states.append(target)
        for code, (residual, skip, identity) in enumerate(EXITS):
            if EXITS[code] in self.exits and identity == self.blocks[launch.block].identity:
                reads = source if residual else NOTHING, entered if skip else ENTERED
                rule = _RowRule(FIRST_EXIT + code % 4, step, *reads, target)
                self._add(replace(launch, residual=residual, skip=skip), rule)

    def _add_states(self, slot: int, waiting: int) -> int:
        first = sum(map(len, self._slots))
        self._slots.append(slot + np.arange(self.capacity))
        self._waiting.append(np.full(self.capacity, waiting if self.batch_mode else NOTHING))
        return first

    def _add(self, launch: Launch, rule: _RowRule) -> None:
        if self._paths is not None and not launch.ending:
            rule = replace(rule, tile=self._paths(launch.block, launch.unit))
        groups = min(self.capacity, self._groups) if self.batch_mode and rule.grouped else 1
        count = (self.capacity + groups * (rule.tile - 1)) // rule.tile * rule.tile
        self._rules.append(rule)
        self.launches.append(replace(launch, index=len(self.launches), count=count))

    @property
    def state_count(self) -> int:
        """Number of states."""
        return len(self.states)

    @property
    def row_count(self) -> int:
        """Maximum number of rows."""
        return sum(launch.count for launch in self.launches)
