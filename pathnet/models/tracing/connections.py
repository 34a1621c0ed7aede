"""Which additions of a graph are residual connections: those that everything passes, as it does their source.

The operations through which a gradient flows from the network's input to its output are a directed acyclic graph.
What every way through it passes is a chain of operations, its cut vertices. An addition of that chain whose operands
both depend on the operation before it in the chain (their immediate dominator) joins branches that begin there and
end here, so that ``y = s(x) + f(x)`` with nothing led around it. Additions inside a branch (a polynomial GELU, a
rotary embedding) are not on the chain. A subtraction is the addition of a branch with its sign changed.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pathnet.models.tracing.graphs import Traced, where
from pathnet.models.tracing.values import Fact

__all__ = ["Connection", "Term", "connections", "is_activation", "is_relu"]

aten = torch.ops.aten

ADDITIONS = {operator.add, torch.add, aten.add.Tensor, "add", "__add__"}
SUBTRACTIONS = {operator.sub, torch.sub, torch.subtract, aten.sub.Tensor, "sub", "subtract", "__sub__"}
REVERSED = {torch.rsub, aten.rsub.Tensor, "__rsub__"}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate, torch.hstack, torch.vstack, aten.cat.default}
CLONES = {torch.clone, aten.clone.default}
RESHAPES = {"view", "reshape", torch.reshape, aten.view.default, aten.reshape.default}

RELUS = {torch.relu, F.relu, aten.relu.default}
ACTIVATIONS = RELUS | {torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu}
ACTIVATIONS |= {F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh, F.softsign, F.logsigmoid}
ACTIVATIONS |= {
    getattr(aten, name).default
    for name in ("sigmoid", "tanh", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardswish", "hardtanh")
}
METHODS = {"relu", "sigmoid", "tanh"}
MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus)
MODULES += (nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.Sigmoid, nn.Tanh)  # type: ignore[assignment]


@dataclass(frozen=True)
class Term:
    """A summand: ``factor`` times what ``node`` gives."""

    node: fx.Node
    factor: float = 1.0


@dataclass(frozen=True)
class Connection:
    """A residual connection of the graph.

    Attributes:
        source: what both branches begin with.
        skip: the summand that is the skip connection; ``source`` itself where it is the identity.
        residual: the other summands, in order.
        addition: what adds them.
        end: the activation behind the addition, or the addition, or what brings the batch back to the front.
        nested: how many additions inside the branches would be residual connections if nothing led around them.
    """

    source: fx.Node
    skip: Term
    residual: tuple[Term, ...]
    addition: fx.Node
    end: fx.Node
    nested: int


class _Flow:
    """The operations on ways from the source to the output."""

    def __init__(self, traced: Traced, facts: Mapping[fx.Node, Fact], source: fx.Node) -> None:
        self.held, self.facts = traced.held, facts
        (result,) = (node for node in traced.graph.nodes if node.op == "output")
        self.output = result.args[0]
        if not isinstance(self.output, fx.Node) or not facts[self.output].dependent:
            raise ValueError("model: its output does not depend on its input by differentiable operations")
        behind = {source}
        for node in traced.graph.nodes:
            if facts[node].dependent and any(own in behind for own in node.all_input_nodes):
                behind.add(node)
        wanted = self.backwards([self.output], behind)
        self.nodes = [node for node in traced.graph.nodes if node in wanted]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.batch = (facts[source].shape or torch.Size())[:1]
        self.chain = self._chain()

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return [own for own in node.all_input_nodes if own in self.place]

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.place]

    def backwards(
        self, ends: Sequence[fx.Node], within: Collection[fx.Node], start: fx.Node | None = None
    ) -> set[fx.Node]:
        """The ends, and what of ``within`` leads to them from ``start``, which is left out."""
        found: set[fx.Node] = set()
        waiting = [end for end in ends if end is not start]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [own for own in node.all_input_nodes if own in within and own is not start]
        return found

    def _chain(self) -> list[fx.Node]:
        """What all ways pass, in order: no edge leads around it."""
        chain, furthest = [], 0
        for i, node in enumerate(self.nodes):
            if furthest <= i:
                chain.append(node)
            furthest = max([furthest, *(self.place[user] for user in self.users(node))])
        return chain

    def terms(self, node: fx.Node, factor: float = 1.0) -> list[Term]:
        """What an addition adds up, sums of sums taken apart; nothing of another operation."""
        added = _operands(node)
        if added is None:
            return []
        terms: list[Term] = []
        for operand, own in added:
            if not isinstance(operand, fx.Node):
                if operand != 0:
                    return []
            elif operand not in self.place:
                return []
            else:
                inner = self.terms(operand, factor * own) if len(operand.users) == 1 else []
                terms += inner or [Term(operand, factor * own)]
        return terms

    def weight(self, term: Term, source: fx.Node) -> tuple[int, int, int]:
        """How much a branch is: layers with weight matrices, parameters, operations."""
        branch = self.backwards([term.node], self.place, source)
        parameters: dict[nn.Parameter, None] = {}
        waiting, met = list(branch), set(branch)
        while waiting:
            node = waiting.pop()
            if node.op in ("call_module", "get_attr"):
                own = self.held[str(node.target)]
                found = own.parameters() if isinstance(own, nn.Module) else [own]
                parameters |= dict.fromkeys(p for p in found if isinstance(p, nn.Parameter))
            fixed = [own for own in node.all_input_nodes if own not in self.place and own not in met]
            met.update(fixed)
            waiting += fixed
        return sum(p.ndim > 1 for p in parameters), sum(p.numel() for p in parameters), len(branch)

    def residual(self, addition: fx.Node, source: fx.Node) -> tuple[Term, tuple[Term, ...]] | None:
        """The skip and the residual module of an addition whose operands' common source is given, if there are
        weights in it."""
        terms = self.terms(addition)
        if len({term.node for term in terms}) < 2:
            return None
        weights = [self.weight(term, source) for term in terms]
        if max(parameters for _, parameters, _ in weights) == 0:
            return None
        lightest = min(range(len(terms)), key=weights.__getitem__)
        return terms[lightest], (*terms[:lightest], *terms[lightest + 1 :])

    def end(self, position: int) -> int:
        """The place in the chain of the activation right behind an addition at ``position``, or of the addition; or
        of what makes the batch the first dimension again, where the addition is one of samples laid end to end."""
        end, behind = position, position + 1
        while behind < len(self.chain) and self.chain[behind].target in CLONES:
            behind += 1
        if behind < len(self.chain) and is_activation(self.chain[behind], self.held):
            end = behind
        while (
            end + 1 < len(self.chain)
            and self.facts[self.chain[end]].shape[:1] != self.batch  # type: ignore[index]
            and self.chain[end + 1].target in RESHAPES
        ):
            end += 1
        return end

    def inner(self, left: fx.Node, right: fx.Node) -> list[fx.Node]:
        """The additions between two operations of the chain that would be residual connections, were it not for what
        leads around them."""
        inside = self.nodes[self.place[left] + 1 : self.place[right]]
        found = []
        for node in inside:
            adds = len({term.node for term in self.terms(node)}) > 1
            is_part_of_a_sum = len(node.users) == 1 and _operands(next(iter(node.users))) is not None
            if not adds or is_part_of_a_sum:
                continue
            to_here = self.backwards([node], self.place, left) | {left}
            ordered = [own for own in self.nodes[self.place[left] : self.place[node] + 1] if own in to_here]
            source = _last_passed(ordered, self)
            between = self.backwards([node], self.place, source) | {source}
            # Ways may lead around the source: blocks whose input is concatenated later on.
            closed = all(user in between for own in between - {node, source} for user in self.users(own))
            if closed and self.residual(node, source) is not None:
                found.append(node)
        return found


def _last_passed(ordered: Sequence[fx.Node], flow: _Flow) -> fx.Node:
    """The last before the end of what all ways from the first to the last of ``ordered`` pass."""
    place = {node: i for i, node in enumerate(ordered)}
    furthest, last = 0, ordered[0]
    for i, node in enumerate(ordered[:-1]):
        if furthest <= i:
            last = node
        furthest = max([furthest, *(place[user] for user in flow.users(node) if user in place)])
    return last


def connections(
    traced: Traced, facts: Mapping[fx.Node, Fact], source: fx.Node, within: Collection[fx.Node] | None = None
) -> list[Connection]:
    """The residual connections of a graph, from input to output.

    Args:
        facts: of the graph's operations, see `values.observe`.
        source: where the gradients that count begin.
        within: the operations among which additions are taken; None for all.

    Raises:
        ValueError: there is none; or what looks like some is bypassed, such as by a concatenation.
    """
    flow = _Flow(traced, facts, source)
    found: list[Connection] = []
    behind = 0
    for position in range(1, len(flow.chain)):
        addition, before = flow.chain[position], flow.chain[position - 1]
        if position <= behind or (within is not None and addition not in within):
            continue
        branches = flow.residual(addition, before)
        if branches is None:
            continue
        behind = flow.end(position)
        nested = len(flow.inner(before, addition))
        found.append(Connection(before, *branches, addition, flow.chain[behind], nested))
    added = {connection.addition for connection in found}
    for left, right in zip(flow.chain, flow.chain[1:], strict=False):
        if right in added or within is not None:
            continue
        bypassed = flow.inner(left, right)
        if bypassed:
            raise ValueError(
                f"model: {len(bypassed)} additions from {where(bypassed[0])} on are no residual connections, since "
                f"other ways lead around them, which {_joined(right)} joins again at {where(right)}; blocks= takes "
                "the names of modules whose additions are"
            )
    if not found and within is not None:
        raise ValueError("blocks: no addition in them is a residual connection, which every way passes")
    if not found:
        raise ValueError(f"model: no residual connection was found{_reason(flow)}")
    return found


def _reason(flow: _Flow) -> str:
    for node in flow.nodes:
        if node.target in CONCATENATIONS and len(flow.inputs(node)) > 1:
            return f"; at {where(node)} its ways are joined by concatenation (dense connections), not by addition"
    for left, right in zip(flow.chain, flow.chain[1:], strict=False):
        if len(flow.inputs(right)) > 1 or left not in flow.inputs(right):
            return (
                f"; its ways are joined at {where(right)}, where the sum or difference of branches was expected; "
                "blocks= takes each block's branches, (skip, residual), by hand"
            )
    return ", its operations are one chain"


def _joined(node: fx.Node) -> str:
    return "a concatenation" if node.target in CONCATENATIONS else "an operation that is no addition of two branches"


def _operands(node: fx.Node) -> list[tuple[Any, float]] | None:
    """What an addition or subtraction adds up, each with its factor, or None of another operation."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS | SUBTRACTIONS | REVERSED:
        return None
    given = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    alpha = node.kwargs.get("alpha", 1)
    if len(given) != 2 or not isinstance(alpha, (int, float)):
        return None
    if node.target in REVERSED:
        given.reverse()
    if node.target in ADDITIONS:
        return [(given[0], 1.0), (given[1], float(alpha))]
    return [(given[0], 1.0), (given[1], -float(alpha))]


def is_relu(node: fx.Node, held: Mapping[str, Any]) -> bool:
    if node.op == "call_module":
        return type(held[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in RELUS) or (
        node.op == "call_method" and node.target == "relu"
    )


def is_activation(node: fx.Node, held: Mapping[str, Any]) -> bool:
    """Whether an operation is a function of each element without weights."""
    if node.op == "call_module":
        return isinstance(held[str(node.target)], MODULES)
    return (node.op == "call_function" and node.target in ACTIVATIONS) or (
        node.op == "call_method" and node.target in METHODS
    )
