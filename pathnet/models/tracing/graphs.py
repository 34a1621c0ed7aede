"""A model as a graph of operations over its own modules and weights, and what the operations give for an example."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pathnet.models.tracing.exported import exported
from pathnet.models.tracing.functional import functional
from pathnet.models.tracing.lifting import lift

__all__ = [
    "Fact",
    "Traced",
    "attempts",
    "by_value",
    "differs",
    "first_line",
    "observe",
    "path_of",
    "paths_of",
    "placeholder",
    "source_of",
    "trace",
    "untouched",
    "untraceable",
    "where",
]

OPEN = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of torch.nn that hold residual connections of their own."""

EMBEDDINGS = (torch.nn.functional.embedding, torch.ops.aten.embedding.default)
SHAPES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda"}
OF_SHAPE = {"size", "dim", "numel", "stride", "len", "sym_size", "ndimension", "is_floating_point", "get_device"}
NEW_OF_SHAPE = {"zeros", "ones", "empty", "full"}


@dataclass(frozen=True)
class Traced:
    """A graph without operations in place.

    Attributes:
        held: what the graph names: modules, parameters, buffers and constants.
        kind: what traced it, ``torch.fx`` or ``torch.export``, and what it left whole.
        whole: the modules with control flow that it left whole.
        frozen: the batch normalisations whose statistics are fixed.
    """

    graph: fx.Graph
    held: dict[str, Any]
    kind: str
    frozen: tuple[str, ...] = ()
    whole: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Fact:
    """What an operation gave for the example.

    Attributes:
        dependent: a gradient flows from it to the source.
        value: what it is, but for dependent tensors.
        shape: of a tensor.
    """

    dependent: bool
    value: Any
    shape: torch.Size | None
    dtype: torch.dtype | None
    device: torch.device | None


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is, an operation in place, whatever the version of torch."""


def _in_place(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    def method(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """
    Attributes:
        entered: the modules that the trace is in, from the outermost inwards; where it failed, if it did.
    """

    def __init__(self, leaves: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.leaves = set(leaves)
        # Else what is computed of buffers alone would be computed here, once and for all.
        self.proxy_buffer_attributes = True
        self.entered: list[nn.Module] = []

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.entered.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.leaves:
            return True
        if isinstance(m, (*OPEN, nn.Sequential)):
            return False
        # A convolution or normalisation that somebody's subclass leaves as it is.
        inherited = type(m).forward.__module__.startswith("torch.nn.modules") and next(m.children(), None) is None
        return inherited or super().is_leaf_module(m, module_qualified_name)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, without gradients of weights; the model is as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval().requires_grad_(False)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
        for parameter, required in asked:
            parameter.requires_grad_(required)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def trace(root: nn.Module, example: Tensor, leaves: Sequence[nn.Module] = ()) -> Traced:
    """By ``torch.fx``: of a module of one tensor, whose names lose the prefix ``model.``."""
    return _of_fx(_Tracer(leaves).trace(root), root, example)


def _around_untraceable(root: nn.Module, example: Tensor) -> Traced:
    """By ``torch.fx``, with the modules that it cannot trace left whole: branches with control flow."""
    leaves: list[nn.Module] = []
    while True:
        tracer = _Tracer(leaves)
        try:
            traced = _of_fx(tracer.trace(root), root, example)
            names = [name.removeprefix("model.") for name, module in root.named_modules() if module in leaves]
            return replace(traced, kind=f"torch.fx around {', '.join(names)}", whole=tuple(leaves))
        except Exception:
            # The model itself is the first that was entered.
            if len(tracer.entered) < 2 or tracer.entered[-1] in leaves:
                raise
            leaves.append(tracer.entered[-1])


def _of_fx(graph: fx.Graph, root: nn.Module, example: Tensor) -> Traced:
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            found = attrgetter(str(node.target))(root)
            node.target = str(node.target).removeprefix("model.")
            held[node.target] = found
    return _finished(graph, held, root, example, "torch.fx")


def _export(root: nn.Module, example: Tensor) -> Traced:
    module = exported(root, example)
    held: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found = attrgetter(str(node.target))(module)
            node.target = str(node.target).removeprefix("model.")
            held[node.target] = found
    return _finished(module.graph, held, root, example, "torch.export")


def attempts(
    root: nn.Module, model: nn.Module, example: Tensor, expected: Tensor, *others: Callable[[], Traced]
) -> tuple[Traced | None, list[str]]:
    """The first trace that gives what the model gives, or None, and why those before it are none.

    Args:
        root: a module that holds ``model`` and gives one of its outputs.
        others: further ways to trace, after `torch.fx` and before `torch.export`.
    """
    one_of_several = getattr(root, "output", None) is not None
    reasons: list[str] = []
    ways: list[Callable[[], Traced]] = [
        partial(trace, root, example),
        *others,
        partial(_export, root if one_of_several else model, example),
        partial(_around_untraceable, root, example),
    ]
    for attempt in ways:
        try:
            traced = attempt()
            if differs(_Watching(fx.GraphModule(traced.held, traced.graph)).run(example.clone()), expected):
                raise ValueError("its trace computes something else than the model")
            return traced, reasons
        except Exception as error:
            reasons.append(first_line(error))
    return None, reasons


def untraceable(reasons: Sequence[str]) -> str:
    """Why there is no trace, in words."""
    return f"cannot be traced (torch.fx: {reasons[0]}; torch.export: {reasons[-2]})"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def differs(given: Tensor, expected: Tensor, size: float = 0.0) -> bool:
    """By more than rounding, relative to the norm of what is expected; ``size`` is that of all of it."""
    if given.shape != expected.shape or not torch.isfinite(expected).all():
        return True
    own = float(expected.double().norm())
    rounding = torch.finfo(expected.dtype).eps
    return not float((given.double() - expected.double()).norm()) <= rounding**0.5 * own + 100 * rounding * size


def _finished(graph: fx.Graph, held: dict[str, Any], root: nn.Module, example: Tensor, kind: str) -> Traced:
    values: dict[fx.Node, Any] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        values[node] = value
        return value

    _Recorder(fx.GraphModule(held, graph), keep).run(example.clone())
    ranks = {node: value.ndim for node, value in values.items() if isinstance(value, Tensor)}
    frozen = lift(graph, held, getattr(root, "model", root), ranks)
    return Traced(functional(graph, held, values), held, kind, tuple(map(where, frozen)))


class _Recorder(fx.Interpreter):
    """Runs a graph node by node; ``keep`` is given each node's value, and returns what to go on with."""

    def __init__(self, module: fx.GraphModule, keep: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(module)
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        return self.keep(n, super().run_node(n))


class _Watching(fx.Interpreter):
    """Runs a graph that is to change nothing in place, but for copies that are made for it."""

    def run_node(self, n: fx.Node) -> Any:
        kept = [own for own in n.all_input_nodes if own.target is not torch.clone or len(own.users) > 1]
        given = [value for own in kept if isinstance(value := self.env[own], Tensor)]
        versions = [value._version for value in given]
        result = super().run_node(n)
        if [value._version for value in given] != versions:
            raise ValueError(f"{where(n)} changes its input in place")
        return result


def placeholder(graph: fx.Graph) -> fx.Node:
    (found,) = (node for node in graph.nodes if node.op == "placeholder")
    assert isinstance(found, fx.Node)
    return found


def observe(traced: Traced, example: Tensor, source: fx.Node) -> tuple[dict[fx.Node, Fact], Tensor]:
    """What every operation gives, and the output; ``source`` is where gradients are asked for."""
    facts: dict[fx.Node, Fact] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        if node is source:
            value = value.detach().requires_grad_()
        facts[node] = _fact(value)
        return value

    with torch.enable_grad():
        output = _Recorder(fx.GraphModule(traced.held, traced.graph), keep).run(example.clone())
    return facts, output.detach()


def _fact(value: Any) -> Fact:
    dependent = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))
    if not isinstance(value, Tensor):
        return Fact(dependent, None if dependent else value, None, None, None)
    return Fact(dependent, None if dependent else value, value.shape, value.dtype, value.device)


