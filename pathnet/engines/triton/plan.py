"""Which gradients (or activations) go through which kernel: routings compacted into rows, before anything runs.

What is walked is a *state*: the gradient at a block's output, or inside a module. Routings that agree so far share a
state, so equal tails (going forward, equal heads) are walked once. A block that a routing passes through an identity
skip launches nothing for it; its coefficient waits as a number. A row is one state made from another by one unit, or
by a block's skip; a launch takes the rows of one unit.

A `Schedule`, the list of launches with room for so many rows each, depends on the network and on how many routings
there are at most; a `Plan` is the numbers that the kernels read on the device: rows, states, and each launch's share
of the rows. So a device that records launches records them once, and a batch is a copy of numbers.

Routings are sorted by what they do at one block after the other, those that pass a block first. The routings of a
state then lie side by side, and the first of them leads: it names the state. A group that splits leaves its state to
the routings that pass, who lead as before; every other part has a leader of its own. Hence a state at a block's
output lies in one of two slots that belong to its leader, in turn, and no list of free slots is needed. That takes
two slots a routing, beside one for each state inside a module, whereas the fewest that would do are one for each
state alive: 193 in place of 134 for 55 paths, one of each length, through ResNet-110.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathnet.engines.triton.network import FusedBlock

__all__ = [
    "ALL_EXITS",
    "USUAL_BACKWARD",
    "USUAL_FORWARD",
    "Exit",
    "Launch",
    "Plan",
    "Schedule",
    "Steps",
    "plan_backward",
    "plan_forward",
    "steps_backward",
    "steps_forward",
]

NOTHING = -1
ENTERED = -2
"""In place of a launch's source: the state in which a routing comes to the block."""

Integers = NDArray[np.int32]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Exit(NamedTuple):
    """A kind of launch that ends a block: which branches end in it, and whether the block's skip is an identity."""

    residual: bool
    skip: bool
    identity: bool


USUAL_BACKWARD = frozenset({Exit(True, False, True), Exit(True, False, False), Exit(False, True, False)})
"""What paths need: a block's module, or its skip."""

USUAL_FORWARD = frozenset({Exit(True, True, True), Exit(True, True, False), Exit(False, True, False)})
"""What deleted blocks need: both branches, or the skip."""

_EXITS = [Exit(*(bool(code >> bit & 1) for bit in range(3))) for code in range(8)]
ALL_EXITS = frozenset(_EXITS)

_RESIDUAL, _SKIP, _FIRST_EXIT = 0, 1, 2
"""Who takes part in a launch: all with the residual branch, all with the skip, or those of one of four exits."""


@dataclass(frozen=True)
class Launch:
    """The rows of one unit that go through its kernel together.

    Attributes:
        block: its index in the network.
        unit: its index in the block, in the order of the forward pass.
        residual, skip: which branches of the block end in this launch; a unit inside a module has the residual alone.
        ending: whether it is that of the BNs behind the block's last convolution and its projection, whose statistics
            are the batch's. The projection before them is a launch of its own going forward, with the skip alone.
        index: its row in the table of launches.
        count: how many rows it has room for, the filling of tiles included.
    """

    block: int
    unit: int
    residual: bool
    skip: bool
    ending: bool = False
    index: int = 0
    count: int = 0


@dataclass(frozen=True)
class Steps:
    """What every routing does at every block, in the order of the walk.

    Attributes:
        a, c: float64 [n, P], coefficients of skip and residual module; going back of size one.
        passes: bool [n, P], whether a routing passes the block as it is, through an identity.
        enters: bool [n, P], whether it is taken through the block. Neither where nothing is left of it.
        keys: float64 [P, n, 2], the same as numbers that two routings have in common where they do the same; zeros,
            the least of all bytes, where they pass.
        mantissas, exponents: float64 and int64 [P], what results are to be multiplied by.
        exits: the kinds of launches that are needed.
    """

    a: Floats
    c: Floats
    passes: Flags
    enters: Flags
    keys: Floats
    mantissas: Floats
    exponents: NDArray[np.int64]
    exits: frozenset[Exit]

    @property
    def count(self) -> int:
        """Number of routings."""
        return len(self.exponents)


