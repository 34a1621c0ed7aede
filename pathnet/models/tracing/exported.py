"""A model traced by `torch.export`, as a plain graph over the model's own parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.inputs import InputStructure
from pathnet.models.shape_guards import ShapeGuards
from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.graphs import placeholders
from pathnet.models.tracing.network_types import floating_dependents
from pathnet.models.tracing.operations import allow_any_strides

__all__ = ["exported"]

aten = torch.ops.aten
REASON_LENGTH = 160
"""Maximum number of characters quoted from an error of torch.export, which can fill pages."""
ADVICE_ON_LOGS = re.compile(r"For (more|extended) (information|logs)\b.*?TORCH\w+=\S+")
"""Sentence in an error of torch.export that says nothing of the model."""

CASTS = {aten.to, aten.type_as, aten._to_copy}
NEED_STRIDES = {aten.view.dtype, aten.view_as_complex.default, aten.as_strided.default, aten.sym_stride.int}
"""Operations that depend on strides, without a counterpart that takes any."""


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def exported(
    model: nn.Module, example: Example, choose: Callable[[Any], Any] = _logits
) -> tuple[fx.GraphModule, ShapeGuards]:
    """Return the model in evaluation mode as a graph of ATen operations, for batches of any size.

    Parameters and buffers are the model's own objects under their own names, so training the graph trains the
    model. Other dimensions than the batch are free too, as far as the model's own control flow leaves them. Fixed are
    dropout (none) and batch normalisation (running statistics).

    Casts without effect are dropped: a model writes ``x.to(other.dtype)``, its trace a fixed dtype, which would be
    wrong in a copy of another precision. Views take tensors of any strides: a trace omits ``x.contiguous()`` where it
    has no effect in the trace, but strides depend on the kernels, and so on device, dtype and version of PyTorch.

    Args:
        example: an input of the model.
        choose: maps the model's result to the output tensor; by default its logits, or the result if it has none.

    Returns:
        A module of the example's tensors and one output tensor, with in-place operations where the model has them.
        Each node's ``meta["val"]`` holds shape and dtype, with symbols for free sizes. And the conditions on shapes
        under which it equals the model.

    Raises:
        ValueError: the model cannot be exported for batches of any size, or its output is not a tensor.
    """
    structure = example.structure
    batch = structure.batch(example.tensors)
    tensors = example.tensors if batch > 1 else example.twice().tensors
    with _evaluating(model), torch.enable_grad():
        program = _export(_ExportRoot(model, structure, choose), tensors, structure.batch_dims)
    module = program.module()
    return _plain(module, model), _guards(module, program, tensors, structure.batch_dims)


def _export(
    root: nn.Module, tensors: tuple[Tensor, ...], batch_dims: Sequence[int | None]
) -> torch.export.ExportedProgram:
    """Export with the sizes of sequences free, or else the batch size alone.

    The sides of images are fixed: symbols for them make an export slow, and few models take others.
    """
    dim = torch.export.Dim
    lengths = _lengths(tensors)
    free = [
        [d for d in range(tensor.ndim) if d != batch_dim and (_is_sequence(tensor) or tensor.shape[d] in lengths)]
        for tensor, batch_dim in zip(tensors, batch_dims, strict=True)
    ]
    for of_free in (dim.AUTO, dim.STATIC) if any(free) else (dim.STATIC,):
        sizes = [
            {
                d: dim.DYNAMIC if d == batch_dim else of_free if d in free_dims else dim.STATIC
                for d in range(tensor.ndim)
            }
            for tensor, batch_dim, free_dims in zip(tensors, batch_dims, free, strict=True)
        ]
        try:
            return torch.export.export(root, (tensors,), dynamic_shapes=(tuple(sizes),), strict=False)
        except Exception as error:
            if of_free is dim.STATIC:
                raise ValueError(f"model: torch.export fails for batches of any size ({_reason(error)})") from error
    raise AssertionError


def _reason(error: Exception) -> str:
    """Return the first sentence of an error, cut short; the rest is about torch's own code."""
    sentence = " ".join(ADVICE_ON_LOGS.sub("", str(error)).split()).partition(". ")[0] or type(error).__name__
    return sentence if len(sentence) <= REASON_LENGTH else f"{sentence[:REASON_LENGTH]}..."


def _is_sequence(tensor: Tensor) -> bool:
    """Return whether a tensor is tokens, a mask, or a sequence of vectors, rather than images."""
    return tensor.ndim < 4 or not tensor.is_floating_point()


def _lengths(tensors: Sequence[Tensor]) -> set[int]:
    """Return the lengths of the sequences of tokens among the tensors."""
    return {tensor.shape[1] for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()}


