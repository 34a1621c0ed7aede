"""Half-precision types in a trace: literals that must follow the network's type when a copy of it is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

__all__ = ["follow_network_type"]

HALVES = (torch.float16, torch.bfloat16)


def follow_network_type(graph: fx.Graph, attributes: dict[str, Any], model: nn.Module) -> None:
    """Make the half-precision types in a graph follow the weights' type.

    A model writes ``x.to(other.dtype)``, its trace ``x.to(torch.bfloat16)``, which would be wrong in a float32 copy.
    Types other than the weights' remain: a softmax in float32 is meant.

    Args:
        attributes: the modules and tensors that the graph refers to, by name; an empty tensor of the weights' type is
            added, whose type a copy changes as that of the weights.
    """
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.dtype in HALVES), None)
    if dtype is None:
        return
    name = "of_network_type"
    while name in attributes:
        name += "_"
    type_node: fx.Node | None = None

    def followed(value: Any) -> Any:
        return type_node if isinstance(value, torch.dtype) and value == dtype else value

    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not _holds(dtype, (node.args, node.kwargs)):
            continue
        if type_node is None:
            first = next(iter(graph.nodes))
            with graph.inserting_before(first):
                type_node = graph.call_function(getattr, (graph.get_attr(name), "dtype"))
            attributes[name] = torch.empty(0, dtype=dtype, device=next(model.parameters()).device)
        node.args, node.kwargs = _mapped(node.args, followed), _mapped(node.kwargs, followed)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(value, change)


def _holds(dtype: torch.dtype, arguments: Any) -> bool:
    """Return whether a type is among the arguments of an operation."""
    equal: list[bool] = []
    _mapped(arguments, lambda value: equal.append(isinstance(value, torch.dtype) and value == dtype))
    return any(equal)
