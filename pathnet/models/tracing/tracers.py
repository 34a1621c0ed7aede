"""Tracing a model by `torch.fx` or `torch.export`, without changing the model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from pathnet.models.pointwise import Pointwise
from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.exported import exported
from pathnet.models.tracing.functional import functionalize
from pathnet.models.tracing.graphs import (
    Dropout,
    ReadOnlyInterpreter,
    RecordingInterpreter,
    TracedGraph,
    describe_node,
    differs,
    first_line,
    placeholders,
)
from pathnet.models.tracing.lifting import lift
from pathnet.models.tracing.network_types import follow_network_type
from pathnet.models.tracing.quiet import quiet
from pathnet.models.tracing.restoring import attributes_restored
from pathnet.models.tracing.training_reads import called_whole

__all__ = ["TraceProxy", "Tracer", "from_fx", "trace_model", "trace_with_fx", "untraceable"]

TRANSPARENT = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of torch.nn to trace into, since they contain residual connections."""

AROUND = "torch.fx around untraceable modules"


class TraceProxy(fx.Proxy):
    """Proxy that records ``x += y`` as an in-place operation in every version of torch, and ``x[index] = y``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(name: str) -> Callable[[TraceProxy, Any], fx.Proxy]:
    def method(self: TraceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(TraceProxy, f"__{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """Traces a model down to the modules of torch.nn.

    Args:
        leaves: further modules not to trace into.
        inputs: number of the root's inputs.

    Attributes:
        entered: the modules that the trace is inside, outermost first. After an error, the last one caused it.
    """

    def __init__(self, leaves: Sequence[nn.Module] = (), inputs: int = 1) -> None:
        super().__init__()
        self.leaves, self.inputs = {*leaves, *called_whole().whole}, inputs
        # Otherwise a computation on buffers alone would run once, during tracing.
        self.proxy_buffer_attributes = True
        self.entered: list[nn.Module] = []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # A model that stores intermediate results would store proxies, and use them in its next run.
        with attributes_restored(root):
            return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # The root takes any number of tensors, ``forward(*tensors)``, for which fx has no placeholders.
        names = ["x"] if self.inputs == 1 else [f"input_{i}" for i in range(self.inputs)]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not any(m is module for module in self.root.modules()):
            # A module that a forward pass makes anew, such as a loss.
            return forward(*args, **kwargs)
        self.entered.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TraceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.leaves or isinstance(m, Pointwise):
            return True
        if isinstance(m, (*TRANSPARENT, nn.Sequential)):
            return False
        # A subclass that inherits the forward of a convolution or normalisation.
        inherited = type(m).forward.__module__.startswith("torch.nn.modules") and next(m.children(), None) is None
        return inherited or super().is_leaf_module(m, module_qualified_name)


def trace_with_fx(root: nn.Module, example: Example, leaves: Sequence[nn.Module] = ()) -> TracedGraph:
    """Return a trace by ``torch.fx``.

    Args:
        root: a module of the example's tensors that contains the model as ``model``; names in the trace lose that
            prefix.
        leaves: modules not to trace into.
    """
    tracer = Tracer(leaves, len(example.tensors))
    return from_fx(tracer.trace(root), tracer, root, example)


def _trace_around_untraceable(root: nn.Module, example: Example) -> TracedGraph:
    """Return a trace by ``torch.fx`` in which each module with untraceable control flow is one node."""
    leaves: list[nn.Module] = []
    while True:
        tracer = Tracer(leaves, len(example.tensors))
        try:
            traced = from_fx(tracer.trace(root), tracer, root, example)
            names = [name.removeprefix("model.") for name, module in root.named_modules() if module in leaves]
            return replace(traced, traced_by=f"torch.fx around {', '.join(names)}", untraced=tuple(leaves))
        except Exception:
            # The first module entered is the model itself.
            registered = set(root.modules()) - set(leaves)
            if len(tracer.entered) < 2 or tracer.entered[-1] not in registered:
                raise
            leaves.append(tracer.entered[-1])


def from_fx(graph: fx.Graph, tracer: Tracer, root: nn.Module, example: Example) -> TracedGraph:
    """Return a tracer's graph of a root, normalised."""
    attributes: dict[str, Any] = {}
    constants = {name: tensor for tensor, name in tracer.tensor_attrs.items()}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            # The root lost the constants that the trace gave it.
            attribute = constants[name] if name in constants else attrgetter(name)(root)
            node.target = str(node.target).removeprefix("model.")
            if node.target not in attributes:
                attributes[node.target] = called_whole().attribute(attribute)
    return _normalised(graph, attributes, root.get_submodule("model"), example, "torch.fx")