def _guards(
    module: fx.GraphModule,
    program: torch.export.ExportedProgram,
    tensors: Sequence[Tensor],
    batch_dims: Sequence[int | None],
) -> ShapeGuards:
    """Return what a trace assumes of its inputs' shapes."""
    sizes: list[list[int | None]] = []
    conditions: list[str] = []
    first: dict[str, str] = {}
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    for i, value in enumerate(values):
        sizes.append([size if isinstance(size, int) else None for size in value.shape])
        for dim, size in enumerate(value.shape):
            symbol, text = str(size), f"shape[{i}][{dim}]"
            if isinstance(size, int):
                continue
            if symbol in first:
                conditions.append(f"{text} == {first[symbol]}")
            first.setdefault(symbol, text)
            upper = str(ranges[symbol].upper) if symbol in ranges else ""
            if upper.isdigit():
                conditions.append(f"{text} <= {upper}")
    # Private, and the only place where torch.export keeps them.
    further = getattr(program, "_guards_code", [])
    conditions += [re.sub(r"L\['inputs'\]\[(\d+)\]\.size\(\)", r"shape[\1]", text) for text in further]
    return ShapeGuards.of(sizes, conditions, tensors, batch_dims)


class _ExportRoot(nn.Module):
    """A model reduced to its tensors in, one tensor out."""

    def __init__(self, model: nn.Module, structure: InputStructure, choose: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.structure, self.choose = model, structure, choose

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        output = self.choose(self.structure.call(self.model, inputs))
        if not isinstance(output, Tensor):
            raise ValueError(f"expected an output that is a tensor or has logits, got {type(output).__name__}")
        return output


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each module afterwards: they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _plain(module: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Return the graph without what torch.export adds: argument trees, guards, assertions, the wrapper's name."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    targets = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    floating = floating_dependents(
        module.graph,
        {target: attrgetter(target)(module) for target in targets},
        (node for node in placeholders(module.graph) if node.meta["val"].is_floating_point()),
    )
    for node in module.graph.nodes:
        if node.op == "output":
            (results,) = node.args
            graph.output(copied[results[0]])
        elif node.op == "placeholder":
            copied[node] = graph.node_copy(node)
        elif node.op == "get_attr":
            name, attribute = _attribute(str(node.target), module, model)
            attributes[name] = attribute
            copied[node] = graph.get_attr(name)
            copied[node].meta = dict(node.meta)
        elif not _is_check(node):
            copied[node] = _copy(graph, node, copied, floating)
    graph.eliminate_dead_code()
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: attributes[name] for name in attributes if name in targets}, graph)


def _attribute(name: str, module: fx.GraphModule, model: nn.Module) -> tuple[str, Any]:
    """Return the model's parameter or buffer and its name in the model; or a constant that the trace introduced."""
    model_name = name.removeprefix("model.")
    if model_name != name:
        with suppress(AttributeError):
            return model_name, attrgetter(model_name)(model)
    return name, attrgetter(name)(module)


def _is_check(node: fx.Node) -> bool:
    return any(part in str(node.target) for part in ("_guards_fn", "_assert", "sym_constrain_range"))


def _copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node], floating: Collection[fx.Node]) -> fx.Node:
    """Copy an operation, without a dtype argument that its input already satisfies in a copy of any type.

    Args:
        floating: the nodes whose values have the network's type.
    """
    overload, arguments = node.target, _arguments(node)
    value = next(iter(arguments.values()), None)
    if not isinstance(overload, torch._ops.OpOverload) or not isinstance(value, fx.Node):
        return graph.node_copy(node, copied.__getitem__)
    before, after = value.meta["val"], node.meta["val"]
    if overload in NEED_STRIDES and before.is_contiguous():
        contiguous = graph.call_function(aten.contiguous.default, (copied[value],))
        contiguous.meta = dict(value.meta)
        copied = {**copied, value: contiguous}
    if overload is aten.detach_.default and value.target is aten.lift_fresh_copy.default:
        return copied[value]
    satisfied = value in floating or not (isinstance(before, Tensor) and before.is_floating_point())
    if (
        satisfied
        and overload.overloadpacket in CASTS
        and before.dtype == after.dtype
        and before.device == after.device
    ):
        copies = overload.overloadpacket is aten._to_copy or arguments.get("copy")
        if not copies and not arguments.get("memory_format"):
            return copied[value]
        clone = graph.call_function(
            aten.clone.default, (copied[value],), {"memory_format": arguments.get("memory_format")}
        )
        clone.meta = dict(node.meta)
        return clone
    copy = graph.node_copy(node, copied.__getitem__)
    allow_any_strides(copy)
    if (
        satisfied
        and overload.overloadpacket not in CASTS
        and arguments.get("dtype") == getattr(before, "dtype", None) is not None
    ):
        first, *_ = copy.args
        copy.args = (first,)
        copy.kwargs = {
            name: fx.map_arg(argument, copied.__getitem__)
            for name, argument in list(arguments.items())[1:]
            if name != "dtype"
        }
    return copy


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen operation by name, in order; none for other operations."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
