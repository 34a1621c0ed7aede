"""Residual connections of a traced graph: additions on every path, whose branches begin at a node on every path.

The operations through which a gradient flows from the network's output to its input form a directed acyclic graph.
The operations on every path from input to output, its dominators, form a chain. An addition in that chain joins
branches that begin at the previous dominator if all its operands depend on it: ``y = s(x) + f(x)``, and nothing
bypasses it. Additions inside a branch (a polynomial GELU, a rotary embedding) are not in the chain. A subtraction is
the addition of a branch with its sign flipped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from pathnet.checks import listed
from pathnet.models.tracing.flow import GradientFlow, Term
from pathnet.models.tracing.graphs import ancestors_of, describe_node
from pathnet.models.tracing.operations import CONCATENATIONS

__all__ = ["Connection", "LedAroundError", "connections"]


@dataclass(frozen=True)
class Connection:
    """A residual connection of the graph.

    Attributes:
        source: the node where both branches begin.
        skip: the term that is the skip connection; its node is ``source`` itself for the identity.
        residual: the other terms, in order.
        modules: the residual terms of each residual module in parallel.
        addition: the node that adds them.
        end: the last node of the block: the addition, the activation after it, or the reshape that makes the batch
            the first dimension again.
        nested: number of additions inside the branches that would be residual connections without a bypass.
    """

    source: fx.Node
    skip: Term
    residual: tuple[Term, ...]
    modules: tuple[tuple[Term, ...], ...]
    addition: fx.Node
    end: fx.Node
    nested: int


class LedAroundError(ValueError):
    """A value leads around residual connections, as an encoder's output does around its decoder's."""


def connections(flow: GradientFlow, within: Collection[fx.Node] | None = None) -> list[Connection]:
    """Return the residual connections of a graph, from input to output.

    Args:
        within: the nodes among which additions are considered; None for all.

    Raises:
        ValueError: there is none; or some additions would be residual connections but are bypassed, for example by a
            concatenation.
    """
    chain = flow.dominators
    residual_connections: list[Connection] = []
    last_end = 0
    for position in range(1, len(chain)):
        addition, previous = chain[position], chain[position - 1]
        if position <= last_end or (within is not None and addition not in within):
            continue
        branches = flow.split(addition, previous)
        if branches is None or flow.is_sum_of_classifiers(addition, previous):
            continue
        if within is None:
            _check_skip(flow, previous, addition, *branches)
        _check_apart(flow, addition, previous, *branches)
        last_end = flow.block_end(position)
        nested = len(flow.bypassed_additions(previous, addition))
        modules = flow.modules(addition, previous, branches[1])
        residual_connections.append(Connection(previous, *branches, modules, addition, chain[last_end], nested))
    if within is None:
        _check_no_bypass(flow, residual_connections)
    if not residual_connections and within is not None:
        raise ValueError("blocks: no addition in them is a residual connection, which every route must pass")
    if not residual_connections:
        raise ValueError(f"model: no residual connection was found{_reason(flow)}")
    return residual_connections


def _check_skip(flow: GradientFlow, source: fx.Node, addition: fx.Node, skip: Term, residual: Sequence[Term]) -> None:
    """Raise ValueError if the skip holds residual connections, and the other branches read its end and the source."""
    if skip.node is source or skip.node not in ancestors_of([term.node for term in residual], flow.index, source):
        return
    inside = ancestors_of([skip.node], flow.index, source)
    led_around = [node for node in flow.bypassed_additions(source, addition) if node in inside]
    if led_around:
        raise LedAroundError(
            f"model: the output of {describe_node(source)} leads around "
            f"{_from_one_on(led_around)}, up to {describe_node(addition)}, as an encoder's output does around "
            "its decoder's: expected stream=, the name of the decoder or of the encoder (a submodule or an input); "
            "the other is then context"
        )


def _check_apart(
    flow: GradientFlow, addition: fx.Node, source: fx.Node, skip: Term, residual: Sequence[Term]
) -> None:
    """Raise ValueError if the skip connection and the residual module of a block share weight matrices."""
    of_skip = flow.branch_matrices(skip, source)
    of_residual = {parameter for term in residual for parameter in flow.branch_matrices(term, source)}
    shared = list(dict.fromkeys(layer for parameter, layer in of_skip.items() if parameter in of_residual))
    if shared:
        raise ValueError(
            f"model: expected branches with weights of their own, got the layers {listed(shared)} in both the skip "
            f"connection and the residual module that meet at {describe_node(addition)}; blocks= takes the names of "
            "modules whose additions are blocks"
        )


def _check_no_bypass(flow: GradientFlow, residual_connections: Sequence[Connection]) -> None:
    """Raise ValueError if additions between two dominators would be residual connections but for a bypass."""
    additions = {connection.addition for connection in residual_connections}
    for left, right in zip(flow.dominators, flow.dominators[1:], strict=False):
        if right not in additions and (bypassed := flow.bypassed_additions(left, right)):
            predicate = "are not residual connections, since other paths bypass them"
            if len(bypassed) == 1:
                predicate = "is not a residual connection, since other paths bypass it"
            raise ValueError(
                f"model: {_from_one_on(bypassed)} {predicate} up to {_joining_operation(right)} at "
                f"{describe_node(right)} (as an encoder's output leads around its decoder's additions: stream= names "
                "the encoder or the decoder, and the other is context); blocks= takes the names of modules whose "
                "additions are"
            )


def _reason(flow: GradientFlow) -> str:
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
    return "; its operations are one chain"


def _from_one_on(additions: Sequence[fx.Node]) -> str:
    """Return some additions in words: their number, and the first of them."""
    first = describe_node(additions[0])
    return first if len(additions) == 1 else f"{len(additions)} additions from {first} on"


def _joining_operation(node: fx.Node) -> str:
    return "a concatenation" if node.target in CONCATENATIONS else "an operation that adds no two branches"
