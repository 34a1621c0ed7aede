"""Blocks that the caller names, as submodules or as branches, because tracing does not find them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.context_graph import InputReader
from pathnet.models.tracing.blocks import TracedBlock, zeros_before
from pathnet.models.tracing.decisions import trace_with_decisions
from pathnet.models.tracing.dissect import Dissection
from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.graphs import ReadOnlyInterpreter, TracedGraph, differs, first_line, module_paths
from pathnet.models.tracing.tracers import trace_model, trace_with_fx, untraceable

__all__ = ["Part", "assemble", "nodes_inside", "submodules", "trace_block_by_block"]

Part = str | nn.Module | Callable[[Tensor], Tensor]


def submodules(model: nn.Module, blocks: Sequence[str | nn.Module]) -> dict[str, nn.Module]:
    """Return submodules of a model by name.

    Args:
        blocks: their names, or the modules themselves.

    Raises:
        ValueError: one does not belong to the model.
    """
    named: dict[str, nn.Module] = {}
    names = {module: name for name, module in model.named_modules()}
    for block in blocks:
        if isinstance(block, str):
            try:
                named[block] = model.get_submodule(block)
            except AttributeError:
                raise ValueError(f"blocks: the model has no submodule {block!r}") from None
        elif isinstance(block, nn.Module) and block in names:
            named[names[block]] = block
        else:
            raise ValueError(
                f"blocks: expected submodules of the model, their names, or pairs (skip, residual), "
                f"got {type(block).__name__}"
            )
    return named


def nodes_inside(traced: TracedGraph, names: Sequence[str]) -> set[fx.Node]:
    """Return the nodes that are inside one of the named modules."""
    return {
        node
        for node in traced.graph.nodes
        if any(path == name or path.startswith(f"{name}.") for path in module_paths(node) for name in names)
    }


def trace_block_by_block(root: nn.Module, blocks: Mapping[str, nn.Module], example: Example) -> TracedGraph:
    """Return a trace by ``torch.fx`` of everything around the blocks, with a trace of each block spliced in.

    Args:
        root: a module of the example's tensors that contains the model as ``model``.
        blocks: the blocks by their names in the model.

    Raises:
        ValueError: a block is not called exactly once with one tensor; or a block, or the rest, cannot be traced.
    """
    inputs = _block_inputs(root, blocks, example)
    outer = _trace_around(root, blocks, example)
    graph, attributes = fx.Graph(), dict(outer.attributes)
    copies: dict[fx.Node, Any] = {}
    frozen, dropouts = list(outer.frozen_statistics), list(outer.dropouts)
    untraced: list[nn.Module] = []
    for node in outer.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node.op == "call_module" and node.target in blocks:
            (x,) = node.args
            inner = _traced_block(blocks[node.target], inputs[node.target], node.target)
            copies[node] = _splice(graph, attributes, inner, copies[x], node.target)
            frozen += inner.frozen_statistics
            untraced += inner.untraced
            dropouts += [(f"{node.target}.{name}", dropout) for name, dropout in inner.dropouts]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    traced_by = outer.traced_by
    if untraced:
        names = [name.removeprefix("model.") for name, module in root.named_modules() if module in untraced]
        traced_by += f"{',' if ' ' in traced_by else ' around'} {', '.join(names)}"
    return TracedGraph(graph, attributes, traced_by, tuple(frozen), tuple(untraced), tuple(dropouts))


def _trace_around(root: nn.Module, blocks: Mapping[str, nn.Module], example: Example) -> TracedGraph:
    """Return a trace in which each block is one node, and each other module whose control flow depends on values."""
    modules = list(blocks.values())
    try:
        return trace_with_fx(root, example, modules)
    except Exception:
        opened = {
            module
            for name, module in root.get_submodule("model").named_modules()
            if not name or any(block.startswith(f"{name}.") for block in blocks)
        }
        return trace_with_decisions(root, example, modules, opened)


def _block_inputs(root: nn.Module, blocks: Mapping[str, nn.Module], example: Example) -> dict[str, Tensor]:
    """Return the input of each block for the example."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name in inputs or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                raise ValueError(f"blocks: expected {name!r} to be called once, with one tensor; give its branches")
            inputs[name] = args[0].detach().clone()

        return hook

    handles = [module.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, module in blocks.items()]
    try:
        with torch.no_grad():
            root(*example.copies())
    finally:
        for handle in handles:
            handle.remove()
    for name in blocks:
        if name not in inputs:
            raise ValueError(f"blocks: {name!r} is not called for this example")
    return inputs


