"""Residual connections of a traced graph: additions on every path, whose branches begin at a node on every path.

The operations through which a gradient flows from the network's output to its input form a directed acyclic graph.
The operations on every path from input to output, its dominators, form a chain. An addition in that chain joins
branches that begin at the previous dominator if all its operands depend on it: ``y = s(x) + f(x)``, and nothing
bypasses it. Additions inside a branch (a polynomial GELU, a rotary embedding) are not in the chain. A subtraction is
the addition of a branch with its sign flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from pathnet.models.tracing.graphs import TracedGraph, describe_node, output_node
from pathnet.models.tracing.operations import CLONES, CONCATENATIONS, RESHAPES, is_activation, operands_of
from pathnet.models.tracing.values import Observation

__all__ = ["Connection", "Term", "connections"]


@dataclass(frozen=True)
class Term:
    """A summand: the value of ``node`` times ``factor``."""

    node: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Connection:
    """A residual connection of the graph.

    Attributes:
        source: the node where both branches begin.
        skip: the term that is the skip connection; its node is ``source`` itself for the identity.
        residual: the other terms, in order.
        addition: the node that adds them.
        end: the last node of the block: the addition, the activation after it, or the reshape that makes the batch
            the first dimension again.
        nested: number of additions inside the branches that would be residual connections without a bypass.
    """

    source: fx.Node
    skip: Term
    residual: tuple[Term, ...]
    addition: fx.Node
    end: fx.Node
    nested: int


class _GradientFlow:
    """The nodes on paths from the source to the output of a graph.

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
        between = self.ancestors([output], descendants)
        self.nodes = [node for node in traced.graph.nodes if node in between]
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.dominators = self._dominators()

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return [parent for parent in node.all_input_nodes if parent in self.index]

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.index]

    def ancestors(
        self, ends: Sequence[fx.Node], within: Collection[fx.Node], start: fx.Node | None = None
    ) -> set[fx.Node]:
        """Return the ends and their ancestors among ``within``, back to ``start``, which is not included."""
        ancestors: set[fx.Node] = set()
        pending = [end for end in ends if end is not start]
        while pending:
            node = pending.pop()
            if node not in ancestors:
                ancestors.add(node)
                pending += [parent for parent in node.all_input_nodes if parent in within and parent is not start]
        return ancestors

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
                inner = self.terms(operand, factor * coefficient) if len(operand.users) == 1 else []
                terms += inner or [Term(operand, factor * coefficient)]
        return terms

    def branch_size(self, term: Term, source: fx.Node) -> tuple[int, int, int]:
        """Return the number of weight matrices, parameters and operations of a branch."""
        branch = self.ancestors([term.node], self.index, source)
        parameters: dict[nn.Parameter, None] = {}
        pending, visited = list(branch), set(branch)
        while pending:
            node = pending.pop()
            if node.op in ("call_module", "get_attr"):
                attribute = self.attributes[str(node.target)]
                tensors = attribute.parameters() if isinstance(attribute, nn.Module) else [attribute]
                parameters |= dict.fromkeys(p for p in tensors if isinstance(p, nn.Parameter))
            # Weights may reach the branch through operations that do not depend on the input.
            constants = [
                parent for parent in node.all_input_nodes if parent not in self.index and parent not in visited
            ]
            visited.update(constants)
            pending += constants
        return sum(p.ndim > 1 for p in parameters), sum(p.numel() for p in parameters), len(branch)

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
            is_part_of_a_sum = len(node.users) == 1 and operands_of(next(iter(node.users))) is not None
            if not adds or is_part_of_a_sum:
                continue
            ancestors = self.ancestors([node], self.index, left) | {left}
            ordered = [
                parent for parent in self.nodes[self.index[left] : self.index[node] + 1] if parent in ancestors
            ]
            source = _immediate_dominator(ordered, self)
            between = self.ancestors([node], self.index, source) | {source}
            # The source itself may be bypassed: inputs of blocks that are concatenated later on.
            closed = all(user in between for branch in between - {node, source} for user in self.users(branch))
            if closed and self.split(node, source) is not None:
                bypassed.append(node)
        return bypassed


