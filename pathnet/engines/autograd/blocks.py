"""One block at a recorded input, and what is known of a block for all batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pathnet.engines.autograd.agreement import agree
from pathnet.engines.autograd.capture import CAPTURING, NotCapturedError, random_like
from pathnet.engines.autograd.programs import Program, compile_block
from pathnet.engines.autograd.pullbacks import IDENTITY, Pullback, Pullbacks, plain_pullbacks
from pathnet.engines.autograd.states import ScaledState
from pathnet.engines.autograd.timing import fastest
from pathnet.engines.autograd.together import VISITS, measured_width
from pathnet.full_precision import Autocast
from pathnet.models.context import Context
from pathnet.models.residual_net import Block

__all__ = ["KnownBlock", "RecordedBlock"]

PATIENCE = 0.05
"""Seconds that a block's plain pull-backs take before the block is captured, which takes about as long."""

MOST_LAYOUTS = 4
"""Maximum number of layouts of its input for which a block keeps programs, which hold copies of its weights."""

Signature = tuple[object, ...]


@dataclass
class KnownBlock:
    """A block of the prepared network, with the programs captured from it.

    Attributes:
        choices: choices between implementations, by what is computed; shared by all blocks.
        copies: whether a branch or the join changes its input in place.
        spent: seconds that pull-backs have taken for inputs of each layout.
        visits: by what pull-backs compute, the number of gradients that have passed; shared by all blocks.
        programs: the program by the layout of the block's input and its context; None where the plain pull-backs are
            the better ones.
        confirmed: the signatures whose programs agreed with the block on a second batch.
    """

    block: Block
    choices: dict[object, int]
    visits: dict[object, int]
    copies: bool = False
    spent: dict[Signature, float] = field(default_factory=dict)
    programs: dict[Signature, Program | None] = field(default_factory=dict)
    confirmed: set[Signature] = field(default_factory=set)

    def __getstate__(self) -> Mapping[str, Any]:
        # Functions of a program cannot be copied; a copy captures the block again.
        return {**self.__dict__, "spent": {}, "programs": {}, "confirmed": set()}

    def plain(self, x: Tensor, context: Context) -> tuple[Tensor, Pullbacks]:
        """Run the block at its input; return its output, and its pull-backs by autograd."""
        block = self.block.bound(context)
        if not self.copies:
            try:
                return plain_pullbacks(block, x, copies=False)
            except RuntimeError as error:
                if "in-place operation" not in str(error):
                    raise
                self.copies = True
        return plain_pullbacks(block, x, copies=True)

    def record(self, x: Tensor, context: Context) -> tuple[Tensor, Pullbacks, Program | None]:
        """Run the block at its input, by its program if it has one."""
        signature = _signature(x, context)
        program = self.programs.get(signature)
        if program is None:
            return *self.plain(x, context), None
        y, pullbacks = program.record(x, context.tensors)
        if signature not in self.confirmed:
            # A program that took a value of its first batch for a constant shows here.
            expected, plain = self.plain(x, context)
            if not _agrees(y, expected, pullbacks, plain):
                self.programs[signature] = None
                return expected, plain, None
            self.confirmed.add(signature)
        return y, pullbacks, program

    def has_program(self, x: Tensor, context: Context) -> bool:
        """Return whether a program serves inputs like x."""
        return self.programs.get(_signature(x, context)) is not None

    def is_due(self, x: Tensor, context: Context) -> bool:
        """Return whether it is time to capture the block for inputs like x."""
        signature = _signature(x, context)
        return self.spent.get(signature, 0.0) >= PATIENCE and signature not in self.programs

    def capture(self, x: Tensor, context: Context, plain: Pullbacks) -> tuple[Pullbacks, Program] | None:
        """Capture the block, and return its program's pull-backs at x; None where the plain ones stay.

        They stay where the block cannot be captured, and where its program disagrees with them or is slower.
        """
        with CAPTURING:
            signature = _signature(x, context)
            if signature in self.programs:
                return None
            while len(self.programs) >= MOST_LAYOUTS:
                self._forget(next(iter(self.programs)))
            self.programs[signature] = None
            try:
                program = compile_block(self.block, context, x, plain, self.copies, self.choices)
                y, pullbacks = program.record(x, context.tensors)
            except NotCapturedError:
                return None
            with torch.no_grad():
                expected = self.block.bound(context)(x.clone())
            if not _agrees(y, expected, pullbacks, plain) or not _is_faster(y, pullbacks, plain):
                return None
            self.programs[signature] = program
            return pullbacks, program

    def width(self, pullbacks: Pullbacks, grad: Tensor, count: int, most: int) -> int:
        """Return how many gradients pass through the block at once.

        One after the other passes until so many have that the measurement of the best number costs little beside
        them, and until the block is captured or due to be.

        Args:
            grad: one of the gradients that are about to pass.
            count: their number.
            most: maximum number that memory has room for at once.
        """
        key = pullbacks.kind or id(self), grad.shape, grad.stride(), grad.dtype, grad.device
        width = self.choices.get(("width", key), 0)
        if width == 0:
            visits = self.visits.get(key, 0)
            self.visits[key] = visits + count
            if visits < VISITS or (pullbacks.kind is None and max(self.spent.values(), default=0.0) < PATIENCE):
                return 1
            with CAPTURING:
                if ("width", key) not in self.choices:
                    self.choices["width", key] = measured_width(pullbacks, grad, most)
            width = self.choices["width", key]
        return min(width, most)

    def _forget(self, signature: Signature) -> None:
        del self.programs[signature]
        self.confirmed.discard(signature)
        self.spent.pop(signature, None)