def steps_backward(blocks: Sequence[FusedBlock], coefficients: Floats) -> Steps:
    """Return the steps from the last block to the first.

    All is linear: where a block is passed by an identity, its coefficient is multiplied into what comes next, and
    coefficients of other blocks have their power of two set aside.

    Args:
        coefficients: [P, n, 2], the (a, c) of every block.
    """
    a, c = (np.ascontiguousarray(coefficients[:, ::-1, branch].T) for branch in range(2))
    size, exponents = np.frexp(np.maximum(np.abs(a), np.abs(c)))
    zero = size == 0
    a, c = np.ldexp(a, -exponents), np.ldexp(c, -exponents)
    passes = _identities(blocks)[::-1, None] & (c == 0) & ~zero
    enters = ~(passes | np.logical_or.accumulate(zero, 0))
    mantissas, total = np.ones(a.shape[1]), exponents.sum(0, dtype=np.int64)
    factors = np.where(passes, a, 1.0)
    # In parts, since a thousand numbers of 1/2 and more stay in range.
    for first in range(0, len(factors), 512):
        mantissas, more = np.frexp(mantissas * np.multiply.reduce(factors[first : first + 512], 0))
        # From 1 to 2, so that nothing is left to multiply by where nothing was passed.
        mantissas, total = 2 * mantissas, total + more - 1
    return _steps(blocks[::-1], a, c, passes, enters, zero, mantissas, total)


def steps_forward(blocks: Sequence[FusedBlock], coefficients: Floats) -> Steps:
    """Return the steps from the first block to the last, coefficients as they are."""
    a, c = (np.ascontiguousarray(coefficients[:, :, branch].T) for branch in range(2))
    passes = _identities(blocks)[:, None] & (c == 0) & (a == 1)
    count = a.shape[1]
    return _steps(blocks, a, c, passes, ~passes, (a == 0) & (c == 0), np.ones(count), np.zeros(count, dtype=np.int64))


def _identities(blocks: Sequence[FusedBlock]) -> Flags:
    return np.array([block.identity for block in blocks], dtype=bool)


def _steps(
    blocks: Sequence[FusedBlock],
    a: Floats,
    c: Floats,
    passes: Flags,
    enters: Flags,
    zero: Flags,
    mantissas: Floats,
    exponents: NDArray[np.int64],
) -> Steps:
    # What makes a zero without its sign of one with it.
    a, c = a + 0.0, c + 0.0
    keys = np.stack([a, c], -1)
    keys[passes] = 0.0
    keys[zero] = np.inf
    codes = (c != 0) + 2 * (a != 0) + 4 * _identities(blocks)[:, None]
    seen = np.flatnonzero(np.bincount(codes[enters], minlength=8))
    exits = frozenset(_EXITS[code] for code in seen.tolist())
    return Steps(a, c, passes, enters, np.ascontiguousarray(keys.transpose(1, 0, 2)), mantissas, exponents, exits)


@dataclass(frozen=True)
class _Rows:
    """How the rows of a launch follow from the routings that take part in it; leader r has state ``first + r``.

    Attributes:
        takes: who takes part: `_RESIDUAL`, `_SKIP`, or `_FIRST_EXIT` and the exit's code.
        step: which block of the walk.
        source, entered, target: the first of the states that are read, that the skip reads, that are made; `ENTERED`
            for the states in which routings come to the block, `NOTHING` for none.
        tile: how many rows a tile holds.
    """

    takes: int
    step: int
    source: int
    entered: int
    target: int
    tile: int = 1

    @property
    def grouped(self) -> bool:
        """Whether what is read may wait for different means; behind a block's entrance all wait for the same."""
        skips = self.takes >= _FIRST_EXIT and bool(self.takes - _FIRST_EXIT & 2)
        return self.source == ENTERED or (skips and self.entered == ENTERED)


