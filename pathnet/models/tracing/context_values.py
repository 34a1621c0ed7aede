"""Values that a part of a traced model reads besides the residual stream, and the graph that computes them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pathnet.models.context_graph import ContextValue
from pathnet.models.tracing.graphs import TracedGraph, copy_node
from pathnet.models.tracing.values import Observation, batch_dim_of

__all__ = ["BatchSize", "ContextCollector", "NotContext", "OfStart", "Read", "reads_of"]

CONSTANTS = (type(None), str, slice, type(Ellipsis), torch.layout, torch.memory_format)


class NotContext(Exception):
    """A value differs between batches in a way that the context cannot hold."""


@dataclass(frozen=True)
class Read:
    """A value of the context, by name."""

    name: str


@dataclass(frozen=True)
class OfStart:
    """An attribute of the part's input: its type or device."""

    attribute: str


@dataclass(frozen=True)
class BatchSize:
    """The number of samples, the size of the part's input in its first dimension."""


@dataclass(frozen=True)
class _Entry:
    node: fx.Node
    path: tuple[int, ...]
    kind: ContextValue


def reads_of(value: Any) -> Iterator[Read]:
    """Yield the values of the context in a structure of tuples, lists and values."""
    if isinstance(value, Read):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from reads_of(item)


class ContextCollector:
    """Collects the values of the context, and makes the graph that computes them."""

    def __init__(
        self,
        traced: TracedGraph,
        single: Mapping[fx.Node, Observation],
        double: Mapping[fx.Node, Observation],
        batch: int,
    ) -> None:
        self.traced, self.single, self.double, self.batch = traced, single, double, batch
        self.entries: dict[str, _Entry] = {}

    def value(self, node: fx.Node, start: fx.Node) -> Any:
        """Return the structure of a node's value in a part that begins at ``start``, and collect it.

        Raises:
            NotContext: the value for the example repeated twice is neither that of the example nor its repetition.
        """
        return self._value(self.single[node].value, self.double[node].value, node, (), start)

    def _value(self, single: Any, double: Any, node: fx.Node, path: tuple[int, ...], start: fx.Node) -> Any:
        if isinstance(single, (tuple, list)):
            if len(single) != len(double):
                raise NotContext("has another length for another batch")
            items = [
                self._value(one, two, node, (*path, i), start)
                for i, (one, two) in enumerate(zip(single, double, strict=True))
            ]
            return items if isinstance(single, list) else tuple(items)
        of_start = self.single[start]
        if isinstance(single, (torch.device, torch.dtype)) and single == double:
            attribute = "device" if isinstance(single, torch.device) else "dtype"
            if single == getattr(of_start, attribute):
                return OfStart(attribute)
            return self._read(node, path, ContextValue())
        if isinstance(single, Tensor):
            return self._read(node, path, ContextValue(_batch_dim(single, double)))
        if isinstance(single, (bool, int, float)):
            if single == double:
                return self._read(node, path, ContextValue())
            if type(single) is int and double == 2 * single:
                holds_batch = batch_dim_of(of_start, self.double[start], self.batch) is not None
                if single == self.batch and holds_batch:
                    return BatchSize()
                return self._read(node, path, ContextValue(counts=True))
            raise NotContext(f"is {single} for {self.batch} samples and {double} for twice as many")
        if isinstance(single, CONSTANTS) and single == double:
            return single
        raise NotContext(f"comes from outside of it and is no tensor or number ({type(single).__name__})")

    def _read(self, node: fx.Node, path: tuple[int, ...], kind: ContextValue) -> Read:
        name = "_".join(["context", node.name, *map(str, path)])
        self.entries[name] = _Entry(node, path, kind)
        return Read(name)

    def kinds(self, names: Iterable[str]) -> dict[str, ContextValue]:
        """Return the kinds of some of the values."""
        return {name: self.entries[name].kind for name in names}

    def graph(self, names: Sequence[str]) -> fx.GraphModule | None:
        """Return a module that computes some of the values by name from all of the model's inputs; None for none."""
        if not names:
            return None
        needed: set[fx.Node] = set()
        pending = [self.entries[name].node for name in names]
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        graph = fx.Graph()
        attributes: dict[str, Any] = {}
        copies: dict[fx.Node, Any] = {}
        for node in self.traced.graph.nodes:
            if node.op == "placeholder" or node in needed:
                copies[node] = copy_node(node, graph, copies, attributes, self.traced.attributes)
        results: dict[str, Any] = {}
        for name in names:
            entry = self.entries[name]
            result = copies[entry.node]
            for i in entry.path:
                result = graph.call_function(operator.getitem, (result, i))
            results[name] = result
        graph.output(results)
        return fx.GraphModule(attributes, graph)


def _batch_dim(single: Tensor, double: Tensor) -> int | None:
    """Return the dimension of a tensor that holds the batch; None if samples share it.

    Args:
        single, double: the tensor for the example, and for the example repeated twice.

    Raises:
        NotContext: the second is neither equal to the first nor its repetition.
    """
    if single.ndim != double.ndim:
        raise NotContext("has other dimensions for another batch")
    differing = [i for i, (size, twice) in enumerate(zip(single.shape, double.shape, strict=True)) if size != twice]
    if not differing:
        if not _close(single, double):
            raise NotContext("is not the same for each sample")
        return None
    if len(differing) > 1 or double.shape[differing[0]] != 2 * single.shape[differing[0]]:
        raise NotContext(f"is {list(single.shape)}, but {list(double.shape)} for twice as many samples")
    (dim,) = differing
    if not _close(torch.cat([single, single], dim), double):
        raise NotContext("is not one value for each sample")
    return dim


def _close(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of another batch size."""
    if not first.is_floating_point():
        return torch.equal(first, second)
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)