def source_of(traced: Traced, example: Tensor) -> fx.Node:
    """Where the gradients that count begin: the input, or for tokens the first embedding of their values.

    Raises:
        ValueError: the input is made of integers, and none of the operations is an embedding of them.
    """
    start = placeholder(traced.graph)
    if example.is_floating_point():
        return start
    known = by_value(traced.graph, start)
    node: fx.Node
    for node in traced.graph.nodes:
        ids = node.all_input_nodes
        is_module = node.op == "call_module" and isinstance(traced.held[str(node.target)], nn.Embedding)
        if (is_module or node.target in EMBEDDINGS) and any(own in known for own in ids):
            return node
    raise ValueError("model: takes integers, and no embedding of them was found")


def by_value(graph: fx.Graph, *origins: fx.Node) -> set[fx.Node]:
    """What depends on the values at ``origins``, not on their shapes alone."""
    found = set(origins)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target is getattr and node.args[1] in SHAPES:
            continue
        name = str(getattr(node.target, "overloadpacket", getattr(node.target, "__name__", node.target)))
        name = name.rpartition(".")[2]
        if name in OF_SHAPE or name.removesuffix("_like").removeprefix("new_") in NEW_OF_SHAPE:
            continue
        if name in ("expand_as", "view_as", "reshape_as", "type_as", "to"):
            inputs = inputs[:1]
        if any(own in found for own in inputs):
            found.add(node)
    return found


def paths_of(node: fx.Node) -> list[str]:
    """The modules of the model that an operation is in, from the outermost inwards, the model itself apart."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (re.sub(r"^(L\['self'\]\.?)?(model\.|model$)?", "", str(path)) for path, _ in stack.values())
    return [path for path in paths if path and not path.startswith("_empty_nn_module_stack")]


def path_of(node: fx.Node) -> str:
    """The innermost module that an operation is in; empty where it is the model itself."""
    return next(reversed(paths_of(node)), "")


def where(node: fx.Node) -> str:
    """An operation in words: what it is, and in which module of the model."""
    if node.op == "call_module":
        return f"module {node.target!r}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    own = path_of(node)
    return f"{str(target).removesuffix('.default')} (node {node.name!r}" + (f" in module {own!r})" if own else ")")
