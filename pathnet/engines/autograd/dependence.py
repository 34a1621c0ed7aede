"""The most varying input of each operator of a captured graph: weights, the block's input, or a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from torch import Tensor, fx

__all__ = ["Depends", "dependence", "examples_of", "value_of"]


class Depends(IntEnum):
    """The most varying input of an operator.

    What depends on weights is computed once; on the block's input, once for each record; on a gradient, for each
    gradient.
    """

    WEIGHTS = 0
    INPUT = 1
    GRADIENT = 2


def dependence(graph: fx.Graph, gradients: int) -> dict[fx.Node, Depends]:
    """Return what each node of a captured graph depends on.

    Args:
        gradients: number of gradients among the graph's inputs, after the first input.
    """
    result: dict[fx.Node, Depends] = {}
    placeholders = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            result[node] = Depends.GRADIENT if 1 <= placeholders <= gradients else Depends.INPUT
            placeholders += 1
        else:
            result[node] = max((result[argument] for argument in node.all_input_nodes), default=Depends.WEIGHTS)
    return result


def examples_of(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Return each node's value for example inputs."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op != "output":
            values[node] = value_of(traced, node, values)
    return values


def value_of(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Return a node's value from those of its arguments."""
    if node.op == "get_attr":
        value: Any = traced
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value.detach() if isinstance(value, Tensor) else value
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)
