"""Ways to trace a model, and the model left as it was."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.pointwise import Pointwise
from pathnet.models.tracing.exported import exported
from pathnet.models.tracing.functional import functional
from pathnet.models.tracing.graphs import Dropout, Recording, Traced, Watching, differs, first_line, where
from pathnet.models.tracing.lifting import lift

__all__ = ["attempts", "trace", "untouched", "untraceable"]

OPEN = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of torch.nn that hold residual connections of their own."""

AROUND = "torch.fx around what it cannot trace"


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

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # A model that keeps what it computes would keep proxies, with which its next run goes on.
        with _attributes_kept(root):
            return super().trace(root, concrete_args)

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
        if m in self.leaves or isinstance(m, Pointwise):
            return True
        if isinstance(m, (*OPEN, nn.Sequential)):
            return False
        # A convolution or normalisation that somebody's subclass leaves as it is.
        inherited = type(m).forward.__module__.startswith("torch.nn.modules") and next(m.children(), None) is None
        return inherited or super().is_leaf_module(m, module_qualified_name)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What each module has as attributes and buffers is the same objects afterwards."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for own, kept in ((vars(module), attributes), (module._buffers, buffers)):
                own.clear()
                own.update(kept)


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
        with (
            _attributes_kept(model),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
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
    return _finished(graph, held, root.get_submodule("model"), example, "torch.fx")


def _export(model: nn.Module, example: Tensor, choose: Callable[[Any], Any]) -> Traced:
    module = exported(model, example, choose)
    held = {
        str(node.target): attrgetter(str(node.target))(module) for node in module.graph.nodes if node.op == "get_attr"
    }
    dropouts = tuple((name, own) for name, own in model.named_modules() if isinstance(own, Dropout))
    return replace(_finished(module.graph, held, model, example, "torch.export"), dropouts=dropouts)


def _finished(graph: fx.Graph, held: dict[str, Any], model: nn.Module, example: Tensor, kind: str) -> Traced:
    values: dict[fx.Node, Any] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        values[node] = value
        return value

    Recording(fx.GraphModule(held, graph), keep).run(example.clone())
    ranks = {node: value.ndim for node, value in values.items() if isinstance(value, Tensor)}
    frozen = lift(graph, held, model, ranks)
    return Traced(functional(graph, held, values), held, kind, tuple(map(where, frozen)))


def attempts(
    root: nn.Module,
    model: nn.Module,
    choose: Callable[[Any], Any],
    example: Tensor,
    expected: Tensor,
    by_block: Callable[[], Traced] | None = None,
) -> tuple[Traced | None, dict[str, str]]:
    """The first trace that gives what the model gives, or None, and by way why those before it are none.

    Args:
        root: a module that holds ``model`` and gives what ``choose`` takes of the model's output.
        by_block: a further way to trace, after `torch.fx` and before `torch.export`.
    """
    reasons: dict[str, str] = {}
    ways: dict[str, Callable[[], Traced]] = {
        "torch.fx": partial(trace, root, example),
        **({} if by_block is None else {"block by block": by_block}),
        "torch.export": partial(_export, model, example, choose),
        AROUND: partial(_around_untraceable, root, example),
    }
    for way, attempt in ways.items():
        try:
            traced = attempt()
            if differs(Watching(fx.GraphModule(traced.held, traced.graph)).run(example.clone()), expected):
                raise ValueError("its trace computes something else than the model")
            return traced, reasons
        except Exception as error:
            reasons[way] = first_line(error)
    return None, reasons


def untraceable(reasons: Mapping[str, str]) -> str:
    """Why there is no trace of all of it, in words."""
    said = (f"{way}: {reason.removeprefix('model: ')}" for way, reason in reasons.items() if way != AROUND)
    return f"cannot be traced ({'; '.join(said)})"
