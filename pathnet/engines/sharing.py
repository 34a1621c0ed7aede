"""Passes that begin alike share their beginning: the order in which engines without kernels walk many routings.

The passes form a tree: those with equal steps so far share a state. The tree is walked depth first, at most ``width``
states at a time, so memory does not grow with the number of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

__all__ = ["walk_together"]

State = TypeVar("State")
Step = TypeVar("Step", bound=Hashable)


def walk_together(
    start: State,
    passes: Sequence[Sequence[Step | None]],
    apply: Callable[[int, Sequence[State], Sequence[Step]], Sequence[State]],
    finish: Callable[[Sequence[int], State], None],
    width: Callable[[], int] = lambda: 1,
) -> None:
    """Take all passes from ``start`` to their ends.

    At most about ``width * log2(P)`` states of P passes are alive at once: of the states after a step, those that
    most passes share come last, and none is kept for them.

    Args:
        passes: each pass's steps in the order of the walk, all of one length; None for a step that changes nothing.
        apply: takes the number of the step, at most ``width`` states, and the step of each of them; returns the next
            states. A state may come several times, each time with another step.
        finish: takes the numbers of the passes that end in a state, and the state.
        width: function that returns the maximum number of states that ``apply`` gets at once; it may grow on the way.
    """
    length = len(passes[0]) if passes else 0

    def advance(
        position: int, children: Sequence[tuple[State, Step | None, list[int]]]
    ) -> list[tuple[State, list[int]]]:
        moving = [(state, step) for state, step, _ in children if step is not None]
        after = iter(apply(position, [state for state, _ in moving], [step for _, step in moving]) if moving else ())
        return [(state if step is None else next(after), members) for state, step, members in children]

    def walk(position: int, group: list[tuple[State, list[int]]]) -> None:
        while position < length:
            children: list[tuple[State, Step | None, list[int]]] = []
            for state, members in group:
                by_step: dict[Step | None, list[int]] = {}
                for number in members:
                    by_step.setdefault(passes[number][position], []).append(number)
                children += [(state, step, numbers) for step, numbers in by_step.items()]
            # The last `width` children hold at least half of the passes, and their parents are not kept.
            children.sort(key=lambda child: len(child[2]))
            group.clear()
            while len(children) > (most := width()):
                first = (len(children) - 1) % most + 1
                part, children = children[:first], children[first:]
                walk(position + 1, advance(position, part))
                del part
            group = advance(position, children)
            position += 1
            del children
        for state, members in group:
            finish(members, state)

    if passes:
        walk(0, [(start, list(range(len(passes))))])
