"""Parts of a graph as modules: functions of one tensor and the context, over the model's own modules and weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from pathnet.models.tracing.context_values import ContextCollector
from pathnet.models.tracing.flow import Term
from pathnet.models.tracing.graphs import TracedGraph, describe_node, output_node, placeholders
from pathnet.models.tracing.operations import CLONES
from pathnet.models.tracing.subgraphs import Subgraph
from pathnet.models.tracing.values import Observation, Source, batch_dim_of, value_dependents

__all__ = ["GraphCutter"]


class GraphCutter:
    """Cutter of parts out of a graph.

    A part computes what depends on the values at its start. Other values that it reads, such as sizes, masks, rotary
    factors and conditioning vectors, are context: a graph of their own computes them from the model's inputs. Two
    observations of the graph tell which dimension holds the batch: the second is for the example repeated twice.

    Attributes:
        single, double: the observations of each node for the example, and for the example repeated twice.
        stream: the nodes that depend on the values of the residual stream from the first block on.
        fixed: why the parts take only inputs of the example's shape, batch apart.
        on_paths: the nodes through which gradients flow to the source from the output.
    """

    def __init__(
        self,
        traced: TracedGraph,
        single: Mapping[fx.Node, Observation],
        double: Mapping[fx.Node, Observation],
        source: Source,
        batch: int,
        y0: fx.Node,
    ) -> None:
        self.traced, self.single, self.double, self.batch = traced, single, double, batch
        self.start = placeholders(traced.graph)[source.x]
        self.stream = value_dependents(traced.graph, y0)
        self.x_dependents = value_dependents(traced.graph, self.start, source.node)
        self.weight_dependents = self._weight_dependents()
        self.index = {node: i for i, node in enumerate(traced.graph.nodes)}
        self.context = ContextCollector(traced, single, double, batch)
        self.fixed: list[str] = []
        self.on_paths = self._on_paths()

    def _on_paths(self) -> set[fx.Node]:
        """Return the nodes through which gradients flow to the source from the output."""
        on_paths: set[fx.Node] = set()
        pending = output_node(self.traced.graph).all_input_nodes
        while pending:
            node = pending.pop()
            if node not in on_paths and self.single[node].differentiable:
                on_paths.add(node)
                pending += node.all_input_nodes
        return on_paths

    def _weight_dependents(self) -> set[fx.Node]:
        """Return the nodes that depend on the values of weights."""
        return value_dependents(self.traced.graph, *filter(self.has_weights, self.traced.graph.nodes))

    def has_weights(self, node: fx.Node) -> bool:
        """Return whether an operation is a module with weights, or a weight itself."""
        attribute = self.traced.attributes[str(node.target)] if node.op in ("call_module", "get_attr") else None
        if isinstance(attribute, nn.Module):
            return any(True for _ in attribute.parameters())
        return isinstance(attribute, nn.Parameter)

    def batch_dim(self, node: fx.Node) -> int | None:
        """Return the dimension of a node's value that holds the batch; None if none does."""
        return batch_dim_of(self.single[node], self.double[node], self.batch)

    def shape_of_sample(self, node: fx.Node) -> torch.Size:
        """Return the shape of a node's value for the example, without the batch."""
        dim = self.batch_dim(node) or 0
        return torch.Size(size for i, size in enumerate(self._shape(node)) if i != dim)

    def check_batch(self, node: fx.Node) -> None:
        """Check that a dimension of a node's value is the batch.

        Raises:
            ValueError: none is.
        """
        if self.batch_dim(node) is None:
            shape = self.single[node].shape
            got = type(self.single[node].value).__name__ if shape is None else list(shape)
            raise ValueError(
                f"model: expected the batch in one dimension ({self.batch}) between blocks, got {got} from "
                f"{describe_node(node)}"
            )

    def cut(
        self,
        name: str,
        start: fx.Node,
        terms: Sequence[Term],
        shape: torch.Size | None = None,
        scope: str | None = None,
        is_output: bool = False,
    ) -> fx.GraphModule | None:
        """Return the sum of ``terms`` as a function of ``start`` and context, the batch first; None for the identity.

        Args:
            name: the part's name in errors.
            shape: the shape to broadcast the sum to; None for its own.
            scope: the module that the part belongs to; its weights there that only the part uses belong to it even
                if they act on the context. None for no such module.
            is_output: whether the sum is the model's output, whose dimensions stay as they are.

        Raises:
            ValueError: the part needs a value of the residual stream that its start does not give.
        """
        sum_shape = _broadcast([self._shape(term.node) for term in terms])
        broadcasts = shape is not None and shape != sum_shape
        changes = broadcasts or len(terms) > 1 or terms[0].factor != 1 or (is_output and self.batch_dim(start))
        if not changes and self._is_identity(start, terms[0].node):
            return None
        subgraph = Subgraph(self, name, start, [term.node for term in terms], scope)
        subgraph.graph.output(self._total(subgraph, terms, shape, is_output))
        return fx.GraphModule(subgraph.attributes, subgraph.graph)

    def _total(
        self, subgraph: Subgraph, terms: Sequence[Term], shape: torch.Size | None, is_output: bool = False
    ) -> fx.Node:
        """Return the node of the sum of ``terms`` in a part, broadcast to ``shape``, the batch first."""
        total: fx.Node | None = None
        for term in terms:
            value = subgraph.copies[term.node]
            if term.factor != 1:
                value = subgraph.graph.call_function(operator.mul, (value, term.factor))
            total = value if total is None else subgraph.graph.call_function(operator.add, (total, value))
        assert total is not None
        if shape is not None and shape != _broadcast([self._shape(term.node) for term in terms]):
            batch_dim = self.batch_dim(terms[0].node) or 0
            sizes = [-1 if i == batch_dim else size for i, size in enumerate(shape)]
            total = subgraph.graph.call_method("expand", (total, *sizes))
            self.fixed.append("a branch is broadcast")
        dim = next(filter(None, (self.batch_dim(term.node) for term in terms)), 0)
        if dim and not is_output:
            total = subgraph.graph.call_method("movedim", (total, dim, 0))
        return total

    def cut_apart(
        self,
        name: str,
        start: fx.Node,
        sums: Sequence[Sequence[Term]],
        shape: torch.Size,
        scope: str | None = None,
    ) -> fx.GraphModule:
        """Return several sums of terms, each broadcast to ``shape``, as one function to a tuple; see `cut`.

        What they share is computed once.
        """
        subgraph = Subgraph(self, name, start, [term.node for terms in sums for term in terms], scope)
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