@dataclass
class RecordedBlock:
    """A block at a recorded input.

    Attributes:
        x: the block's input.
        kept: its pull-backs; None where they are computed anew whenever they are needed.
        program: the program that made them; None for plain ones.
        passing: whether skip connection and join are the identity.
        present: for each part, whether gradients come through.
    """

    known: KnownBlock
    context: Context
    autocast: Autocast
    x: Tensor
    kept: Pullbacks | None
    program: Program | None
    passing: bool
    present: tuple[bool, ...]

    @classmethod
    def recorded(
        cls, known: KnownBlock, context: Context, autocast: Autocast, x: Tensor
    ) -> tuple[Tensor, RecordedBlock]:
        """Run a block at its input; return its output and its record."""
        y, pullbacks, program = known.record(x, context)
        passing = pullbacks.join is IDENTITY and pullbacks.parts[0] is IDENTITY
        present = tuple(part is not None for part in pullbacks.parts)
        return y, cls(known, context, autocast, x, pullbacks, program, passing, present)

    def __getstate__(self) -> Mapping[str, Any]:
        # Graphs cannot be copied; a copy computes its pull-backs from the block's input.
        return {**self.__dict__, "kept": None, "program": None}

    def spend(self, seconds: float) -> None:
        """Count seconds that the block's pull-backs took."""
        with self.autocast.entered():
            signature = _signature(self.x, self.context)
        self.known.spent[signature] = self.known.spent.get(signature, 0.0) + seconds

    def pullbacks(self) -> Pullbacks:
        """Return the block's pull-backs."""
        with self.autocast.entered():
            return self._pullbacks()

    def _pullbacks(self) -> Pullbacks:
        pullbacks, program = self.kept, self.program
        if pullbacks is None:
            _, pullbacks, program = self.known.record(self.x, self.context)
        if program is not None:
            return pullbacks
        if self.known.is_due(self.x, self.context):
            captured = self.known.capture(self.x, self.context, pullbacks)
            if captured is not None:
                pullbacks, program = captured
        elif self.known.has_program(self.x, self.context):
            _, pullbacks, program = self.known.record(self.x, self.context)
        if program is not None and self.kept is not None:
            self.kept, self.program = pullbacks, program
        return pullbacks

    def width(self, pullbacks: Pullbacks, states: Sequence[ScaledState | None], most: int) -> int:
        """Return how many of the states that are about to pass do so at once, see `KnownBlock.width`."""
        entering = [state.mantissa for state in states if state is not None]
        return self.known.width(pullbacks, entering[0], len(entering), most) if entering else 1

    def saved(self) -> Sequence[Tensor]:
        """Return the tensors that the record of the block keeps alive for itself, besides its input."""
        return self.kept.tensors() if self.kept is not None else ()

    def tensors(self) -> Sequence[Tensor]:
        """Return all tensors that the record of the block keeps alive."""
        return [self.x, *self.saved(), *(self.program.held if self.program is not None else ())]

    def factors(self, row: Sequence[float]) -> tuple[float, ...]:
        """Return the factor of each part of the block under a routing's row."""
        return tuple(map(float, self.known.block.coefficients(row)))

    def reaches(self, factors: Sequence[float]) -> bool:
        """Return whether a gradient that is not zero can come through."""
        return any(factor != 0 and present for factor, present in zip(factors, self.present, strict=True))

    def passes_on(self, factors: Sequence[float]) -> bool:
        """Return whether the block hands a gradient on as it is, but for a factor."""
        return self.passing and not any(factors[1:])


def _signature(x: Tensor, context: Context) -> Signature:
    """Return what a program is captured for: the layout of the input, and the context but for its tensors' values."""
    values = tuple(
        (name, tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in context.values.items()
    )
    autocast = Autocast.active(x.device.type)
    return tuple(x.shape), x.stride(), x.dtype, x.device, values, autocast


def _pairs(pullbacks: Pullbacks, plain: Pullbacks) -> list[tuple[Pullback, Pullback]]:
    """Return the pull-backs that are more than the identity, each beside the plain one."""
    both = zip((pullbacks.join, *pullbacks.parts), (plain.join, *plain.parts), strict=True)
    return [(a, b) for a, b in both if a is not None and b is not None and b is not IDENTITY]


def _agrees(y: Tensor, expected: Tensor, pullbacks: Pullbacks, plain: Pullbacks) -> bool:
    """Return whether a program's output and pull-backs are those of the block, but for rounding."""
    grad = random_like(y, _state_type(y))
    results = [(y, expected), *((a(grad), b(grad)) for a, b in _pairs(pullbacks, plain))]
    return y.stride() == expected.stride() and all(agree(a, b, plain.inner) for a, b in results)


def _is_faster(y: Tensor, pullbacks: Pullbacks, plain: Pullbacks) -> bool:
    grad = random_like(y, _state_type(y))

    def all_of(pulls: Sequence[Pullback]) -> Callable[[], object]:
        return lambda: [pull(grad) for pull in pulls]

    pairs = _pairs(pullbacks, plain)
    return fastest([all_of([b for _, b in pairs]), all_of([a for a, _ in pairs])], y.device) == 1


def _state_type(y: Tensor) -> torch.dtype:
    return torch.float64 if y.dtype == torch.float64 else torch.float32
