"""Parts of a network that read a batch's context, and the graph that computes it from the model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from pathnet.models.context import NO_CONTEXT, Context
from pathnet.models.inputs import InputStructure
from pathnet.models.shape_guards import ShapeGuards

__all__ = ["BoundPart", "InputReader", "bound_part", "context_names"]


def context_names(part: nn.Module | None) -> list[str]:
    """Return the names of the context's values that a part reads, which are its inputs after the first."""
    if not isinstance(part, fx.GraphModule):
        return []
    return [str(node.target) for node in part.graph.nodes if node.op == "placeholder"][1:]


class BoundPart(nn.Module):
    """A part of a network with values of one batch's context."""

    def __init__(self, part: nn.Module, values: Sequence[Any]) -> None:
        super().__init__()
        self.part, self.values = part, tuple(values)
        self.training = part.training

    def forward(self, x: Tensor) -> Any:
        return self.part(x, *self.values)


def bound_part(part: nn.Module, context: Context) -> nn.Module:
    """Return a part with a batch's context as constants; the part itself if it reads none.

    Raises:
        ValueError: the context lacks a value.
    """
    names = context_names(part)
    if not names:
        return part
    if any(name not in context.values for name in names):
        raise ValueError(
            "context: expected that of the network's own inputs, got one without values that a part reads"
        )
    return BoundPart(part, [context.values[name] for name in names])


@dataclass(frozen=True)
class ContextValue:
    """A value of the context.

    Attributes:
        batch_dim: the dimension of a tensor that holds the batch; None if samples share it.
        counts: whether it is a number proportional to the batch size.
    """

    batch_dim: int | None = None
    counts: bool = False


class InputReader(nn.Module):
    """Reads a model's inputs: the tensor where the residual stream begins, and the context.

    Args:
        structure: the structure of the inputs.
        x: position among the tensors of the one where the residual stream begins.
        graph: computes the context's values by name from all tensors; None if there is no context.
        kinds: the kind of each value of the context.
        guards: the conditions on the inputs' shapes.
    """

    def __init__(
        self,
        structure: InputStructure,
        x: int = 0,
        graph: fx.GraphModule | None = None,
        kinds: Mapping[str, ContextValue] | None = None,
        guards: ShapeGuards | None = None,
    ) -> None:
        super().__init__()
        self.structure, self.x, self.guards = structure, x, guards
        self.graph, self.kinds = graph, dict(kinds or {})

    def tensors(self, inputs: Any, whole: str = "images") -> dict[str, Tensor]:
        """Return the tensors among the inputs by their names in errors, that of the residual stream first.

        Args:
            whole: the name of the inputs in errors.

        Raises:
            ValueError: the inputs differ in structure from the example, in device or batch size from each other, or
                have a shape that the trace does not cover.
        """
        tensors, names = self.structure.tensors(inputs, whole), [self.structure.name(self.x, whole)]
        self._check(tensors, whole)
        names += [self.structure.name(i, whole) for i in range(len(tensors)) if i != self.x]
        ordered = [tensors[self.x], *(tensor for i, tensor in enumerate(tensors) if i != self.x)]
        return dict(zip(names, ordered, strict=True))

    def forward(self, inputs: Any, whole: str = "images") -> tuple[Tensor, Context]:
        """Return the tensor where the residual stream begins, the batch first, and the context.

        Args:
            inputs, whole: see `tensors`.
        """
        tensors = self.structure.tensors(inputs, whole)
        self._check(tensors, whole)
        x = tensors[self.x].movedim(self.structure.batch_dims[self.x] or 0, 0)
        if self.graph is None:
            return x, NO_CONTEXT
        values = self.graph(*tensors)
        batch_dims = {name: kind.batch_dim for name, kind in self.kinds.items() if kind.batch_dim is not None}
        return x, Context(values, batch_dims, frozenset(name for name, kind in self.kinds.items() if kind.counts))

    def _check(self, tensors: Sequence[Tensor], whole: str) -> None:
        x, dims = tensors[self.x], self.structure.batch_dims
        for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
            name, x_name = self.structure.name(i, whole), self.structure.name(self.x, whole)
            if tensor.device != x.device:
                raise ValueError(f"{name}: expected device {x.device} ({x_name}'s), got {tensor.device}")
            x_dim = dims[self.x]
            if i == self.x or dim is None or x_dim is None or x.ndim <= x_dim:
                continue
            if tensor.ndim <= dim or tensor.shape[dim] != x.shape[x_dim]:
                raise ValueError(
                    f"{name}: expected a batch of {x.shape[x_dim]} in dimension {dim}, as in {x_name}, got shape "
                    f"{list(tensor.shape)}"
                )
        if self.guards is not None:
            self.guards.check(self.structure, tensors, whole)
