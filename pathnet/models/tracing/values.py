"""What the operations of a graph give for an example, and what of it depends on the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pathnet.models.tracing.graphs import Recording, Traced, placeholder

__all__ = ["Fact", "by_value", "observe", "source_of"]

EMBEDDINGS = (torch.nn.functional.embedding, torch.ops.aten.embedding.default)
SHAPES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda"}
OF_SHAPE = {"size", "dim", "numel", "stride", "len", "sym_size", "ndimension", "is_floating_point", "get_device"}
NEW_OF_SHAPE = {"zeros", "ones", "empty", "full"}


@dataclass(frozen=True)
class Fact:
    """What an operation gave for the example.

    Attributes:
        dependent: a gradient flows from it to the source.
        value: what it is, but for dependent tensors.
        shape: of a tensor.
    """

    dependent: bool
    value: Any
    shape: torch.Size | None
    dtype: torch.dtype | None
    device: torch.device | None


def observe(traced: Traced, example: Tensor, source: fx.Node) -> tuple[dict[fx.Node, Fact], Tensor]:
    """What every operation gives, and the output; ``source`` is where gradients are asked for."""
    facts: dict[fx.Node, Fact] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        if node is source:
            value = value.detach().requires_grad_()
        facts[node] = _fact(value)
        return value

    with torch.enable_grad():
        output = Recording(fx.GraphModule(traced.held, traced.graph), keep).run(example.clone())
    return facts, output.detach()


def _fact(value: Any) -> Fact:
    dependent = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))
    if not isinstance(value, Tensor):
        return Fact(dependent, None if dependent else value, None, None, None)
    return Fact(dependent, None if dependent else value, value.shape, value.dtype, value.device)


def source_of(traced: Traced, example: Tensor) -> fx.Node:
    """Where the gradients that count begin: the input, or for tokens the first embedding of their values.

    Raises:
        ValueError: the input is made of integers, and none of the operations is an embedding of them.
    """
    start = placeholder(traced.graph)
    if example.is_floating_point():
        return start
    known = by_value(traced.graph, start)
    node: fx.Node
    for node in traced.graph.nodes:
        ids = node.all_input_nodes
        is_module = node.op == "call_module" and isinstance(traced.held[str(node.target)], nn.Embedding)
        if (is_module or node.target in EMBEDDINGS) and any(own in known for own in ids):
            return node
    raise ValueError("model: takes integers, and no embedding of them was found")


def by_value(graph: fx.Graph, *origins: fx.Node) -> set[fx.Node]:
    """What depends on the values at ``origins``, not on their shapes alone."""
    found = set(origins)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target is getattr and node.args[1] in SHAPES:
            continue
        name = str(getattr(node.target, "overloadpacket", getattr(node.target, "__name__", node.target)))
        name = name.rpartition(".")[2]
        if name in OF_SHAPE or name.removesuffix("_like").removeprefix("new_") in NEW_OF_SHAPE:
            continue
        if name in ("expand_as", "view_as", "reshape_as", "type_as", "to"):
            inputs = inputs[:1]
        if any(own in found for own in inputs):
            found.add(node)
    return found
