"""What tracing cannot find, given by hand: which submodules are blocks, or the branches themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.tracing.blocks import TracedBlock, is_pad
from pathnet.models.tracing.dissect import Dissection
from pathnet.models.tracing.graphs import Traced, paths_of
from pathnet.models.tracing.tracers import attempts, trace, untraceable

__all__ = ["Part", "assembled", "inlined", "inside", "submodules"]

Part = str | nn.Module | Callable[[Tensor], Tensor]


def submodules(model: nn.Module, given: Sequence[str | nn.Module]) -> dict[str, nn.Module]:
    """Modules of a model by name, from names or from the modules themselves.

    Raises:
        ValueError: one is not the model's.
    """
    found: dict[str, nn.Module] = {}
    names = {module: name for name, module in model.named_modules()}
    for own in given:
        if isinstance(own, str):
            try:
                found[own] = model.get_submodule(own)
            except AttributeError:
                raise ValueError(f"blocks: the model has no submodule {own!r}") from None
        elif isinstance(own, nn.Module) and own in names:
            found[names[own]] = own
        else:
            raise ValueError(
                f"blocks: expected submodules of the model, their names, or pairs (skip, residual), "
                f"got {type(own).__name__}"
            )
    return found


def inside(traced: Traced, names: Sequence[str]) -> set[fx.Node]:
    """The operations that are in one of the modules named."""
    return {
        node
        for node in traced.graph.nodes
        if any(path == name or path.startswith(f"{name}.") for path in paths_of(node) for name in names)
    }


def inlined(root: nn.Module, blocks: Mapping[str, nn.Module], example: Tensor) -> Traced:
    """A trace by ``torch.fx`` around blocks, each of which is traced on its own.

    Args:
        root: a module of one tensor that holds the model as ``model``.

    Raises:
        ValueError: a block does not take one tensor, once, or cannot be traced; or what is around them cannot.
    """
    inputs = _inputs(root, blocks, example)
    outer = trace(root, example, list(blocks.values()))
    graph, held = fx.Graph(), dict(outer.held)
    now: dict[fx.Node, Any] = {}
    frozen, dropouts = list(outer.frozen), list(outer.dropouts)
    for node in outer.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], now.__getitem__))
        elif node.op == "call_module" and node.target in blocks:
            (x,) = node.args
            inner = _traced(blocks[node.target], inputs[node.target], node.target)
            now[node] = _splice(graph, held, inner, now[x], node.target)
            frozen += inner.frozen
            dropouts += [(f"{node.target}.{name}", own) for name, own in inner.dropouts]
        else:
            now[node] = graph.node_copy(node, now.__getitem__)
    return Traced(graph, held, outer.kind, tuple(frozen), dropouts=tuple(dropouts))


def _inputs(root: nn.Module, blocks: Mapping[str, nn.Module], example: Tensor) -> dict[str, Tensor]:
    """What enters each block for the example."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name in found or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                raise ValueError(f"blocks: expected {name!r} to be called once, with one tensor; give its branches")
            found[name] = args[0].detach().clone()

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in blocks.items()]
    try:
        with torch.no_grad():
            root(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    for name in blocks:
        if name not in found:
            raise ValueError(f"blocks: {name!r} takes no part for this example")
    return found


def _splice(graph: fx.Graph, held: dict[str, Any], inner: Traced, x: Any, name: str) -> Any:
    """Copies a block's operations into the graph around it; returns its output."""
    now: dict[fx.Node, Any] = {}
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            now[node] = x
        elif node.op == "output":
            return now[node.args[0]]
        else:
            now[node] = own = graph.node_copy(node, now.__getitem__)
            if node.op in ("call_module", "get_attr"):
                own.target = f"{name}.{node.target}"
                held[own.target] = inner.held[str(node.target)]
            paths = [name, *(f"{name}.{path}" for path in paths_of(node))]
            own.meta = {"nn_module_stack": {path: (path, nn.Module) for path in paths}}
    raise AssertionError("a graph without an output")


def _traced(module: nn.Module, x: Tensor, name: str) -> Traced:
    with torch.no_grad():
        expected = torch.as_tensor(module(x.clone()))
    traced, reasons = attempts(Alone(module), module, lambda output: output, x, expected)
    if traced is None:
        raise ValueError(f"blocks: {name!r} {untraceable(reasons)}; give its branches as a pair (skip, residual)")
    return traced


class Alone(nn.Module):
    """A module, or a function over a module's submodules, as the root of a trace."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.function is None else self.function(x)


class _Copying(nn.Module):
    """A module that may change its input in place, on a copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.module(x.clone()))


def assembled(
    model: nn.Module, example: Tensor, stem: Part, blocks: Sequence[Sequence[Part | None]], head: Part
) -> Dissection:
    """A model from its parts: submodules, their names, or functions over its submodules.

    Args:
        blocks: (skip, residual) or (skip, residual, join) of each block; None for the identity.

    Raises:
        ValueError: a part is none of those, does not take what comes before it, or does not keep the batch.
    """
    first, y = _part(model, "stem", stem, example)
    assert first is not None
    shape = y.shape[1:]
    made: list[TracedBlock] = []
    for i, given in enumerate(blocks):
        if len(given) not in (2, 3):
            raise ValueError(
                f"blocks: expected pairs (skip, residual) or (skip, residual, join), got {len(given)} parts"
            )
        skip, skipped = _part(model, f"the skip of block {i + 1}", given[0], y)
        residual, computed = _part(model, f"the residual module of block {i + 1}", given[1], y)
        join, joined = _part(
            model, f"the join of block {i + 1}", given[2] if len(given) > 2 else None, skipped + computed
        )
        if residual is None:
            raise ValueError(f"blocks: expected a residual module in block {i + 1}, got None")
        if joined.shape[:1] != example.shape[:1]:
            raise ValueError(f"blocks: expected the batch in the first dimension, got {list(joined.shape)}")
        name = given[1] if isinstance(given[1], str) else f"block {i + 1}"
        pads = is_pad(skip, residual, y, computed.shape)
        made.append(TracedBlock(name, None, skip, residual, join, pads))
        y = joined
    last, _ = _part(model, "head", head, y)
    assert last is not None
    return Dissection(first, made, last, shape, [])


def _part(model: nn.Module, name: str, given: Part | None, x: Tensor) -> tuple[nn.Module | None, Tensor]:
    """A part as a module of its own, and what it makes of ``x``."""
    if given is None:
        return None, x
    if isinstance(given, str):
        (given,) = submodules(model, [given]).values()
    if not callable(given):
        raise ValueError(f"{name}: expected a submodule, its name or a function, got {type(given).__name__}")
    try:
        with torch.no_grad():
            output = given(x.clone())
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"{name}: refuses what comes before it, {list(x.shape)} ({error})") from error
    is_module = isinstance(given, nn.Module)
    root = Alone(given) if is_module else Alone(model, given)  # type: ignore[arg-type]
    try:
        traced = trace(root, x)
        own = fx.GraphModule(traced.held, traced.graph)
        if torch.equal(own(x), output):
            return own, output
        reason = "its trace computes something else"
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
    if isinstance(given, nn.Module):
        return _Copying(given), output
    raise ValueError(f"{name}: expected a function that torch.fx can trace, or a module ({reason.splitlines()[0]})")
