"""Routed forward passes: those that begin alike share their beginning, and several fold into one batch where that is
faster and samples are independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pathnet import chunks
from pathnet.engines.autograd.agreement import AGREEMENT, agree
from pathnet.engines.autograd.capture import CAPTURING
from pathnet.engines.autograd.timing import fastest
from pathnet.engines.fallback import Row, through_block
from pathnet.engines.sharing import walk_together
from pathnet.models.context import Context
from pathnet.models.residual_net import Block

__all__ = ["FoldedBlock", "routed_forward"]

WIDTHS = (2, 4, 8)
"""Numbers of states that are tried in one batch."""

TRIALS = 2

VISITS = 640
"""States that pass a block before the measurement, which costs as much as about 10 % of them."""


class FoldedBlock:
    """A block, and what is known of it for batches of several states.

    Attributes:
        block: not bound to a context yet.
        choices: number of states in one batch, by the states' layout, once it was measured.
        visits: number of states that have passed before that, by their layout.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.choices: dict[object, int] = {}
        self.visits: dict[object, int] = {}

    def width(self, y: Tensor, row: Row, context: Context, count: int, most: int) -> int:
        """Return how many states run as one batch; 1 until so many have run that its measurement costs little.

        Args:
            y: one of the states that are about to run.
            count: their number.
            most: maximum number that memory has room for at once.
        """
        key = y.shape, y.stride(), y.dtype, y.device
        width = self.choices.get(key, 0)
        if width == 0:
            visits = self.visits.get(key, 0)
            self.visits[key] = visits + count
            if visits < VISITS:
                return 1
            with CAPTURING:
                if key not in self.choices:
                    self.choices[key] = measured_width(self.block, y, row, context, most)
            width = self.choices[key]
        return min(width, most)


def measured_width(block: Block, y: Tensor, row: Row, context: Context, most: int) -> int:
    """Return the number of states at which one takes the least time.

    It is 1 where the block's operators depend on values, as control flow does, and where its outputs for states in
    one batch are not those one by one: its samples are not independent.
    """
    widths = [width for width in WIDTHS if width <= most]
    if not widths or y.dtype not in AGREEMENT:
        return 1
    # States that differ, since repeated samples can hide that a block mixes them.
    states = [y * (1 - number / 16) for number in range(widths[-1])]

    def at_once(width: int) -> list[Tensor]:
        return _folded(block.bound(context.repeated(width)), states[:width], row)

    alone = block.bound(context)
    try:
        with _Values():  # type: ignore[no-untyped-call]
            results = at_once(widths[-1])
        for state, result in zip(states, results, strict=True):
            if not agree(result, through_block(alone, state.clone(), row), y.dtype):
                return 1
        candidates: list[Callable[[], object]] = [lambda: through_block(alone, states[0].clone(), row)]
        candidates += [partial(at_once, width) for width in widths]
        return (1, *widths)[fastest(candidates, y.device, (1, *widths), TRIALS)]
    except Exception:  # Of whatever kind: a user's block may raise any for a batch of another size.
        return 1


class _DependsOnValuesError(Exception):
    """A block whose operators depend on the values of its input."""


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refusal of operators whose results' shapes, or control flow, depend on values."""

    TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Skipping would import torch._dynamo, which takes a second; nothing here is compiled.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.TAGS.isdisjoint(function.tags):
            raise _DependsOnValuesError
        return function(*args, **(kwargs or {}))


def _folded(block: Block, states: Sequence[Tensor], row: Row) -> list[Tensor]:
    """Run a block, bound to the repeated context, for several states [B, ...] in one batch."""
    y = through_block(block, torch.cat(list(states)), row)
    return list(y.chunk(len(states)))


@torch.no_grad()
def routed_forward(
    blocks: Sequence[FoldedBlock], context: Context, y0: Tensor, routing: Tensor, folds: bool
) -> Tensor:
    """Return [P, B, *y_n.shape[1:]] under at least one routing [P, n, 2 or more].

    Args:
        folds: whether samples are independent, so that a batch may hold several states.
    """
    most = max(1, chunks.CHUNK_BYTES // max(1, y0.nbytes)) if folds else 1
    widest = 1

    @cache
    def repeated(times: int) -> Context:
        return context.repeated(times) if times > 1 else context

    @cache
    def bound(i: int, times: int) -> Block:
        return blocks[i].block.bound(repeated(times))

    def apply(i: int, states: Sequence[Tensor], rows: Sequence[Row]) -> list[Tensor]:
        nonlocal widest, most
        width = 1
        if folds:
            # States grow where a network widens.
            most = min(most, max(1, chunks.CHUNK_BYTES // max(1, states[0].nbytes)))
            width = blocks[i].width(states[0], rows[0], context, len(states), most)
            widest = max(widest, width)
        by_row: dict[Row, list[int]] = {}
        for number, row in enumerate(rows):
            by_row.setdefault(row, []).append(number)
        after = list(states)
        for row, numbers in by_row.items():
            for part in _parts(numbers, width):
                if len(part) == 1:
                    after[part[0]] = through_block(bound(i, 1), states[part[0]].clone(), row)
                    continue
                results = _folded(bound(i, len(part)), [states[number] for number in part], row)
                for number, result in zip(part, results, strict=True):
                    after[number] = result
        return after

    outputs: list[Tensor] = [y0] * len(routing)

    def finish(numbers: Sequence[int], y: Tensor) -> None:
        for number in numbers:
            outputs[number] = y

    passes = [[tuple(row) for row in rows] for rows in routing.tolist()]
    walk_together(y0, passes, apply, finish, lambda: min(widest, most))
    return torch.stack(outputs)


def _parts(numbers: Sequence[int], width: int) -> list[Sequence[int]]:
    """Return the numbers in parts of powers of two up to ``width``, so that few sizes of a batch come up."""
    parts: list[Sequence[int]] = []
    begin = 0
    while begin < len(numbers):
        size = min(width, 1 << (len(numbers) - begin).bit_length() - 1)
        parts.append(numbers[begin : begin + size])
        begin += size
    return parts
