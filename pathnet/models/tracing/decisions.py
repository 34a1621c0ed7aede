"""Traces of models whose control flow depends on values or shapes, which each run of the trace checks.

Control flow takes the way that it takes for the example. Where that depends on a value of the trace, the trace
computes the value anew in each run, and refuses inputs for which the model would go another way.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.graphs import TracedGraph, operation, output_node
from pathnet.models.tracing.tracers import TraceProxy, Tracer, from_fx

__all__ = ["OtherWay", "decided", "decisions_of", "trace_with_decisions"]

KINDS: dict[str, Callable[[Any], Any]] = {"bool": bool, "int": int, "float": float, "len": len}
MOST_DECISIONS = 1000
LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent)


class OtherWay(ValueError):
    """Error for inputs for which a model's control flow takes another way than the traced one."""


@operation
def decided(x: Tensor, value: Any, kind: str, expected: Any, where: str) -> Tensor:
    """Return ``x`` after a check that control flow goes the traced way.

    Args:
        value: what the control flow depends on.
        kind: the name of the Python type that it is converted to, or ``len`` for its length.
        expected: the result for the traced example.
        where: the place in the model's code, in words.

    Raises:
        OtherWay: the result is another one.
    """
    result = KINDS[kind](value)
    if result != expected:
        raise OtherWay(
            f"net: expected inputs for which the model's control flow goes the traced way, got {result} instead of "
            f"{expected} at {where}; adapt the model with an example that goes this way"
        )
    return x


def decisions_of(graph: fx.Graph) -> list[str]:
    """Return the places in the model's code whose control flow a trace fixes and checks."""
    return list(dict.fromkeys(str(node.args[4]) for node in graph.nodes if node.target is decided))


@dataclass(frozen=True)
class _Decision:
    """A conversion of a value of the trace to a Python object.

    Attributes:
        after: the last node of the graph before it.
        module: the innermost module that is traced there.
    """

    value: fx.Node
    kind: str
    expected: Any
    where: str
    after: fx.Node
    module: nn.Module


class _DecidingProxy(TraceProxy):
    """Proxy that knows its value for the example, and notes where Python asks for it."""

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, "bool"))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(self.tracer.decide(self, "int"))  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return int(self)

    def __float__(self) -> float:
        return float(self.tracer.decide(self, "float"))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return int(self.tracer.decide(self, "len"))  # type: ignore[attr-defined]


class _DecidingTracer(Tracer):
    """Tracer that runs the model along with the trace.

    Attributes:
        values: the value of each node for the example.
        decisions: the conversions of values to Python objects, in order.
    """

    def __init__(self, leaves: Sequence[nn.Module], example: Example) -> None:
        super().__init__(leaves, len(example.tensors))
        self.values: dict[fx.Node, Any] = {}
        self.decisions: list[_Decision] = []
        self._inputs = iter(example.copies())
        self._evaluating = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _DecidingProxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(obj))])  # type: ignore[index]

    def decide(self, proxy: fx.Proxy, kind: str) -> Any:
        result = KINDS[kind](self.values[proxy.node])
        if len(self.decisions) == MOST_DECISIONS:
            raise ValueError(f"its control flow asks for more than {MOST_DECISIONS} values")
        after = next(iter(reversed(self.graph.nodes)))
        decision = _Decision(proxy.node, kind, result, _place(sys._getframe(2)), after, self.entered[-1])
        self.decisions.append(decision)
        return result

    def create_node(self, kind: str, *arguments: Any, **named: Any) -> fx.Node:
        node = super().create_node(kind, *arguments, **named)
        if kind != "output":
            self._evaluating = True
            try:
                with torch.no_grad():
                    self.values[node] = self._evaluate(node)
            finally:
                self._evaluating = False
        return node

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "placeholder":
            return next(self._inputs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        attribute = attrgetter(str(node.target))(self.root)
        return attribute if node.op == "get_attr" else attribute(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)


def _place(frame: FrameType | None) -> str:
    """Return the line of the model's code that a frame is called from, with its file's name."""
    while frame is not None and any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in LIBRARIES):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).name}:{number} ({linecache.getline(file, number).strip() or frame.f_code.co_name})"


def trace_with_decisions(
    root: nn.Module, example: Example, leaves: Sequence[nn.Module], opened: Collection[nn.Module]
) -> TracedGraph:
    """Return a trace by ``torch.fx`` whose control flow is that for the example, as each run of it checks.

    Args:
        root: a module of the example's tensors that contains the model as ``model``.
        leaves: modules not to trace into.
        opened: modules that must be traced into. Others whose control flow depends on values become nodes, which run
            the modules' own code.

    Raises:
        Exception: the model cannot be traced even so.
    """
    whole: list[nn.Module] = []
    while True:
        tracer = _DecidingTracer([*leaves, *whole], example)
        graph = tracer.trace(root)
        module = next((d.module for d in tracer.decisions if d.module not in opened), None)
        if module is None:
            break
        whole.append(module)
    for decision in tracer.decisions:
        _insert(graph, decision, tracer.values)
    traced = from_fx(graph, tracer, root, example)
    names = [name.removeprefix("model.") for name, module in root.named_modules() if module in whole]
    return replace(traced, traced_by="torch.fx" + (f" around {', '.join(names)}" if names else ""))


def _insert(graph: fx.Graph, decision: _Decision, values: dict[fx.Node, Any]) -> None:
    """Let a tensor pass a check of the decision between the operations before and after it.

    It is one that the decision depends on, so both belong to the same part of the network, if there is any.
    """
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    position = index[decision.after]
    reaching = _ancestors(output_node(graph))
    origins = _ancestors(decision.value)
    passing = [
        node
        for node in nodes[: position + 1]
        if isinstance(values.get(node), Tensor)
        and node in reaching
        and any(index[user] > position and user in reaching for user in node.users)
    ]
    if not passing:
        raise ValueError(f"no tensor passes its control flow at {decision.where}")
    # The last tensor, rather one with gradients, rather one that the decision depends on.
    x = max(passing, key=lambda node: (node in origins, values[node].is_floating_point(), index[node]))
    later = [user for user in x.users if index[user] > position]
    with graph.inserting_after(decision.after):
        value = decision.value
        if isinstance(values[value], Tensor):
            value = graph.call_method("detach", (value,))
        check = graph.call_function(decided, (x, value, decision.kind, decision.expected, decision.where))
    if value is not decision.value:
        check.prepend(value)
        value.meta = dict(decision.after.meta)
    check.meta, values[check] = dict(decision.after.meta), values[x]
    for user in later:
        user.replace_input_with(x, check)


def _ancestors(end: fx.Node) -> set[fx.Node]:
    """Return a node and all nodes that it is computed from."""
    ancestors: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node not in ancestors:
            ancestors.add(node)
            pending += node.all_input_nodes
    return ancestors