def _splice(graph: fx.Graph, attributes: dict[str, Any], inner: TracedGraph, x: Any, name: str) -> Any:
    """Copy a block's operations into the graph around it, and return the node of its output.

    Args:
        attributes: those of the graph around it; the block's are added.
        x: the node of the block's input.
        name: the block's name in the model.
    """
    copies: dict[fx.Node, Any] = {}
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            copies[node] = x
        elif node.op == "output":
            return copies[node.args[0]]
        else:
            copies[node] = copied = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copied.target = f"{name}.{node.target}"
                attributes[copied.target] = inner.attributes[str(node.target)]
            paths = [name, *(f"{name}.{path}" for path in module_paths(node))]
            # As in a trace of the root, which contains the model as ``model``.
            copied.meta = {"nn_module_stack": {path: (f"model.{path}", nn.Module) for path in paths}}
    raise AssertionError("a graph without an output")


def _traced_block(module: nn.Module, x: Tensor, name: str) -> TracedGraph:
    with torch.no_grad():
        expected = torch.as_tensor(module(x.clone()))
    root, example = _TraceRoot(module), Example.of_tensor(x)
    traced, failures = trace_model(root, module, lambda output: output, example, expected)
    if traced is None:
        try:
            traced = trace_with_decisions(root, example, [], {module})
            if not differs(ReadOnlyInterpreter(traced.attributes, traced.graph).run(x), expected):
                return traced
        except Exception as error:
            failures["with its control flow as for the example"] = first_line(error)
        advice = "give its branches as a pair (skip, residual)"
        raise ValueError(f"blocks: {name!r} {untraceable(failures, advice)}")
    return traced


class _TraceRoot(nn.Module):
    """The root of a trace: a module, or a function over its submodules."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.function is None else self.function(x)


class _OnCopy(nn.Module):
    """Applies a module, which may change its input in place, to a copy of the input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.module(x.clone()))


def assemble(
    model: nn.Module, example: Example, stem: Part, blocks: Sequence[Sequence[Part | None]], head: Part
) -> Dissection:
    """Return a model from its parts: submodules, their names, or functions over its submodules.

    Args:
        blocks: (skip, residual) or (skip, residual, join) of each block; None for the identity.

    Raises:
        ValueError: a part is none of those, rejects the output of the part before it, or does not keep the batch in
            the first dimension.
    """
    if example.structure.kind != "tensor":
        raise ValueError("example: expected one tensor where blocks are pairs of branches, got several inputs")
    (x,) = example.tensors
    stem_module, y = _part(model, "stem", stem, x)
    assert stem_module is not None
    shapes = [y.shape[1:]]
    traced_blocks: list[TracedBlock] = []
    for i, parts in enumerate(blocks):
        if len(parts) not in (2, 3):
            raise ValueError(
                f"blocks: expected pairs (skip, residual) or (skip, residual, join), got {len(parts)} parts"
            )
        skip, skip_output = _part(model, f"the skip of block {i}", parts[0], y)
        residual, residual_output = _part(model, f"the residual module of block {i}", parts[1], y)
        join, output = _part(
            model, f"the join of block {i}", parts[2] if len(parts) > 2 else None, skip_output + residual_output
        )
        if residual is None:
            raise ValueError(f"blocks: expected a residual module in block {i}, got None")
        if output.shape[:1] != x.shape[:1]:
            raise ValueError(f"blocks: expected the batch in the first dimension, got {list(output.shape)}")
        name = parts[1] if isinstance(parts[1], str) else f"block {i}"
        pad_before = zeros_before(skip, residual, y, residual_output.shape)
        traced_blocks.append(TracedBlock(name, None, skip, residual, join, pad_before))
        y = output
        shapes.append(y.shape[1:])
    head_module, _ = _part(model, "head", head, y)
    assert head_module is not None
    return Dissection(InputReader(example.structure), stem_module, traced_blocks, head_module, shapes, [])


def _part(model: nn.Module, name: str, part: Part | None, x: Tensor) -> tuple[nn.Module | None, Tensor]:
    """Return a part as a module, None for the identity, and its output for ``x``.

    Args:
        name: the part's name in errors.
    """
    if part is None:
        return None, x
    if isinstance(part, str):
        (part,) = submodules(model, [part]).values()
    if not callable(part):
        raise ValueError(f"{name}: expected a submodule, its name or a function, got {type(part).__name__}")
    try:
        with torch.no_grad():
            output = part(x.clone())
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"{name}: rejects the output of the part before it, {list(x.shape)} ({error})") from error
    is_module = isinstance(part, nn.Module)
    root = _TraceRoot(part) if is_module else _TraceRoot(model, part)  # type: ignore[arg-type]
    try:
        traced = trace_with_fx(root, Example.of_tensor(x))
        module = fx.GraphModule(traced.attributes, traced.graph)
        if torch.equal(module(x), output):
            return module, output
        reason = "its trace computes something else"
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
    if isinstance(part, nn.Module):
        return _OnCopy(part), output
    raise ValueError(f"{name}: expected a function that torch.fx can trace, or a module ({reason.splitlines()[0]})")
