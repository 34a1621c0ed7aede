"""Conditions on the shapes of a model's inputs under which its trace holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pathnet.models.inputs import InputStructure

__all__ = ["ShapeGuards"]

SIZE = re.compile(r"shape\[(\d+)\]\[(\d+)\]")
FIXED = re.compile(r"shape\[(\d+)\]\[(\d+)\] == (\d+)")


@dataclass(frozen=True)
class ShapeGuards:
    """Assumptions of a trace about the shapes of its inputs.

    Attributes:
        sizes: for each tensor the size of each dimension; None for any.
        conditions: Python expressions over ``shape[tensor][dimension]``.
    """

    sizes: tuple[tuple[int | None, ...], ...]
    conditions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        sizes: Iterable[Sequence[int | None]],
        conditions: Iterable[str],
        example: Sequence[Tensor],
        batch_dims: Sequence[int | None],
    ) -> ShapeGuards:
        """Return the guards that hold for the example, without conditions on anything but sizes.

        Inequalities that only decide how memory is laid out are left out too: of the batch size, and of sizes
        computed from others and 1.
        """
        shapes = [list(tensor.shape) for tensor in example]
        known = [list(of_tensor) for of_tensor in sizes]
        kept = []
        for text in dict.fromkeys(conditions):
            if not _holds(text, shapes):
                continue
            if fixed := FIXED.fullmatch(text):
                known[int(fixed[1])][int(fixed[2])] = int(fixed[3])
                continue
            of_batch = any(batch_dims[int(i)] == int(dim) for i, dim in SIZE.findall(text))
            if "!=" not in text or not (of_batch or text.endswith("!= 1")):
                kept.append(text)
        return cls(tuple(map(tuple, known)), tuple(kept))

    def check(self, structure: InputStructure, tensors: Sequence[Tensor], whole: str) -> None:
        """Check the shapes of a batch.

        Args:
            whole: the name of the inputs in errors.

        Raises:
            ValueError: the trace does not hold for them.
        """
        for i, (tensor, sizes) in enumerate(zip(tensors, self.sizes, strict=True)):
            if len(sizes) != tensor.ndim or any(s not in (None, t) for s, t in zip(sizes, tensor.shape, strict=True)):
                dim = structure.batch_dims[i]
                named = ["B" if d == dim else "any" if size is None else str(size) for d, size in enumerate(sizes)]
                raise ValueError(
                    f"{structure.name(i, whole)}: expected the shape that was traced, [{', '.join(named)}], got "
                    f"{list(tensor.shape)}"
                )
        # torch.export traces batches of at least two samples; its graph takes one as well.
        shapes = [
            [max(size, 2) if d == dim else size for d, size in enumerate(tensor.shape)]
            for tensor, dim in zip(tensors, structure.batch_dims, strict=True)
        ]
        for condition in self.conditions:
            if not _holds(condition, shapes):
                named_condition = SIZE.sub(
                    lambda match: f"{structure.name(int(match[1]), whole)}.shape[{match[2]}]", condition
                )
                got = ", ".join(str(list(tensor.shape)) for tensor in tensors)
                raise ValueError(f"{whole}: expected {named_condition}, which the trace assumes, got {got}")


def _holds(condition: str, shapes: Sequence[Sequence[int]]) -> bool | None:
    """Return whether a condition holds; None if it is not a condition on sizes."""
    try:
        # Written by torch.export, over integers alone: nothing else is in scope.
        return bool(eval(condition, {"__builtins__": {}}, {"shape": shapes}))  # noqa: S307
    except Exception:
        return None
