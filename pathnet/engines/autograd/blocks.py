"""One block at a recorded input, and what is known of a block for all batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathnet.engines.autograd.pullbacks import IDENTITY, Pullbacks, plain_pullbacks
from pathnet.models.residual_net import Block

__all__ = ["KnownBlock", "RecordedBlock"]


@dataclass
class KnownBlock:
    """A block of the prepared network.

    Attributes:
        copies: whether a branch or the join changes its input in place.
    """

    copies: bool = False

    def record(self, block: Block, x: Tensor) -> tuple[Tensor, Pullbacks]:
        """Run the block, bound to a batch's context, at its input; return its output and its pull-backs."""
        if not self.copies:
            try:
                return plain_pullbacks(block, x, copies=False)
            except RuntimeError as error:
                if "in-place operation" not in str(error):
                    raise
                self.copies = True
        return plain_pullbacks(block, x, copies=True)


@dataclass
class RecordedBlock:
    """A block at a recorded input.

    Attributes:
        x: the block's input.
        kept: its pull-backs; None where they are computed anew whenever they are needed.
    """

    known: KnownBlock
    block: Block
    x: Tensor
    kept: Pullbacks | None
    passing: bool
    present: tuple[bool, ...]

    @classmethod
    def recorded(cls, known: KnownBlock, block: Block, x: Tensor) -> tuple[Tensor, RecordedBlock]:
        y, pullbacks = known.record(block, x)
        passing = pullbacks.join is IDENTITY and pullbacks.parts[0] is IDENTITY
        present = tuple(part is not None for part in pullbacks.parts)
        return y, cls(known, block, x, pullbacks, passing, present)

    def pullbacks(self, visits: int) -> Pullbacks:
        """Return the block's pull-backs, which the caller takes ``visits`` times."""
        if self.kept is not None:
            return self.kept
        return self.known.record(self.block, self.x)[1]

    def tensors(self) -> Sequence[Tensor]:
        return [self.x, *(self.kept.tensors() if self.kept is not None else ())]

    def factors(self, row: Sequence[float]) -> tuple[float, ...]:
        """Return the factor of each part under a routing's row, 0 for parts that the row does not name."""
        return (*row, *(0.0 for _ in self.present[len(row) :]))

    def reaches(self, factors: Sequence[float]) -> bool:
        """Return whether a gradient that is not zero can come through."""
        return any(factor != 0 and present for factor, present in zip(factors, self.present, strict=True))

    def passes_on(self, factors: Sequence[float]) -> bool:
        """Return whether the block hands a gradient on as it is, but for a factor."""
        return self.passing and not any(factors[1:])
