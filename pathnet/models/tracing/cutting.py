"""Parts of a graph as modules: functions of one tensor over the model's own modules and weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.tracing.flow import Term
from pathnet.models.tracing.graphs import TracedGraph, describe_node, placeholder
from pathnet.models.tracing.operations import CLONES
from pathnet.models.tracing.values import Observation, value_dependents

__all__ = ["GraphCutter"]


class GraphCutter:
    """Cutter of parts out of a graph.

    A part may use outside values that no gradient flows through, such as sizes, masks and rotary factors. Such a
    value becomes a constant, or a function of the batch size. Two observations of the graph decide which: the second
    is for the example repeated twice.

    Attributes:
        single, double: the observations of each node for the example, and for the example repeated twice.
        fixed: why the parts take only inputs of the example's shape, batch apart.
    """

    def __init__(
        self,
        traced: TracedGraph,
        single: Mapping[fx.Node, Observation],
        double: Mapping[fx.Node, Observation],
        source: fx.Node,
    ) -> None:
        self.traced, self.single, self.double = traced, single, double
        self.start = placeholder(traced.graph)
        origins = [node for node in traced.graph.nodes if single[node].differentiable]
        self.input_dependents = value_dependents(traced.graph, self.start, source, *origins)
        self.weight_dependents = self._weight_dependents()
        self.index = {node: i for i, node in enumerate(traced.graph.nodes)}
        self.fixed: list[str] = []

    def _weight_dependents(self) -> set[fx.Node]:
        """Return the nodes that depend on the values of weights."""
        weights = []
        for node in self.traced.graph.nodes:
            attribute = self.traced.attributes[str(node.target)] if node.op in ("call_module", "get_attr") else None
            has_weights = isinstance(attribute, nn.Module) and any(True for _ in attribute.parameters())
            if isinstance(attribute, nn.Parameter) or has_weights:
                weights.append(node)
        return value_dependents(self.traced.graph, *weights)

    def check_batch(self, node: fx.Node) -> None:
        """Check that the first dimension of a node's value is the batch.

        Raises:
            ValueError: it is not.
        """
        single, double = self.single[node].shape, self.double[node].shape
        batch = self.single[self.start].shape
        assert batch is not None
        if single is None or double is None or single[:1] != batch[:1] or double != (2 * batch[0], *single[1:]):
            got = type(self.single[node].value).__name__ if single is None else list(single)
            raise ValueError(
                f"model: expected the batch in the first dimension ({batch[0]}) between blocks, got {got} from "
                f"{describe_node(node)}"
            )

    def cut(
        self, name: str, start: fx.Node, terms: Sequence[Term], shape: torch.Size | None = None
    ) -> fx.GraphModule | None:
        """Return the sum of ``terms`` as a function of ``start``; None for the identity.

        Args:
            name: the part's name in errors.
            shape: the shape to broadcast the sum to; None for its own.

        Raises:
            ValueError: the part needs an outside value that is neither a constant nor a function of the batch size.
        """
        sum_shape = _broadcast([self._shape(term.node) for term in terms])
        broadcasts = shape is not None and shape != sum_shape
        if len(terms) == 1 and terms[0].factor == 1 and not broadcasts and self._is_identity(start, terms[0].node):
            return None
        subgraph = _Subgraph(self, name, start, [term.node for term in terms])
        subgraph.graph.output(self._total(subgraph, terms, shape))
        return fx.GraphModule(subgraph.attributes, subgraph.graph)

    def _total(self, subgraph: _Subgraph, terms: Sequence[Term], shape: torch.Size | None) -> fx.Node:
        """Return the node of the sum of ``terms`` in a part, broadcast to ``shape``."""
        total: fx.Node | None = None
        for term in terms:
            value = subgraph.copies[term.node]
            if term.factor != 1:
                value = subgraph.graph.call_function(operator.mul, (value, term.factor))
            total = value if total is None else subgraph.graph.call_function(operator.add, (total, value))
        assert total is not None
        if shape is not None and shape != _broadcast([self._shape(term.node) for term in terms]):
            total = subgraph.graph.call_method("expand", (total, -1, *shape[1:]))
            self.fixed.append("a branch is broadcast")
        return total

    def cut_apart(
        self, name: str, start: fx.Node, sums: Sequence[Sequence[Term]], shape: torch.Size
    ) -> fx.GraphModule:
        """Return several sums of terms, each broadcast to ``shape``, as one function of ``start`` to a tuple.

        What they share is computed once.

        Args:
            name: the part's name in errors.
        """
        subgraph = _Subgraph(self, name, start, [term.node for terms in sums for term in terms])
        totals = [self._total(subgraph, terms, shape) for terms in sums]
        subgraph.graph.output(tuple(totals))
        return fx.GraphModule(subgraph.attributes, subgraph.graph)

    def _is_identity(self, start: fx.Node, end: fx.Node) -> bool:
        """Return whether only clones and `nn.Identity` stand between ``start`` and ``end``."""
        while end is not start and (
            end.target in CLONES or type(self.traced.attributes.get(str(end.target))) is nn.Identity
        ):
            (end,) = end.all_input_nodes
        return end is start

    def _shape(self, node: fx.Node) -> torch.Size:
        shape = self.single[node].shape
        assert shape is not None
        return shape


def _broadcast(shapes: Sequence[torch.Size]) -> torch.Size:
    """Return the shape of the sum of tensors with the given shapes."""
    first, *further = (torch.empty(shape, device="meta") for shape in shapes)
    return sum(further, first).shape


class _Subgraph:
    """A new graph that computes some nodes of the traced one from ``start``.

    Attributes:
        attributes: the modules and tensors that the new graph refers to, by name.
        copies: the new node, or the constant, for each copied node of the traced graph.
    """

    def __init__(self, cutter: GraphCutter, name: str, start: fx.Node, ends: Sequence[fx.Node]) -> None:
        self.cutter, self.name, self.start = cutter, name, start
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.copies: dict[fx.Node, Any] = {start: self.graph.placeholder("x")}
        inside = self._inside(ends)
        computable = self._computable(inside)
        needed, captured = self._needed(ends, computable)
        for node in sorted(captured, key=cutter.index.__getitem__):
            self.copies[node] = self._capture(node)
        for node in sorted(needed, key=cutter.index.__getitem__):
            self.copies[node] = self._copy(node)

    def _inside(self, ends: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the differentiable nodes between ``start`` and the ends, or all nodes if ``start`` is the input."""
        inside: set[fx.Node] = set()
        pending = [end for end in ends if end is not self.start]
        from_input = self.start is self.cutter.start
        while pending:
            node = pending.pop()
            if node not in inside:
                inside.add(node)
                pending += [
                    parent
                    for parent in node.all_input_nodes
                    if parent is not self.start and (from_input or self.cutter.single[parent].differentiable)
                ]
        return inside

    def _computable(self, inside: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes that can be computed from ``start``, the nodes inside, and weights."""
        computable = {self.start, *inside}
        for node in self.cutter.traced.graph.nodes:
            may_be_copied = node.op != "placeholder" and not self.cutter.single[node].differentiable
            if may_be_copied and all(parent in computable for parent in node.all_input_nodes):
                computable.add(node)
        return computable

    def _needed(self, ends: Sequence[fx.Node], computable: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """Return the nodes to copy for ``ends``, and those whose outside values to capture."""
        needed: set[fx.Node] = set()
        captured: set[fx.Node] = set()
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node is self.start or node in needed or node in captured:
                continue
            # A function of weights is never captured as a constant, since they are trained (T5's relative positions).
            of_weights = node in self.cutter.weight_dependents and node not in self.cutter.input_dependents
            if node in computable or of_weights:
                needed.add(node)
                pending += node.all_input_nodes
            else:
                captured.add(node)
        return needed, captured

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, self.copies.__getitem__)
        copied.meta = {}
        if node.op in ("call_module", "get_attr"):
            copied.target = self._attribute(str(node.target), self.cutter.traced.attributes[str(node.target)])
        return copied

    def _attribute(self, name: str, value: Any) -> str:
        """Add a module or tensor to the part, and return its name there.

        A tensor gets a name without dots, so that it is not registered a second time in the module it belongs to.
        """
        if isinstance(value, Tensor):
            name = name.replace(".", "_")
        while self.attributes.get(name, value) is not value:
            name += "_"
        self.attributes[name] = value
        return name

    def _capture(self, node: fx.Node) -> Any:
        """Return a constant, or a node of the new graph, for an outside value."""
        if node in self.cutter.input_dependents:
            raise self._error(node, "is computed from the input's values outside of it")
        return self._captured_value(self.cutter.single[node].value, self.cutter.double[node].value, node)

    def _error(self, node: fx.Node, why: str) -> ValueError:
        return ValueError(
            f"model: {self.name} needs {describe_node(node)}, which {why}; expected a part to need only the output "
            "of the one before it, weights and constants; blocks= takes branches, (skip, residual), by hand"
        )

    def _captured_value(self, single: Any, double: Any, node: fx.Node) -> Any:
        """Return a constant, or a node of the new graph, for a value.

        Args:
            single, double: the value, or an item of it, for the example and for the example repeated twice.
            node: the node of the traced graph with that value.
        """
        source = self.cutter.single[self.start]
        if isinstance(single, (tuple, list)):
            items = [self._captured_value(*pair, node) for pair in zip(single, double, strict=True)]
            return items if isinstance(single, list) else tuple(items)
        if isinstance(single, torch.device) and single == source.device:
            return self.graph.call_function(getattr, (self.copies[self.start], "device"))
        if isinstance(single, torch.dtype) and single == source.dtype:
            return self.graph.call_function(getattr, (self.copies[self.start], "dtype"))
        if isinstance(single, Tensor):
            return self._captured_tensor(single, double, node)
        if type(single) is int:
            if single != double:
                return self._multiple_of_batch(single, double, node)
            self.cutter.fixed.append(f"{describe_node(node)} is fixed")
            return single
        constants = (type(None), bool, float, str, torch.dtype, torch.device, slice)
        if single == double and isinstance(single, constants):
            return single
        raise self._error(node, f"comes from outside of it and is not a constant ({type(single).__name__})")

    def _multiple_of_batch(self, single: int, double: int, node: fx.Node) -> fx.Node:
        """Return a node that computes a number proportional to the batch size from the shape of ``start``."""
        source = self.cutter.single[self.start].shape
        assert source is not None
        if double != 2 * single:
            raise self._error(node, f"is {single} for {source[0]} samples and {double} for twice as many")
        shape = self.graph.call_function(getattr, (self.copies[self.start], "shape"))
        size = self.graph.call_function(operator.getitem, (shape, 0))
        if single == source[0]:
            return size
        return self.graph.call_function(
            operator.floordiv, (self.graph.call_function(operator.mul, (size, single)), source[0])
        )

    def _captured_tensor(self, single: Tensor, double: Tensor, node: fx.Node) -> fx.Node:
        """Return a node for a constant tensor, expanded along the batch if it is the same for all samples."""
        self.cutter.fixed.append(f"{describe_node(node)} is fixed")
        if single.shape == double.shape and torch.equal(single, double):
            return self._constant_tensor(single)
        sizes = zip(single.shape, double.shape, strict=True)
        differing = [i for i, (size, doubled) in enumerate(sizes) if size != doubled]
        if len(differing) == 1:
            (dim,) = differing
            row = single.narrow(dim, 0, 1)
            if torch.equal(row.expand_as(single), single) and torch.equal(row.expand_as(double), double):
                size = self._multiple_of_batch(single.shape[dim], double.shape[dim], node)
                expanded = [-1 if i != dim else size for i in range(single.ndim)]
                return self.graph.call_method("expand", (self._constant_tensor(row), *expanded))
        raise self._error(node, "comes from outside of it and is not the same for all samples")

    def _constant_tensor(self, tensor: Tensor) -> fx.Node:
        return self.graph.get_attr(self._attribute("constant", tensor.detach().clone()))