def _immediate_dominator(ordered: Sequence[fx.Node], flow: _GradientFlow) -> fx.Node:
    """Return the last node before the end that every path from the first to the last of ``ordered`` passes."""
    index = {node: i for i, node in enumerate(ordered)}
    furthest, last = 0, ordered[0]
    for i, node in enumerate(ordered[:-1]):
        if furthest <= i:
            last = node
        furthest = max([furthest, *(index[user] for user in flow.users(node) if user in index)])
    return last


def connections(
    traced: TracedGraph,
    observations: Mapping[fx.Node, Observation],
    source: fx.Node,
    holds_batch: Callable[[fx.Node], bool],
    within: Collection[fx.Node] | None = None,
) -> list[Connection]:
    """Return the residual connections of a graph, from input to output.

    Args:
        observations: those of the graph's nodes, see `values.observe`.
        source: the node where the analysed gradients end.
        holds_batch: whether a dimension of a node's value is the batch.
        within: the nodes among which additions are considered; None for all.

    Raises:
        ValueError: there is none; or some additions would be residual connections but are bypassed, for example by a
            concatenation.
    """
    flow = _GradientFlow(traced, observations, source, holds_batch)
    chain = flow.dominators
    residual_connections: list[Connection] = []
    last_end = 0
    for position in range(1, len(chain)):
        addition, previous = chain[position], chain[position - 1]
        if position <= last_end or (within is not None and addition not in within):
            continue
        branches = flow.split(addition, previous)
        if branches is None:
            continue
        last_end = flow.block_end(position)
        nested = len(flow.bypassed_additions(previous, addition))
        residual_connections.append(Connection(previous, *branches, addition, chain[last_end], nested))
    if within is None:
        _check_no_bypass(flow, residual_connections)
    if not residual_connections and within is not None:
        raise ValueError("blocks: no addition in them is a residual connection, which every route must pass")
    if not residual_connections:
        raise ValueError(f"model: no residual connection was found{_reason(flow)}")
    return residual_connections


def _check_no_bypass(flow: _GradientFlow, residual_connections: Sequence[Connection]) -> None:
    """Raise ValueError if additions between two dominators would be residual connections but for a bypass."""
    additions = {connection.addition for connection in residual_connections}
    for left, right in zip(flow.dominators, flow.dominators[1:], strict=False):
        if right not in additions and (bypassed := flow.bypassed_additions(left, right)):
            raise ValueError(
                f"model: {len(bypassed)} additions from {describe_node(bypassed[0])} on are not residual "
                f"connections, since other paths bypass them up to {_joining_operation(right)} at "
                f"{describe_node(right)} (as an encoder's output does in a decoder: stream= names the encoder or the "
                "decoder, and the rest is context); blocks= takes the names of modules whose additions are"
            )


def _reason(flow: _GradientFlow) -> str:
    """Return why a graph has no residual connection, as the end of a sentence."""
    for node in flow.nodes:
        if node.target in CONCATENATIONS and len(flow.inputs(node)) > 1:
            place = describe_node(node)
            return f"; at {place} its paths are joined by concatenation (dense connections), not by addition"
    for left, right in zip(flow.dominators, flow.dominators[1:], strict=False):
        if len(flow.inputs(right)) > 1 or left not in flow.inputs(right):
            return (
                f"; its paths are joined at {describe_node(right)}, where a sum or difference of branches was "
                "expected; blocks= takes each block's branches, (skip, residual), by hand"
            )
    return ", its operations are one chain"


def _joining_operation(node: fx.Node) -> str:
    return "a concatenation" if node.target in CONCATENATIONS else "an operation that adds no two branches"
