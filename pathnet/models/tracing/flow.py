"""The flow of gradients through a traced graph: which operations are on every path, and the branches of additions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from pathnet.models.tracing.graphs import TracedGraph, ancestors_of, module_path, output_node
from pathnet.models.tracing.operations import CLONES, RESHAPES, feeds_a_sum, is_activation, operands_of, past_dropout
from pathnet.models.tracing.values import Observation

__all__ = ["GradientFlow", "Term"]


@dataclass(frozen=True)
class Term:
    """A summand: the value of ``node`` times ``factor``."""

    node: fx.Node
    factor: float = 1.0


class GradientFlow:
    """The nodes on paths from the source to the output of a graph.

    Args:
        observations: those of the graph's nodes, see `values.observe`.
        source: the node where the analysed gradients end.

    Attributes:
        nodes: those nodes, in the order in which they run.
        index: the position of each in ``nodes``.
        dominators: the nodes on every path, in order.
        holds_batch: whether a dimension of a node's value is the batch.
    """

    def __init__(
        self,
        traced: TracedGraph,
        observations: Mapping[fx.Node, Observation],
        source: fx.Node,
        holds_batch: Callable[[fx.Node], bool],
    ) -> None:
        self.attributes, self.observations, self.holds_batch = traced.attributes, observations, holds_batch
        output = output_node(traced.graph).args[0]
        if not isinstance(output, fx.Node) or not observations[output].differentiable:
            raise ValueError("model: its output does not depend on its input by differentiable operations")
        descendants = {source}
        for node in traced.graph.nodes:
            if observations[node].differentiable and any(parent in descendants for parent in node.all_input_nodes):
                descendants.add(node)
        between = ancestors_of([output], descendants)
        self.nodes = [node for node in traced.graph.nodes if node in between]
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.dominators = self._dominators()

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return [parent for parent in node.all_input_nodes if parent in self.index]

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.index]

    def _dominators(self) -> list[fx.Node]:
        """Return the nodes on every path, in order: those that no edge bypasses."""
        dominators, furthest = [], 0
        for i, node in enumerate(self.nodes):
            if furthest <= i:
                dominators.append(node)
            furthest = max([furthest, *(self.index[user] for user in self.users(node))])
        return dominators

    def terms(self, node: fx.Node, factor: float = 1.0) -> list[Term]:
        """Return the terms of a sum, with nested sums flattened; an empty list for any other operation."""
        operands = operands_of(node)
        if operands is None:
            return []
        terms: list[Term] = []
        for operand, coefficient in operands:
            if not isinstance(operand, fx.Node):
                if operand != 0:
                    return []
            elif operand not in self.index:
                return []
            else:
                inner = self.terms(past_dropout(operand), factor * coefficient) if len(operand.users) == 1 else []
                terms += inner or [Term(operand, factor * coefficient)]
        return terms

    def branch_parameters(self, term: Term, source: fx.Node) -> dict[nn.Parameter, str]:
        """Return the parameters of a branch, each with the name of the layer that holds it."""
        branch = ancestors_of([term.node], self.index, source)
        parameters: dict[nn.Parameter, str] = {}
        pending, visited = sorted(branch, key=self.index.__getitem__, reverse=True), set(branch)
        while pending:
            node = pending.pop()
            if node.op in ("call_module", "get_attr"):
                target, attribute = str(node.target), self.attributes[str(node.target)]
                named = attribute.named_parameters() if isinstance(attribute, nn.Module) else [("", attribute)]
                for name, parameter in named:
                    if isinstance(parameter, nn.Parameter):
                        parameters[parameter] = f"{target}.{name}".rstrip(".").rpartition(".")[0]
            # Weights may reach the branch through operations that do not depend on the input.
            constants = [
                parent for parent in node.all_input_nodes if parent not in self.index and parent not in visited
            ]
            visited.update(constants)
            pending += constants
        return parameters

    def branch_matrices(self, term: Term, source: fx.Node) -> dict[nn.Parameter, str]:
        """Return the weight matrices of a branch, as `branch_parameters` does."""
        parameters = self.branch_parameters(term, source)
        return {parameter: layer for parameter, layer in parameters.items() if parameter.ndim > 1}

    def branch_size(self, term: Term, source: fx.Node) -> tuple[int, int, int]:
        """Return the number of weight matrices, parameters and operations of a branch."""
        parameters = self.branch_parameters(term, source)
        operations = len(ancestors_of([term.node], self.index, source))
        return sum(p.ndim > 1 for p in parameters), sum(p.numel() for p in parameters), operations

    def split(self, addition: fx.Node, source: fx.Node) -> tuple[Term, tuple[Term, ...]] | None:
        """Return the skip and the residual terms of an addition, or None if no branch has weights.

        Args:
            source: the node where all its branches begin.
        """
        terms = self.terms(addition)
        if len({term.node for term in terms}) < 2:
            return None
        sizes = [self.branch_size(term, source) for term in terms]
        if max(parameters for _, parameters, _ in sizes) == 0:
            return None
        lightest = min(range(len(terms)), key=sizes.__getitem__)
        return terms[lightest], (*terms[:lightest], *terms[lightest + 1 :])

    def modules(self, addition: fx.Node, source: fx.Node, residual: Sequence[Term]) -> tuple[tuple[Term, ...], ...]:
        """Return the residual terms of an addition by residual modules in parallel, in the order in which they run.

        Sums inside a submodule, such as that of a low-rank adapter, are one module, and so are terms that share
        weight matrices, or have no weights.
        """
        operands = self._operands(addition)
        groups: list[tuple[set[fx.Node], set[nn.Parameter], list[Term]]] = []
        for term in residual:
            of_term = {operands[term.node]}, set(self.branch_matrices(term, source)), [term]
            for group in list(groups):
                weightless = not group[1] or not of_term[1]
                if group[0] & of_term[0] or group[1] & of_term[1] or weightless:
                    groups.remove(group)
                    of_term = group[0] | of_term[0], group[1] | of_term[1], [*group[2], *of_term[2]]
            groups.append(of_term)
        order = {term: i for i, term in enumerate(residual)}
        modules = (tuple(sorted(terms, key=order.__getitem__)) for _, _, terms in groups)
        return tuple(sorted(modules, key=lambda terms: min(self.index[term.node] for term in terms)))

    def _operands(self, addition: fx.Node) -> dict[fx.Node, fx.Node]:
        """Return for each term of an addition the operand, in the addition's own module, that it is a part of."""
        operands: dict[fx.Node, fx.Node] = {}

        def visit(node: fx.Node, part: fx.Node | None) -> None:
            for operand, _ in operands_of(node) or ():
                if not isinstance(operand, fx.Node):
                    continue
                inner = past_dropout(operand)
                if len(operand.users) == 1 and self.terms(inner):
                    outside = module_path(inner) != module_path(addition)
                    visit(inner, operand if part is None and outside else part)
                else:
                    operands[operand] = part or operand

        visit(addition, None)
        return operands

    def is_sum_of_classifiers(self, addition: fx.Node, source: fx.Node) -> bool:
        """Return whether an addition at the end of the network adds outputs of single linear layers, as the head of a
        distilled DeiT does."""
        following = self.nodes[self.index[addition] + 1 :]
        if any(self._has_weights(node) or is_activation(node, self.attributes) for node in following):
            return False
        for term in self.terms(addition):
            branch = ancestors_of([term.node], self.index, source)
            matrices = [parameter.ndim for parameter in self.branch_matrices(term, source)]
            if matrices != [2] or any(is_activation(node, self.attributes) for node in branch):
                return False
        return True

    def _has_weights(self, node: fx.Node) -> bool:
        attribute = self.attributes.get(str(node.target))
        of_parents = (self.attributes.get(str(parent.target)) for parent in node.all_input_nodes)
        is_weighted = isinstance(attribute, nn.Module) and any(True for _ in attribute.parameters())
        return is_weighted or any(isinstance(value, nn.Parameter) for value in of_parents)

    def block_end(self, position: int) -> int:
        """Return the position in the chain of the last node of the block whose addition is at ``position``.

        That is the activation right after the addition, or the addition; or, if the addition works on samples laid
        end to end, the reshape that makes the batch the first dimension again.
        """
        end, following = position, position + 1
        while following < len(self.dominators) and self.dominators[following].target in CLONES:
            following += 1
        if following < len(self.dominators) and is_activation(self.dominators[following], self.attributes):
            end = following
        while (
            end + 1 < len(self.dominators)
            and not self.holds_batch(self.dominators[end])
            and self.dominators[end + 1].target in RESHAPES
        ):
            end += 1
        return end

    def bypassed_additions(self, left: fx.Node, right: fx.Node) -> list[fx.Node]:
        """Return the additions between two dominators that would be residual connections if nothing bypassed them."""
        inside = self.nodes[self.index[left] + 1 : self.index[right]]
        bypassed = []
        for node in inside:
            adds = len({term.node for term in self.terms(node)}) > 1
            if not adds or feeds_a_sum(node):
                continue
            ancestors = ancestors_of([node], self.index, left) | {left}
            ordered = [
                parent for parent in self.nodes[self.index[left] : self.index[node] + 1] if parent in ancestors
            ]
            source = _immediate_dominator(ordered, self)
            between = ancestors_of([node], self.index, source) | {source}
            # The source itself may be bypassed: inputs of blocks that are concatenated later on.
            closed = all(user in between for branch in between - {node, source} for user in self.users(branch))
            if closed and self.split(node, source) is not None:
                bypassed.append(node)
        return bypassed


def _immediate_dominator(ordered: Sequence[fx.Node], flow: GradientFlow) -> fx.Node:
    """Return the last node before the end that every path from the first to the last of ``ordered`` passes."""
    index = {node: i for i, node in enumerate(ordered)}
    furthest, last = 0, ordered[0]
    for i, node in enumerate(ordered[:-1]):
        if furthest <= i:
            last = node
        furthest = max([furthest, *(index[user] for user in flow.users(node) if user in index)])
    return last
