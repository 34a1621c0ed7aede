"""Parts of a graph as modules of their own: functions of one tensor over the model's own modules and weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.tracing.connections import CLONES, Term
from pathnet.models.tracing.graphs import Traced, placeholder, where
from pathnet.models.tracing.values import Fact, by_value

__all__ = ["Scissors"]


class Scissors:
    """Cuts parts out of a graph.

    What a part needs from outside of it that is no tensor which gradients flow through (sizes, masks, rotary factors)
    becomes a constant, or follows the size of the batch, as it did for two examples of which the second is the first
    twice.

    Attributes:
        fixed: the reasons why the parts hold for inputs of the example's shape alone, batch apart.
    """

    def __init__(
        self, traced: Traced, once: Mapping[fx.Node, Fact], twice: Mapping[fx.Node, Fact], source: fx.Node
    ) -> None:
        self.traced, self.once, self.twice = traced, once, twice
        self.start = placeholder(traced.graph)
        origins = [node for node in traced.graph.nodes if once[node].dependent]
        self.by_value = by_value(traced.graph, self.start, source, *origins)
        self.weighted = self._weighted()
        self.place = {node: i for i, node in enumerate(traced.graph.nodes)}
        self.fixed: list[str] = []

    def _weighted(self) -> set[fx.Node]:
        """What depends on the values of weights."""
        weights = []
        for node in self.traced.graph.nodes:
            own = self.traced.held[str(node.target)] if node.op in ("call_module", "get_attr") else None
            has_weights = isinstance(own, nn.Module) and any(True for _ in own.parameters())
            if isinstance(own, nn.Parameter) or has_weights:
                weights.append(node)
        return by_value(self.traced.graph, *weights)

    def check_batch(self, node: fx.Node) -> None:
        """
        Raises:
            ValueError: the first dimension of what an operation gives is not the batch.
        """
        once, twice = self.once[node].shape, self.twice[node].shape
        batch = self.once[self.start].shape
        assert batch is not None
        if once is None or twice is None or once[:1] != batch[:1] or twice != torch.Size([2 * batch[0], *once[1:]]):
            got = type(self.once[node].value).__name__ if once is None else list(once)
            raise ValueError(
                f"model: expected the batch in the first dimension ({batch[0]}) between blocks, got {got} from "
                f"{where(node)}"
            )

    def cut(
        self, name: str, start: fx.Node, terms: Sequence[Term], shape: torch.Size | None = None
    ) -> fx.GraphModule | None:
        """The sum of ``terms`` as a function of ``start``; None where it is the identity.

        Args:
            name: what the part is, for errors.
            shape: to which the sum is broadcast, if that is not its own.

        Raises:
            ValueError: a value from outside is needed that is neither a constant nor follows the size of the batch.
        """
        own_shape = _broadcast([self._shape(term.node) for term in terms])
        grows = shape is not None and shape != own_shape
        if len(terms) == 1 and terms[0].factor == 1 and not grows and self._passes(start, terms[0].node):
            return None
        part = _Part(self, name, start, [term.node for term in terms])
        total: fx.Node | None = None
        for term in terms:
            value = part.now[term.node]
            if term.factor != 1:
                value = part.graph.call_function(operator.mul, (value, term.factor))
            total = value if total is None else part.graph.call_function(operator.add, (total, value))
        assert total is not None
        if grows:
            assert shape is not None
            total = part.graph.call_method("expand", (total, -1, *shape[1:]))
            self.fixed.append("a branch is broadcast")
        part.graph.output(total)
        return fx.GraphModule(part.held, part.graph)

    def _passes(self, start: fx.Node, end: fx.Node) -> bool:
        """Whether what ``end`` gives is what ``start`` does: between them is nothing, or modules that do nothing."""
        while end is not start and (
            end.target in CLONES or type(self.traced.held.get(str(end.target))) is nn.Identity
        ):
            (end,) = end.all_input_nodes
        return end is start

    def _shape(self, node: fx.Node) -> torch.Size:
        shape = self.once[node].shape
        assert shape is not None
        return shape


def _broadcast(shapes: Sequence[torch.Size]) -> torch.Size:
    """Of the sum of tensors of such shapes."""
    first, *others = (torch.empty(shape, device="meta") for shape in shapes)
    return sum(others, first).shape


class _Part:
    """A new graph that computes some operations of the old one from ``start``."""

    def __init__(self, scissors: Scissors, name: str, start: fx.Node, ends: Sequence[fx.Node]) -> None:
        self.scissors, self.name, self.start = scissors, name, start
        self.graph = fx.Graph()
        self.held: dict[str, Any] = {}
        self.now: dict[fx.Node, Any] = {start: self.graph.placeholder("x")}
        inside = self._inside(ends)
        available = self._available(inside)
        needed, captured = self._needed(ends, inside, available)
        for node in sorted(captured, key=scissors.place.__getitem__):
            self.now[node] = self._constant(node)
        for node in sorted(needed, key=scissors.place.__getitem__):
            self.now[node] = self._copy(node)

    def _inside(self, ends: Sequence[fx.Node]) -> set[fx.Node]:
        """What gradients flow through on the way from ``start`` to the ends, or all that leads there from the model's
        own input."""
        found: set[fx.Node] = set()
        waiting = [end for end in ends if end is not self.start]
        from_input = self.start is self.scissors.start
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [
                    own
                    for own in node.all_input_nodes
                    if own is not self.start and (from_input or self.scissors.once[own].dependent)
                ]
        return found

    def _available(self, inside: set[fx.Node]) -> set[fx.Node]:
        """What can be computed here: from ``start``, what is inside, and weights."""
        found = {self.start, *inside}
        for node in self.scissors.traced.graph.nodes:
            is_fixed = node.op != "placeholder" and not self.scissors.once[node].dependent
            if is_fixed and all(own in found for own in node.all_input_nodes):
                found.add(node)
        return found

    def _needed(
        self, ends: Sequence[fx.Node], inside: set[fx.Node], available: set[fx.Node]
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        needed: set[fx.Node] = set()
        captured: set[fx.Node] = set()
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node is self.start or node in needed or node in captured:
                continue
            # Of weights nothing becomes a constant, since they are trained (relative positions of T5).
            of_weights = node in self.scissors.weighted and node not in self.scissors.by_value
            if node in available or of_weights:
                needed.add(node)
                waiting += node.all_input_nodes
            else:
                captured.add(node)
        return needed, captured

    def _copy(self, node: fx.Node) -> fx.Node:
        own = self.graph.node_copy(node, self.now.__getitem__)
        own.meta = {}
        if node.op in ("call_module", "get_attr"):
            own.target = self._hold(str(node.target), self.scissors.traced.held[str(node.target)])
        return own

    def _hold(self, name: str, value: Any) -> str:
        """The name under which the part holds it. A tensor gets one without dots, since it shall not be set once more
        in the module that the model has it in."""
        if isinstance(value, Tensor):
            name = name.replace(".", "_")
        while self.held.get(name, value) is not value:
            name += "_"
        self.held[name] = value
        return name

    def _constant(self, node: fx.Node) -> Any:
        """What stands for a value from outside."""
        if node in self.scissors.by_value:
            raise self._needs(node, "is computed from the input's values outside of it")
        return self._same(self.scissors.once[node].value, self.scissors.twice[node].value, node)

    def _needs(self, node: fx.Node, why: str) -> ValueError:
        return ValueError(
            f"model: {self.name} needs {where(node)}, which {why}; a part was expected to need what comes out of the "
            "one before it, weights and constants alone; blocks= takes branches, (skip, residual), by hand"
        )

    def _same(self, once: Any, twice: Any, node: fx.Node) -> Any:
        here = self.scissors.once[self.start]
        if isinstance(once, (tuple, list)):
            own = [self._same(one, other, node) for one, other in zip(once, twice, strict=True)]
            return own if isinstance(once, list) else tuple(own)
        if isinstance(once, torch.device) and once == here.device:
            return self.graph.call_function(getattr, (self.now[self.start], "device"))
        if isinstance(once, torch.dtype) and once == here.dtype:
            return self.graph.call_function(getattr, (self.now[self.start], "dtype"))
        if isinstance(once, Tensor):
            return self._tensor(once, twice, node)
        if type(once) is int:
            if once != twice:
                return self._of_batch(once, twice, node)
            self.scissors.fixed.append(f"{where(node)} is fixed")
            return once
        if once == twice and isinstance(once, (type(None), bool, float, str, torch.dtype, torch.device, slice)):
            return once
        raise self._needs(node, f"comes from outside of it and is no constant ({type(once).__name__})")

    def _of_batch(self, once: int, twice: int, node: fx.Node) -> fx.Node:
        """A number that doubles with the batch, from the size of ``start``'s."""
        here = self.scissors.once[self.start].shape
        assert here is not None
        if twice != 2 * once:
            raise self._needs(node, f"is {once} for {here[0]} samples and {twice} for twice as many")
        shape = self.graph.call_function(getattr, (self.now[self.start], "shape"))
        size = self.graph.call_function(operator.getitem, (shape, 0))
        if once == here[0]:
            return size
        return self.graph.call_function(
            operator.floordiv, (self.graph.call_function(operator.mul, (size, once)), here[0])
        )

    def _tensor(self, once: Tensor, twice: Tensor, node: fx.Node) -> fx.Node:
        self.scissors.fixed.append(f"{where(node)} is fixed")
        if once.shape == twice.shape and torch.equal(once, twice):
            return self._fixed_tensor(once)
        differing = [i for i, (one, other) in enumerate(zip(once.shape, twice.shape, strict=True)) if one != other]
        if len(differing) == 1:
            (dim,) = differing
            row = once.narrow(dim, 0, 1)
            if torch.equal(row.expand_as(once), once) and torch.equal(
                row.expand(*(-1 if i != dim else size for i, size in enumerate(twice.shape))), twice
            ):
                size = self._of_batch(once.shape[dim], twice.shape[dim], node)
                sizes = [-1 if i != dim else size for i in range(once.ndim)]
                return self.graph.call_method("expand", (self._fixed_tensor(row), *sizes))
        raise self._needs(node, "comes from outside of it and is not the same for all samples")

    def _fixed_tensor(self, tensor: Tensor) -> fx.Node:
        return self.graph.get_attr(self._hold("constant", tensor.detach().clone()))
