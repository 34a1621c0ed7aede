"""The values of a graph's nodes for an example, and which of them depend on the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.graphs import RecordingInterpreter, TracedGraph, is_inside, placeholders

__all__ = ["Observation", "Source", "batch_dim_of", "gradient_sources", "observe", "value_dependents"]

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


def observe(traced: TracedGraph, example: Example, source: fx.Node | None = None) -> dict[fx.Node, Observation]:
    """Return an observation of every node of the graph, for an example.

    Args:
        source: the node at which gradients are requested; None for none.
    """
    observations: dict[fx.Node, Observation] = {}

    def on_value(node: fx.Node, value: Any) -> Any:
        if node is source:
            value = value.detach().requires_grad_()
        observations[node] = _observation(value)
        return value

    with torch.enable_grad():
        RecordingInterpreter(traced.attributes, traced.graph, on_value).run(*example.copies())
    return observations


def _observation(value: Any) -> Observation:
    differentiable = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))
    kept = None if differentiable else value
    if not isinstance(value, Tensor):
        return Observation(differentiable, kept, None, None, None)
    return Observation(differentiable, kept, value.shape, value.dtype, value.device)


def batch_dim_of(single: Observation, double: Observation, batch: int) -> int | None:
    """Return the dimension of a tensor that holds the batch; None if none does.

    Args:
        single, double: observations of the tensor for the example, and for the example repeated twice.
        batch: the number of samples in the example.
    """
    if single.shape is None or double.shape is None or len(single.shape) != len(double.shape):
        return None
    sizes = list(zip(single.shape, double.shape, strict=True))
    differing = [i for i, (size, doubled) in enumerate(sizes) if size != doubled]
    return differing[0] if len(differing) == 1 and sizes[differing[0]] == (batch, 2 * batch) else None


@dataclass(frozen=True)
class Source:
    """A place where the residual stream may begin.

    Attributes:
        node: the node where the analysed gradients end: an input, or for tokens the embedding of their values.
        x: the position of the input that it is computed from.
    """

    node: fx.Node
    x: int


def gradient_sources(traced: TracedGraph, example: Example, stream: str | int | None) -> list[Source]:
    """Return the places where the residual stream may begin, likeliest first.

    These are the floating-point inputs, then the first embedding of integers.

    Args:
        stream: the name or index of an input, or the name of a submodule, where the stream begins.

    Raises:
        ValueError: there is none, or ``stream`` names none.
    """
    inputs = placeholders(traced.graph)
    floating = [i for i, tensor in enumerate(example.tensors) if tensor.is_floating_point()]
    keys = list(example.structure.tensor_keys)
    if stream is None:
        sources = [Source(inputs[i], i) for i in floating]
        embedded = _first_embedding(traced, inputs)
        sources += [] if embedded is None else [embedded]
        if not sources:
            raise ValueError("model: takes integers, and no embedding of them was found")
        return sources
    if stream in keys:
        i = keys.index(stream)
        if i in floating:
            return [Source(inputs[i], i)]
        embedded = _first_embedding(traced, inputs, i)
        if embedded is None:
            raise ValueError(f"stream: expected an input that is embedded, got {stream!r}")
        return [embedded]
    inside = [node for node in traced.graph.nodes if is_inside(node, str(stream))]
    if not inside:
        names = ", ".join(map(repr, keys)) if example.structure.kind != "tensor" else "none"
        raise ValueError(
            f"stream: expected the name of an input ({names}) or of a submodule with operations, got {stream!r}"
        )
    source = _entry(traced, inputs, inside, observe(traced, example))
    if source is None:
        raise ValueError(f"stream: nothing that depends on the inputs enters {stream!r}")
    return [source]


def _first_embedding(traced: TracedGraph, inputs: Sequence[fx.Node], index: int | None = None) -> Source | None:
    """Return the first embedding of an input's values, or of one input's values."""
    dependents = [value_dependents(traced.graph, node) for node in inputs]
    for node in traced.graph.nodes:
        if _is_embedding(traced, node):
            for i, of_input in enumerate(dependents):
                if index in (None, i) and any(parent in of_input for parent in node.all_input_nodes):
                    return Source(node, i)
    return None


def _is_embedding(traced: TracedGraph, node: fx.Node) -> bool:
    is_module = node.op == "call_module" and isinstance(traced.attributes[str(node.target)], nn.Embedding)
    return is_module or node.target in EMBEDDINGS


def _entry(
    traced: TracedGraph,
    inputs: Sequence[fx.Node],
    inside: Sequence[fx.Node],
    observations: Mapping[fx.Node, Observation],
) -> Source | None:
    """Return where the inputs' values enter a submodule: the first embedding in it, or the first value it reads."""
    within = set(inside)
    dependents = [value_dependents(traced.graph, node) for node in inputs]

    def position(node: fx.Node) -> int | None:
        return next((i for i, of_input in enumerate(dependents) if node in of_input), None)

    for node in inside:
        for parent in node.all_input_nodes:
            i = position(parent)
            if i is None or parent in within:
                continue
            if _is_embedding(traced, node):
                return Source(node, i)
            dtype = observations[parent].dtype
            if dtype is not None and dtype.is_floating_point:
                return Source(parent, i)
    return None


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