class Schedule:
    """What a walk launches, in order, for up to ``capacity`` routings.

    Args:
        back: whether it goes from the last block to the first.
        exits: the kinds of launches that end blocks.
        starts: how many states the routings may start from; they are the first states.
        batch_mode: whether BN's means wait; rows whose block's gradient waits for different ones never share a tile.
        paths: how many rows a tile of a block's unit holds.

    Attributes:
        launches: with room for as many rows as there can be.
        state_count, slot_count: how many states there are, and slots that hold one each.
    """

    def __init__(
        self,
        blocks: Sequence[FusedBlock],
        back: bool,
        capacity: int,
        exits: frozenset[Exit],
        starts: int = 1,
        batch_mode: bool = False,
        paths: Callable[[int, int], int] | None = None,
    ) -> None:
        self.blocks, self.capacity, self.starts = blocks, capacity, starts
        self.exits, self.batch_mode, self._paths = exits, batch_mode, paths
        self.launches: list[Launch] = []
        self._turns = min(2, len(blocks))
        self._rows: list[_Rows] = []
        self._slots, self._waiting = [np.arange(starts)], [np.full(starts, NOTHING)]
        self._leaves, self._within, self._most_within, self._groups = list[int](), 0, 0, 1
        for step, index in enumerate(reversed(range(len(blocks))) if back else range(len(blocks))):
            self._within = 0
            (self._add_backward if back else self._add_forward)(step, index, blocks[index])
            self._most_within = max(self._most_within, self._within)
            # Of states that wait: those that the blocks since the last one which all enter have left, and that one's.
            self._groups = 1 + (self._groups if blocks[index].identity else 1)
        self._states = np.stack([np.concatenate(self._slots), np.concatenate(self._waiting)], 1).astype(np.int32)
        self.state_count, self.slot_count = len(self._states), starts + capacity * (self._turns + self._most_within)
        walked = blocks[::-1] if back else blocks
        waits = [batch_mode and not block.activated for block in walked]
        self._first_units = np.array([block.first for block in walked])
        self._residual_waits = np.array(waits, dtype=bool)
        self._skip_waits = self._residual_waits & [block.projection is not None for block in walked]
        self._exit_states = np.array(self._leaves)[:, None]
        fields = ("takes", "step", "source", "entered", "target", "tile", "grouped")
        self._takes, self._step, self._source, self._entered, self._target, self._tile, self._grouped = (
            np.array([getattr(rows, field) for rows in self._rows], dtype=np.int64) for field in fields
        )

    def _add_backward(self, step: int, index: int, block: FusedBlock) -> None:
        *units, last = reversed(range(len(block.convolutions)))
        source, entered = ENTERED, ENTERED
        if block.ends:
            behind = Launch(index, [*units, last][0], True, False, True)
            source = self._add_inside(behind, step, ENTERED, block.ends[0])
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
        """Add a launch of one branch; return the first of the states that it makes, which end with the block."""
        target = self._add_states(self.starts + self.capacity * (self._turns + self._within), waiting)
        self._within += 1
        self._add(launch, _Rows(_RESIDUAL if launch.residual else _SKIP, step, source, source, target))
        return target

    def _add_exits(self, launch: Launch, step: int, source: int, entered: int) -> None:
        # Which slot it is, and what is waited for, hangs on the routing.
        target = self._add_states(0, NOTHING)
        self._leaves.append(target)
        for code, (residual, skip, identity) in enumerate(_EXITS):
            if _EXITS[code] in self.exits and identity == self.blocks[launch.block].identity:
                reads = source if residual else NOTHING, entered if skip else ENTERED
                rows = _Rows(_FIRST_EXIT + code % 4, step, *reads, target)
                self._add(replace(launch, residual=residual, skip=skip), rows)

    def _add_states(self, slot: int, waiting: int) -> int:
        first = sum(map(len, self._slots))
        self._slots.append(slot + np.arange(self.capacity))
        self._waiting.append(np.full(self.capacity, waiting if self.batch_mode else NOTHING))
        return first

    def _add(self, launch: Launch, rows: _Rows) -> None:
        if self._paths is not None and not launch.ending:
            rows = replace(rows, tile=self._paths(launch.block, launch.unit))
        groups = min(self.capacity, self._groups) if self.batch_mode and rows.grouped else 1
        count = (self.capacity + groups * (rows.tile - 1)) // rows.tile * rows.tile
        self._rows.append(rows)
        self.launches.append(replace(launch, index=len(self.launches), count=count))

    @property
    def row_count(self) -> int:
        """Number of rows, at most."""
        return sum(launch.count for launch in self.launches)

    def plan(self, steps: Steps, starts: Sequence[int] | None = None) -> Plan:
        """Return the rows of at most ``capacity`` routings.

        Args:
            starts: which state each routing starts from; by default all from the first.
        """
        count = steps.count
        order, leaders = _sorted(steps.keys, starts)
        a, c, enters = steps.a[:, order], steps.c[:, order], steps.enters[:, order]
        blocks = np.arange(len(a))[:, None]
        residual, skip = c != 0, a != 0

        # In which state a routing is, before each block and at the end: that which it left its last block in.
        left = np.zeros((len(a) + 1, count), dtype=np.int64)
        left[0] = 0 if starts is None else np.asarray(starts)[order]
        np.add(self._exit_states, leaders[1:], out=left[1:])
        waits = np.full(left.shape, NOTHING)
        waiting = (residual & self._residual_waits[:, None]) | self._skip_waits[:, None]
        waits[1:] = np.where(waiting, self._first_units[:, None], NOTHING)
        last = np.zeros(left.shape, dtype=np.int64)
        np.maximum.accumulate(np.where(enters, blocks + 1, 0), 0, out=last[1:])
        current = np.take_along_axis(left, last, 0)

        leading = enters & (leaders[1:] == np.arange(count))
        exits = 1 * residual + 2 * skip
        taking = np.stack([leading & residual, leading & skip, *(leading & (exits == code) for code in range(4))])
        launch, routing = np.nonzero(taking[self._takes, self._step])
        step = self._step[launch]
        group = launch
        if self._grouped.any() and self.batch_mode:
            before = np.take_along_axis(waits, last, 0)[step, routing]
            group = launch * (waits.max(initial=0) + 2) + np.where(self._grouped[launch], before + 1, 0)
            by_group = np.argsort(group, kind="stable")
            launch, routing, step, group = launch[by_group], routing[by_group], step[by_group], group[by_group]
        places, launches = self._places(launch, group)

        rows = np.empty((int(launches[:, 1].sum()), 5), dtype=np.int32)
        rows[:] = _FILLING
        within = self._takes[launch] < _FIRST_EXIT
        inside = self._takes[launch] == _RESIDUAL
        entered = current[step, routing]
        rows[places, 0] = _states(self._source[launch], entered, routing)
        rows[places, 1] = self._target[launch] + routing
        rows[places, 2] = np.where(within, entered, _states(self._entered[launch], entered, routing))
        rows[places, 3] = np.where(within, ~inside, a[step, routing]).astype(np.float32).view(np.int32)
        rows[places, 4] = np.where(within, inside, c[step, routing]).astype(np.float32).view(np.int32)

        states = self._states.copy()
        left_in = self._exit_states + np.arange(count)
        turn = np.cumsum(enters, 0) % self._turns
        states[left_in, 0] = self.starts + self._turns * np.arange(count) + turn
        states[left_in, 1] = waits[1:]

        finals = np.empty(count, dtype=np.int32)
        # What neither passes nor enters a block has come to nothing before.
        gone = ~(steps.passes | steps.enters).all(0)
        finals[order] = current[-1]
        finals[gone] = NOTHING
        exponents = steps.exponents.clip(-(1 << 30), 1 << 30).astype(np.int32)
        return Plan(self, launches, rows, states, finals, steps.mantissas, exponents)

    def _places(self, launch: NDArray[np.int64], group: NDArray[np.int64]) -> tuple[NDArray[np.int64], Integers]:
        """Return where rows lie, each group filled up to whole tiles, and of each launch its first row and how many.

        Args:
            launch, group: of each row, in ascending order.
        """
        first = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(first, append=len(group))
        tile = self._tile[launch[first]]
        filled = -(-sizes // tile) * tile
        shift = np.cumsum(filled) - filled - first
        places = np.arange(len(group)) + np.repeat(shift, sizes)
        counts = np.bincount(launch[first], filled, len(self.launches)).astype(np.int32)
        return places, np.stack([np.cumsum(counts, dtype=np.int32) - counts, counts], 1)


def _sorted(keys: Floats, starts: Sequence[int] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of the routings, and int64 [n + 1, P]: who leads each of them, as a place in that order,
    before the first block and behind every block."""
    count, blocks = keys.shape[:2]
    whole = np.zeros((count, blocks + 1, 2))
    whole[:, 1:] = keys
    if starts is not None:
        whole[:, 0, 0] = starts
    # As bytes, of which numpy compares whole rows at once.
    as_bytes = whole.reshape(count, 2 * (blocks + 1)).view(np.dtype((np.void, 16 * (blocks + 1))))
    order = np.argsort(as_bytes[:, 0], kind="stable")
    whole = whole[order]
    parts = np.ones((count, blocks + 1), dtype=bool)
    np.logical_or.accumulate((whole[1:] != whole[:-1]).any(2), 1, out=parts[1:])
    leaders = np.maximum.accumulate(np.where(parts, np.arange(count)[:, None], 0), 0)
    return order, np.ascontiguousarray(leaders.T)


def _states(first: NDArray[np.int64], entered: NDArray[np.int64], routing: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(first == ENTERED, entered, np.where(first == NOTHING, NOTHING, first + routing))


@dataclass(frozen=True)
class Plan:
    """What the kernels read of a walk.

    Attributes:
        launches: int32 [launches, 2], of each launch its first row and how many it has.
        rows: int32 [rows, 5], coefficients as the bits of float32; `NOTHING` in place of states where a tile is
            filled up.
        states: int32 [states, 2]: slot, and the unit whose BN's means are not taken off yet.
        finals: int32 [P], each routing's last state, `NOTHING` where its result is zero.
        mantissas, exponents: float64 and int32 [P], what results are to be multiplied by.
    """

    schedule: Schedule
    launches: Integers
    rows: Integers
    states: Integers
    finals: Integers
    mantissas: Floats
    exponents: Integers

    def needed(self) -> list[Launch]:
        """Return the launches that have rows, with no more room than for those."""
        counts = self.launches[:, 1].tolist()
        return [
            replace(launch, count=count)
            for launch, count in zip(self.schedule.launches, counts, strict=True)
            if count
        ]

    def rows_of(self, launch: Launch) -> Integers:
        first, count = self.launches[launch.index]
        return self.rows[first : first + count]


def plan_backward(
    blocks: Sequence[FusedBlock],
    coefficients: Floats,
    batch_mode: bool,
    paths: Callable[[int, int], int],
    starts: Sequence[int] | None = None,
) -> Plan:
    """Plan a walk from the last block to the first, with room for these routings alone; see `Schedule`."""
    steps = steps_backward(blocks, coefficients)
    count = 1 if starts is None else max(starts, default=0) + 1
    schedule = Schedule(blocks, True, len(coefficients), steps.exits, count, batch_mode, paths)
    return schedule.plan(steps, starts)


def plan_forward(blocks: Sequence[FusedBlock], coefficients: Floats) -> Plan:
    """Plan a walk from the first block to the last, with room for these routings alone."""
    steps = steps_forward(blocks, coefficients)
    return Schedule(blocks, False, len(coefficients), steps.exits).plan(steps)


_FILLING = (NOTHING, NOTHING, NOTHING, 0, 0)
