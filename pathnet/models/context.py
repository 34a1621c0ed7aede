"""The context of a batch: what blocks and head read besides the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["NO_CONTEXT", "Context"]


@dataclass(frozen=True)
class Context:
    """Values of one batch that blocks and head read besides the residual stream.

    These are masks, positions, rotary factors, conditioning vectors and the like. They are constants of the paths: no
    gradient of a path flows through them.

    Attributes:
        values: tensors and numbers by name.
        batch_dims: for each tensor with the batch in it, the dimension that holds the batch. Samples share all
            others.
        counts: the numbers that are proportional to the batch size.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    batch_dims: Mapping[str, int] = field(default_factory=dict)
    counts: frozenset[str] = frozenset()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the values."""
        return [value for value in self.values.values() if isinstance(value, Tensor)]

    def repeated(self, times: int) -> Context:
        """Return the context of the batch repeated ``times`` times, sample 0 to B - 1 and again.

        Repeated batches carry several paths or lesioned copies at once.
        """
        values = dict(self.values)
        for name, dim in self.batch_dims.items():
            repeats = [times if i == dim else 1 for i in range(values[name].ndim)]
            values[name] = values[name].repeat(repeats)
        for name in self.counts:
            values[name] *= times
        return Context(values, self.batch_dims, self.counts)

    def detached(self) -> Context:
        """Return the context without the graph that computed it."""
        values = {name: v.detach() if isinstance(v, Tensor) else v for name, v in self.values.items()}
        return Context(values, self.batch_dims, self.counts)


NO_CONTEXT = Context()
"""The context of networks whose blocks and head read the residual stream alone."""
