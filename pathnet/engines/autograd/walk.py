"""The record of a forward pass, and the walks over it.

Routings that agree in their last blocks share the walk through those: one vector-Jacobian product (VJP) of a module
for each distinct suffix that enters it. Identity skips cost nothing. What scales a whole routing is left out and
multiplied at its end, so (a, c) and multiples of it are one suffix.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathnet import chunks
from pathnet.engines.autograd.blocks import RecordedBlock
from pathnet.engines.autograd.pullbacks import Pullbacks
from pathnet.engines.autograd.states import (
    ScaledState,
    added,
    multiplied,
    norms_of,
    scaled_to_one,
    started,
    times,
)
from pathnet.engines.autograd.together import pulled_together
from pathnet.engines.sharing import walk_together
from pathnet.scaling import ScaledGradient

__all__ = ["AutogradWalk"]

Step = tuple[float, ...]
"""The factor of each part of a block."""


@dataclass(frozen=True)
class AutogradWalk:
    """A record that keeps each block's graph, or its saved activations, or its input alone; see `memory`."""

    blocks: Sequence[RecordedBlock]

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [tensor for block in self.blocks for tensor in block.tensors()]

    def max_routings(self) -> int | None:
        return None

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        state, x = started(start), self.blocks[0].x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mantissas = torch.zeros(len(routing), *x.shape, dtype=dtype, device=x.device)
        exponents = start.exponent.repeat(len(routing), 1)

        def finish(numbers: Sequence[int], state: ScaledState, factors: Sequence[Scalar]) -> None:
            for number, (factor, power) in zip(numbers, factors, strict=True):
                settled = scaled_to_one(state if factor == 1 else multiplied(state, factor))
                mantissas[number] = settled.mantissa
                exponents[number] = torch.tensor([exponent + power for exponent in settled.exponents])

        self._walk(state, routing, finish)
        return ScaledGradient(mantissas, exponents)

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        state, x = started(start), self.blocks[0].x
        result = torch.zeros(len(routing), len(x), dtype=torch.float64, device=x.device)

        def finish(numbers: Sequence[int], state: ScaledState, factors: Sequence[Scalar]) -> None:
            norms = norms_of(state)
            for number, (factor, power) in zip(numbers, factors, strict=True):
                result[number] = times(norms * abs(factor), [exponent + power for exponent in state.exponents])

        self._walk(state, routing, finish)
        return result

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        sums = self._sums(start, routing)
        x = self.blocks[0].x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mantissas = torch.zeros(len(sums), *x.shape, dtype=dtype, device=x.device)
        exponents = start.exponent.repeat(len(sums), 1)
        for length, state in enumerate(sums):
            if state is not None:
                settled = scaled_to_one(state)
                mantissas[length] = settled.mantissa
                exponents[length] = torch.tensor(settled.exponents)
        return ScaledGradient(mantissas, exponents)

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        sums = self._sums(start, routing)
        x = self.blocks[0].x
        result = torch.zeros(len(sums), len(x), dtype=torch.float64, device=x.device)
        for length, state in enumerate(sums):
            if state is not None:
                result[length] = times(norms_of(state), state.exponents)
        return result

    def _sums(self, start: ScaledGradient, routing: Tensor) -> list[ScaledState | None]:
        """Return the sums by length at ``y_0``; all coefficients pass through a block before the next block."""
        sums = [started(start)]
        most = self._most(start.mantissa)
        for block, row in zip(reversed(self.blocks), reversed(routing.tolist()), strict=True):
            pullbacks = block.pullbacks()
            zeros = [0.0] * len(row[1:])
            by_skip, by_residual = block.factors((row[0], *zeros)), block.factors((0.0, *row[1:]))
            after: list[ScaledState | None] = [None] * (len(sums) + 1)
            begin = time.thread_time()
            width = block.width(pullbacks, sums, most)
            # From the longest, so that states are dropped as soon as both of their products are taken.
            while sums:
                shortest = max(0, len(sums) - width)
                part, sums = sums[shortest:], sums[:shortest]
                residuals = _all_through(block, pullbacks, part, [by_residual] * len(part), width)
                skips = _all_through(block, pullbacks, part, [by_skip] * len(part), width)
                for length in reversed(range(shortest, shortest + len(part))):
                    after[length + 1] = added(after[length + 1], residuals[length - shortest])
                    after[length] = skips[length - shortest]
                del part, residuals, skips
            block.spend(time.thread_time() - begin)
            sums = after
        return sums

    def _walk(self, start: ScaledState | None, routing: Tensor, finish: Finish) -> None:
        """Walk all routings whose gradients are not zero; call ``finish`` at their ends."""
        if start is None:
            return
        rows: list[list[Sequence[float]]] = routing.tolist()
        blocks = list(reversed(self.blocks))
        walked = [_normalised(blocks, list(reversed(of_routing))) for of_routing in rows]
        alive = [number for number, pair in enumerate(walked) if pair is not None]
        pairs = [pair for pair in walked if pair is not None]

        def apply(
            position: int, states: Sequence[ScaledState | None], steps: Sequence[Step]
        ) -> list[ScaledState | None]:
            block = blocks[position]
            pullbacks = block.pullbacks()
            begin = time.thread_time()
            width = block.width(pullbacks, states, most)
            after = _all_through(block, pullbacks, states, steps, width)
            block.spend(time.thread_time() - begin)
            widths[0] = max(widths[0], width)
            return after

        def end(numbers: Sequence[int], state: ScaledState | None) -> None:
            if state is not None:
                finish([alive[number] for number in numbers], state, [pairs[number][1] for number in numbers])

        # The largest of the blocks' widths; where a block has to be run again, as many as there is room for.
        most = self._most(start.mantissa)
        widths = [most if any(not block.kept for block in blocks) else 1]
        begin: ScaledState | None = start
        walk_together(begin, [steps for steps, _ in pairs], apply, end, lambda: widths[0])

    def _most(self, grad: Tensor) -> int:
        """Return how many of the walk's largest states fit into `chunks.CHUNK_BYTES`, at least 1."""
        largest = max(grad.numel(), *(block.x.numel() for block in self.blocks)) * grad.element_size()
        return max(1, chunks.CHUNK_BYTES // max(1, largest))


Scalar = tuple[float, int]
"""A factor, and a power of two to multiply it by."""

Finish = Callable[[Sequence[int], ScaledState, Sequence[Scalar]], None]


def _all_through(
    block: RecordedBlock,
    pullbacks: Pullbacks,
    states: Sequence[ScaledState | None],
    steps: Sequence[Step],
    width: int,
) -> list[ScaledState | None]:
    """Return states pulled back through a block, of those with equal steps up to ``width`` at once."""
    after: list[ScaledState | None] = [None] * len(states)
    together: dict[Step, dict[int, ScaledState]] = {}
    for number, (state, step) in enumerate(zip(states, steps, strict=True)):
        if state is None:
            continue
        if width > 1 and block.reaches(step) and not block.passes_on(step):
            together.setdefault(step, {})[number] = state
        else:
            after[number] = _through(block, pullbacks, state, step)
    for step, by_number in together.items():
        pulled = pulled_together(pullbacks, step, list(by_number.values()), width)
        for number, state in zip(by_number, pulled, strict=True):
            after[number] = state
    return after


def _through(block: RecordedBlock, pullbacks: Pullbacks, state: ScaledState, step: Step) -> ScaledState | None:
    """Return a state pulled back through a block; None if it is zero."""
    if not block.reaches(step):
        return None
    if block.passes_on(step):
        factor = step[0]
        if factor == 1:
            return state
        return multiplied(state, factor)
    return pulled_together(pullbacks, step, [state], 1)[0]


def _normalised(
    blocks: Sequence[RecordedBlock], rows: Sequence[Sequence[float]]
) -> tuple[list[Step | None], Scalar] | None:
    """Return a routing's steps, the largest factor of each 1, and the factor that this leaves out.

    A step that passes the gradient on is None. Return None for a routing whose gradient is zero.
    """
    steps: list[Step | None] = []
    scalar, power = 1.0, 0
    for block, row in zip(blocks, rows, strict=True):
        factors = block.factors(row)
        if not block.reaches(factors):
            return None
        largest = max(factors, key=abs)
        if largest != 1:
            factors = tuple(factor / largest for factor in factors)
            scalar, shift = math.frexp(scalar * largest)
            power += shift
        steps.append(None if block.passes_on(factors) else factors)
    return steps, (scalar, power)
