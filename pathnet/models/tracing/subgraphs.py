"""A new graph that computes some nodes of a traced one, from one node's value and the context."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from pathnet.models.tracing.context_values import BatchSize, NotContext, OfStart, Read, reads_of
from pathnet.models.tracing.graphs import ancestors_of, copy_node, describe_node, is_inside

if TYPE_CHECKING:
    from pathnet.models.tracing.cutting import GraphCutter

__all__ = ["Subgraph"]


class Subgraph:
    """A new graph that computes some nodes of the traced one from ``start`` and the context.

    Attributes:
        attributes: the modules and tensors that the new graph refers to, by name.
        copies: the new node, or the constant, for each copied node of the traced graph.
    """

    def __init__(
        self, cutter: GraphCutter, name: str, start: fx.Node, ends: Sequence[fx.Node], scope: str | None
    ) -> None:
        self.cutter, self.name, self.start, self.scope = cutter, name, start, scope
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        needed, captured = self._needed(ends, self._computable(self._inside(ends)))
        self.x = self.graph.placeholder("x")
        names = dict.fromkeys(read.name for value in captured.values() for read in reads_of(value))
        self._placeholders = {name: self.graph.placeholder(name) for name in names}
        dim = cutter.batch_dim(start)
        self.copies: dict[fx.Node, Any] = {
            start: self.graph.call_method("movedim", (self.x, 0, dim)) if dim else self.x
        }
        for node, value in captured.items():
            self.copies[node] = self._rebuilt(value)
        for node in sorted(needed, key=cutter.index.__getitem__):
            self.copies[node] = copy_node(node, self.graph, self.copies, self.attributes, cutter.traced.attributes)

    def _inside(self, ends: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the nodes between ``start`` and the ends: those through which a gradient flows; or, if ``start`` is
        the input, those that depend on its values."""
        single, x_dependents = self.cutter.single, self.cutter.x_dependents
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
                    if parent is not self.start
                    and (parent in x_dependents if from_input else single[parent].differentiable)
                ]
        return inside

    def _computable(self, inside: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes that can be computed from ``start``, the nodes inside, and weights."""
        computable = {self.start, *inside}
        for node in self.cutter.traced.graph.nodes:
            may_be_copied = node.op != "placeholder" and node not in self.cutter.on_paths
            if may_be_copied and all(parent in computable for parent in node.all_input_nodes):
                computable.add(node)
        return computable

    def _needed(self, ends: Sequence[fx.Node], computable: set[fx.Node]) -> tuple[set[fx.Node], dict[fx.Node, Any]]:
        """Return the nodes to copy for ``ends``, and those to read from the context, with their values' structure."""
        computable = computable | self._weighted(ends, computable)
        needed: set[fx.Node] = set()
        captured: dict[fx.Node, Any] = {}
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node is self.start or node in needed or node in captured:
                continue
            if node not in computable:
                if node in self.cutter.stream or self.cutter.single[node].differentiable:
                    raise self._error(node, "is computed from the residual stream outside of it")
                try:
                    captured[node] = self.cutter.context.value(node, self.start)
                    continue
                except NotContext as error:
                    # Such as the numbers of all samples, which are computed from the batch size.
                    if not node.all_input_nodes:
                        raise self._error(node, str(error)) from None
            needed.add(node)
            pending += node.all_input_nodes
        return needed, captured

    def _weighted(self, ends: Sequence[fx.Node], computable: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes that the part alone uses and that apply weights of its module to the context."""
        if self.scope is None:
            return set()
        users = ancestors_of(ends, computable, self.start)
        exclusive: list[fx.Node] = []
        for node in reversed(self.cutter.traced.graph.nodes):
            if (
                node not in computable
                and node in self.cutter.weight_dependents
                and node not in self.cutter.stream
                and node.users
                and all(user in users for user in node.users)
                and (not self.scope or is_inside(node, self.scope))
            ):
                exclusive.append(node)
                users.add(node)
        weighted: set[fx.Node] = set()
        for node in reversed(exclusive):
            if any(parent in weighted or self.cutter.has_weights(parent) for parent in (node, *node.all_input_nodes)):
                weighted.add(node)
        return weighted

    def _error(self, node: fx.Node, why: str) -> ValueError:
        return ValueError(
            f"model: {self.name} needs {describe_node(node)}, which {why}; expected a part to need only the output "
            "of the one before it, the inputs, weights and constants; blocks= takes branches, (skip, residual), by "
            "hand"
        )

    def _rebuilt(self, value: Any) -> Any:
        """Return a constant, or a node of the new graph, for a value of the context."""
        if isinstance(value, (tuple, list)):
            items = [self._rebuilt(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, Read):
            return self._placeholders[value.name]
        if isinstance(value, OfStart):
            return self.graph.call_function(getattr, (self.x, value.attribute))
        if isinstance(value, BatchSize):
            shape = self.graph.call_function(getattr, (self.x, "shape"))
            return self.graph.call_function(operator.getitem, (shape, 0))
        return value
