"""Tensors of a graph that share memory: writes through views, as operations whose edges show all data flow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name
from torch.utils import _pytree as pytree

from pathnet.models.tracing.graphs import describe_node, operation

__all__ = ["Aliases", "written_through"]

OPERATIONS: dict[str, Callable[..., Any]] = {"_operator.getitem": operator.getitem, "builtins.getattr": getattr}


@operation
def written_through(x: Tensor, value: Any, *steps: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Return a copy of ``x`` with ``value`` written into a view of it.

    Args:
        steps: the operations that lead from ``x`` to the view: name, further arguments, keyword arguments.

    Raises:
        ValueError: they give no view of a tensor with the strides of ``x``, nor of a contiguous one.
    """
    for memory_format in (torch.preserve_format, torch.contiguous_format):
        copy = x.clone(memory_format=memory_format)
        view: Any = copy
        try:
            for name, args, kwargs in steps:
                view = _operation(name)(view, *args, **kwargs)
        except RuntimeError:
            continue
        # Some operations, such as reshapes, copy what they cannot view.
        if view.untyped_storage()._cdata == copy.untyped_storage()._cdata:
            view.copy_(value)
            return copy
    raise ValueError(
        f"x: expected the memory layout that the model writes into by {', '.join(name for name, *_ in steps)}, got "
        f"shape {list(x.shape)} with strides {list(x.stride())}"
    )


def _operation(name: str) -> Callable[..., Any]:
    if name in OPERATIONS:
        return OPERATIONS[name]
    operation: Any = torch
    for part in name.removeprefix("torch.").split("."):
        operation = getattr(operation, part)
    return operation  # type: ignore[no-any-return]


class Aliases:
    """The nodes of a graph by the memory that their values share.

    Args:
        values: the value of each node in one run of the graph, all of them alive.
    """

    def __init__(self, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> None:
        self.values = values
        index = {node: i for i, node in enumerate(graph.nodes)}
        self.index = index
        self.last_use = {node: max((index[user] for user in node.users), default=-1) for node in index}
        self.memory: dict[fx.Node, set[int]] = {}
        self.sharing: dict[int, list[fx.Node]] = {}
        for node in index:
            tensors = (leaf for leaf in pytree.tree_leaves(values.get(node)) if isinstance(leaf, Tensor))
            self.memory[node] = {tensor.untyped_storage()._cdata for tensor in tensors if _has_memory(tensor)}
            for memory in self.memory[node]:
                self.sharing.setdefault(memory, []).append(node)

    def of(self, changed: fx.Node) -> list[fx.Node]:
        """Return the nodes with the same tensor as ``changed``: the same memory, shape and strides."""
        if not self.memory[changed]:
            return [changed]
        tensor = self.values[changed]
        return [node for node in self._sharing(changed) if _is_same_tensor(self.values[node], tensor)]

    def _sharing(self, node: fx.Node) -> list[fx.Node]:
        return [alias for memory in self.memory[node] for alias in self.sharing[memory]]

    def update(
        self, graph: fx.Graph, current: dict[fx.Node, Any], changed: fx.Node, writer: fx.Node, new_node: fx.Node
    ) -> None:
        """Let ``current`` show the new value in every node that shares memory with a changed one.

        Args:
            graph: the functional graph, to which operations are added.
            current: the node of ``graph`` with the current value of each earlier node.
            changed: the node whose tensor is changed.
            writer: the operation that changes it.
            new_node: the node of ``graph`` with the new value.

        Raises:
            ValueError: a view cannot be written through.
        """
        group = [node for node in self.of(changed) if node in current]
        current.update(dict.fromkeys(group, new_node))
        now = self.index[writer]
        stale = [node for node in self._sharing(changed) if node in current and node not in group]
        if not any(self.last_use[node] > now for node in stale):
            return
        updated = set(group)
        while (link := self._view(group)) is not None:
            source, chain = link
            steps = tuple(self._step(node, current, writer) for node in chain)
            new_node = graph.call_function(written_through, (current[source], new_node, *steps))
            new_node.meta = dict(writer.meta)
            group = [node for node in self.of(source) if node in current]
            current.update(dict.fromkeys(group, new_node))
            updated.update(group)
        for node in stale:
            if node not in updated and self._source(node) is not None:
                current[node] = graph.node_copy(node, current.__getitem__)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """Return the input whose memory the value of a view shares; None for a value with memory of its own."""
        memory = self.memory[node]
        return next((parent for parent in node.all_input_nodes if memory & self.memory[parent]), None)

    def _view(self, group: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]] | None:
        """Return the tensor that a tensor is a view of, and the operations from the one to the other; or None.

        Args:
            group: the nodes whose value the view is.
        """
        for node in group:
            source, chain = self._source(node), [node]
            # Chunks are views by way of a tuple.
            while source is not None and not isinstance(self.values[source], Tensor):
                chain.insert(0, source)
                source = self._source(source)
            if source is not None and source not in group:
                return source, chain
        return None

    def _step(self, node: fx.Node, current: Mapping[fx.Node, Any], writer: fx.Node) -> tuple[Any, ...]:
        """Return an operation as `written_through` takes it."""
        target = node.target
        name = f"Tensor.{target}" if node.op == "call_method" else None
        if node.op == "call_function" and not isinstance(target, str):
            name = _get_qualified_name(target)
        source = self._source(node)
        known = name is not None and (name in OPERATIONS or name.startswith(("torch.", "Tensor.")))
        if not known or not node.args or node.args[0] is not source:
            raise ValueError(f"{describe_node(writer)} writes into a view, by {describe_node(node)}")
        args, kwargs = fx.map_arg((node.args[1:], dict(node.kwargs)), current.__getitem__)
        return name, tuple(args), dict(kwargs)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.numel() > 0


def _is_same_tensor(first: Any, second: Any) -> bool:
    """Return whether two values are the same object, or tensors with the same memory, shape and strides."""
    if first is second:
        return True
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return (first.data_ptr(), first.shape, first.stride()) == (second.data_ptr(), second.shape, second.stride())
