"""A model traced by `torch.export`, as a plain graph over the model's own parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.tracing.graphs import operation

__all__ = ["exported"]

aten = torch.ops.aten
REASON_LENGTH = 400
"""Maximum number of characters quoted from an error of torch.export, which can fill pages."""

CASTS = {aten.to, aten.type_as, aten._to_copy}


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def exported(model: nn.Module, example: Tensor, choose: Callable[[Any], Any] = _logits) -> fx.GraphModule:
    """Return the model in evaluation mode as a graph of ATen operations, for batches of any size.

    Parameters and buffers are the model's own objects under their own names, so training the graph trains the
    model. Hugging Face models run without a cache. Shapes other than the batch size are fixed, and so are dropout
    (none) and batch normalisation (running statistics).

    Casts without effect are dropped: a model writes ``x.to(other.dtype)``, its trace a fixed dtype, which would be
    wrong in a copy of another precision.

    Args:
        example: an input of the model, batch first: floating-point [B, C, H, W], int64 [B, T], ...
        choose: maps the model's result to the output tensor; by default its logits, or the result if it has none.

    Returns:
        A module of one input tensor and one output tensor, with in-place operations where the model has them. Each
        node's ``meta["val"]`` holds shape and dtype, with a symbol for the batch size.

    Raises:
        ValueError: the model cannot be exported for batches of any size, its output is not a tensor, or a weight is
            neither float32 nor float64.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model: expected float32 or float64 weights, got {parameter.dtype} in {name}; model.float() makes "
                "them float32"
            )
    inputs = example.detach() if len(example) > 1 else torch.cat([example.detach()] * 2)
    with _evaluating(model), torch.enable_grad():
        try:
            program = torch.export.export(
                _ExportRoot(model, choose), (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
            raise ValueError(f"model: torch.export fails for batches of any size ({reason})") from error
    return _plain(program.module(), model, tuple(example.shape[1:]))


class _ExportRoot(nn.Module):
    """A model reduced to one tensor in, one tensor out."""

    def __init__(self, model: nn.Module, choose: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.choose = model, choose
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.arguments = {"use_cache": False} if takes_cache else {}

    def forward(self, x: Tensor) -> Tensor:
        output = self.choose(self.model(x, **self.arguments))
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


@operation
def checked_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``x`` after a check that it has the traced shape, [B, *shape].

    Raises:
        ValueError: it has another shape.
    """
    if tuple(x.shape[1:]) != shape:
        traced = ", ".join(map(str, shape))
        raise ValueError(f"images: expected the shape that was traced, [B, {traced}], got {list(x.shape)}")
    return x


def _plain(module: fx.GraphModule, model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """Return the graph without what torch.export adds: argument trees, guards, assertions, the wrapper's name."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            (results,) = node.args
            graph.output(copied[results[0]])
        elif node.op == "placeholder":
            copied[node] = graph.call_function(checked_shape, (graph.node_copy(node), shape))
            copied[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            name, attribute = _attribute(str(node.target), module, model)
            attributes[name] = attribute
            copied[node] = graph.get_attr(name)
            copied[node].meta = dict(node.meta)
        elif not _is_check(node):
            copied[node] = _copy(graph, node, copied)
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


def _copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """Copy an operation, without a dtype argument that its input already satisfies."""
    overload, arguments = node.target, _arguments(node)
    value = next(iter(arguments.values()), None)
    if not isinstance(overload, torch._ops.OpOverload) or not isinstance(value, fx.Node):
        return graph.node_copy(node, copied.__getitem__)
    before, after = value.meta["val"], node.meta["val"]
    if overload is aten.detach_.default and value.target is aten.lift_fresh_copy.default:
        return copied[value]
    if overload.overloadpacket in CASTS and before.dtype == after.dtype and before.device == after.device:
        copies = overload.overloadpacket is aten._to_copy or arguments.get("copy")
        if not copies and not arguments.get("memory_format"):
            return copied[value]
        clone = graph.call_function(
            aten.clone.default, (copied[value],), {"memory_format": arguments.get("memory_format")}
        )
        clone.meta = dict(node.meta)
        return clone
    copy = graph.node_copy(node, copied.__getitem__)
    if overload.overloadpacket not in CASTS and arguments.get("dtype") == getattr(before, "dtype", None) is not None:
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
