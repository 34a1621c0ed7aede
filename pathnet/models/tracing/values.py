"""The values of a graph's nodes for an example, and which of them depend on the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pathnet.models.tracing.graphs import RecordingInterpreter, TracedGraph, placeholder

__all__ = ["Observation", "gradient_source", "observe", "value_dependents"]

EMBEDDINGS = (torch.nn.functional.embedding, torch.ops.aten.embedding.default)
SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda"}
SHAPE_FUNCTIONS = {
    *("size", "dim", "numel", "stride", "len", "sym_size", "ndimension", "is_floating_point", "get_device"),
}
CONSTRUCTORS = {"zeros", "ones", "empty", "full"}
FIRST_INPUT_FUNCTIONS = {"expand_as", "view_as", "reshape_as", "type_as", "to"}
"""Functions that use the values of their first input, and only shape or type of the second."""


@dataclass(frozen=True)
class Observation:
    """The value of a node in one run of the graph.

    Attributes:
        differentiable: whether a gradient flows from the value to the source.
        value: the value itself; None for differentiable ones, whose storage need not be kept.
        shape, dtype, device: those of a tensor; None for other values.
    """

    differentiable: bool
    value: Any
    shape: torch.Size | None
    dtype: torch.dtype | None
    device: torch.device | None


def observe(traced: TracedGraph, example: Tensor, source: fx.Node) -> tuple[dict[fx.Node, Observation], Tensor]:
    """Return an observation of every node and the output of the graph, for an example.

    Args:
        source: the node at which gradients are requested.
    """
    observations: dict[fx.Node, Observation] = {}

    def on_value(node: fx.Node, value: Any) -> Any:
        if node is source:
            value = value.detach().requires_grad_()
        observations[node] = _observation(value)
        return value

    with torch.enable_grad():
        module = fx.GraphModule(traced.attributes, traced.graph)
        output = RecordingInterpreter(module, on_value).run(example.clone())
    return observations, output.detach()


def _observation(value: Any) -> Observation:
    differentiable = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))
    kept = None if differentiable else value
    if not isinstance(value, Tensor):
        return Observation(differentiable, kept, None, None, None)
    return Observation(differentiable, kept, value.shape, value.dtype, value.device)


def gradient_source(traced: TracedGraph, example: Tensor) -> fx.Node:
    """Return the node where the analysed gradients end: the input, or for tokens the first embedding of their values.

    Raises:
        ValueError: the input consists of integers, and no operation embeds them.
    """
    start = placeholder(traced.graph)
    if example.is_floating_point():
        return start
    dependents = value_dependents(traced.graph, start)
    node: fx.Node
    for node in traced.graph.nodes:
        is_module = node.op == "call_module" and isinstance(traced.attributes[str(node.target)], nn.Embedding)
        if (is_module or node.target in EMBEDDINGS) and any(parent in dependents for parent in node.all_input_nodes):
            return node
    raise ValueError("model: takes integers, and no embedding of them was found")


def value_dependents(graph: fx.Graph, *origins: fx.Node) -> set[fx.Node]:
    """Return the nodes that depend on the values at ``origins``, not on their shapes alone; ``origins`` included."""
    dependents = set(origins)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES:
            continue
        name = str(getattr(node.target, "overloadpacket", getattr(node.target, "__name__", node.target)))
        name = name.rpartition(".")[2]
        if name in SHAPE_FUNCTIONS or name.removesuffix("_like").removeprefix("new_") in CONSTRUCTORS:
            continue
        if name in FIRST_INPUT_FUNCTIONS:
            inputs = inputs[:1]
        if any(parent in dependents for parent in inputs):
            dependents.add(node)
    return dependents
