"""Literal types in a trace that must follow the network's type when a copy of it is cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.tracing.values import value_dependents

__all__ = ["floating_dependents", "follow_network_type", "network_type"]

HALVES = (torch.float16, torch.bfloat16)


def network_type(model: nn.Module) -> torch.dtype | None:
    """Return the type of the weights: a half-precision type if any has one, else the first floating-point one."""
    types = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return next((dtype for dtype in types if dtype in HALVES), types[0] if types else None)


def floating_dependents(
    graph: fx.Graph, attributes: Mapping[str, Any], inputs: Iterable[fx.Node] = ()
) -> set[fx.Node]:
    """Return the nodes whose values depend on weights, buffers or inputs of a floating-point type.

    Args:
        attributes: the modules and tensors that the graph refers to, by name.
        inputs: the graph's floating-point inputs.
    """
    origins = list(inputs)
    for node in graph.nodes:
        attribute = attributes.get(str(node.target)) if node.op in ("call_module", "get_attr") else None
        tensors = [attribute] if isinstance(attribute, Tensor) else []
        if isinstance(attribute, nn.Module):
            tensors = [*attribute.parameters(), *attribute.buffers()]
        if any(tensor.is_floating_point() for tensor in tensors):
            origins.append(node)
    return value_dependents(graph, *origins)


def follow_network_type(
    graph: fx.Graph, attributes: dict[str, Any], model: nn.Module, inputs: Iterable[fx.Node] = ()
) -> None:
    """Make literal types in a graph follow the weights' type.

    A model writes ``x.to(other.dtype)``, its trace ``x.to(torch.bfloat16)``, which would be wrong in a float32 copy.
    All half-precision literals of the weights' type follow it. Of float32 and float64 literals, those follow that act
    on values of no floating-point type in the model, such as masks and positions; others have no effect or are meant.

    Args:
        attributes: the modules and tensors that the graph refers to, by name; an empty tensor of the weights' type is
            added, whose type a copy changes as that of the weights.
        inputs: the graph's floating-point inputs.
    """
    dtype = network_type(model)
    casts = [node for node in graph.nodes if dtype is not None and _holds(dtype, node)]
    if dtype not in HALVES and casts:
        floating = floating_dependents(graph, attributes, inputs)
        casts = [node for node in casts if floating.isdisjoint(node.all_input_nodes)]
    if not casts:
        return
    name = "of_network_type"
    while name in attributes:
        name += "_"
    attributes[name] = torch.empty(0, dtype=dtype, device=next(model.parameters()).device)
    with graph.inserting_before(next(iter(graph.nodes))):
        type_node = graph.call_function(getattr, (graph.create_node("get_attr", name), "dtype"))

    def followed(value: Any) -> Any:
        return type_node if value is dtype else value

    for node in casts:
        node.args, node.kwargs = _mapped(node.args, followed), _mapped(node.kwargs, followed)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(value, change)


def _holds(dtype: torch.dtype, node: fx.Node) -> bool:
    """Return whether a type is among the arguments of a function or method."""
    equal: list[bool] = []
    if node.op in ("call_function", "call_method"):
        _mapped((node.args, node.kwargs), lambda value: equal.append(value is dtype))
    return any(equal)