def _trace_with_export(model: nn.Module, example: Example, choose: Callable[[Any], Any]) -> TracedGraph:
    module, guards = exported(model, example, choose)
    attributes = {
        str(node.target): attrgetter(str(node.target))(module) for node in module.graph.nodes if node.op == "get_attr"
    }
    dropouts = tuple((name, dropout) for name, dropout in model.named_modules() if isinstance(dropout, Dropout))
    return replace(
        _normalised(module.graph, attributes, model, example, "torch.export"), dropouts=dropouts, guards=guards
    )


def _normalised(
    graph: fx.Graph, attributes: dict[str, Any], model: nn.Module, example: Example, traced_by: str
) -> TracedGraph:
    """Return a traced graph with modules in place of convolution functions, and without in-place operations."""
    inputs = zip(placeholders(graph), example.tensors, strict=True)
    floating = [node for node, tensor in inputs if tensor.is_floating_point()]
    follow_network_type(graph, attributes, model, floating)
    values: dict[fx.Node, Any] = {}

    def on_value(node: fx.Node, value: Any) -> Any:
        values[node] = value
        return value

    RecordingInterpreter(attributes, graph, on_value).run(*example.copies())
    ranks = {node: value.ndim for node, value in values.items() if isinstance(value, Tensor)}
    frozen = lift(graph, attributes, model, ranks)
    functional_graph = functionalize(graph, attributes, values)
    return TracedGraph(functional_graph, attributes, traced_by, tuple(map(describe_node, frozen)))


def trace_model(
    root: nn.Module,
    model: nn.Module,
    choose: Callable[[Any], Any],
    example: Example,
    expected: Tensor,
    by_block: Callable[[], TracedGraph] | None = None,
) -> tuple[TracedGraph | None, dict[str, str]]:
    """Return the first trace whose output equals the model's, or None; and why each earlier method failed.

    Args:
        root: a module of the example's tensors that contains ``model`` and returns one of its outputs.
        choose: maps the model's result to that output.
        expected: the output for ``example``.
        by_block: a further method of tracing, to try after `torch.fx` and before `torch.export`.
    """
    failures: dict[str, str] = {}
    methods: dict[str, Callable[[], TracedGraph]] = {
        "torch.fx": partial(trace_with_fx, root, example),
        **({} if by_block is None else {"block by block": by_block}),
        "torch.export": partial(_trace_with_export, model, example, choose),
        AROUND: partial(_trace_around_untraceable, root, example),
    }
    for name, method in methods.items():
        try:
            with quiet():
                traced = method()
            output = ReadOnlyInterpreter(traced.attributes, traced.graph).run(*example.copies())
            if differs(output, expected):
                raise ValueError("its trace computes something else than the model")
            return traced, failures
        except Exception as error:
            failures[name] = first_line(error)
    return None, failures


def untraceable(failures: Mapping[str, str], *advice: str) -> str:
    """Return in words that no method traces a model, what can be done, and why.

    Args:
        failures: the reason by method, which may be long and is the end of the message.
        advice: what can be done, in clauses.
    """
    reasons = (
        f"{name}: {reason.removeprefix('model: ').removeprefix(f'{name} ')}"
        for name, reason in failures.items()
        if name != AROUND
    )
    return f"{'; '.join(['cannot be traced', *advice])} ({'; '.join(reasons)})"
