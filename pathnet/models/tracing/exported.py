"""What ``torch.export`` makes of a model, as a plain graph over the model's own parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["exported"]

aten = torch.ops.aten
REASON = 400
"""So many letters of an error of torch.export, which goes on for pages."""

CASTS = {aten.to, aten.type_as, aten._to_copy}


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def exported(model: nn.Module, example: Tensor, choose: Callable[[Any], Any] = _logits) -> fx.GraphModule:
    """The model in evaluation mode as a graph of ATen operations, for batches of any size.

    Parameters and buffers are the model's own objects under its own names, so that training the graph trains the
    model. Hugging Face models are asked for no cache. What was traced of the shape, all but the batch, is fixed; so
    are dropout (none) and batch normalisation (running statistics).

    Casts that changed nothing are left out: a model writes ``x.to(other.dtype)``, and its trace a fixed type, which
    would be wrong in a copy of another precision.

    Args:
        example: an input as the model takes it, batch first: floating-point [B, C, H, W], int64 [B, T], ...
        choose: takes what the model gives to the output; its logits, or itself where it has none, by default.

    Returns:
        A module of one tensor in, one tensor out, with operations in place where the model has them. Each node's
        ``meta["val"]`` tells shape and type, with a symbol for the batch.

    Raises:
        ValueError: the model cannot be exported for batches of any size, gives no such tensor, or has
            weights that are neither float32 nor float64.
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
                _Chosen(model, choose), (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:REASON] or type(error).__name__
            raise ValueError(f"model: torch.export fails for batches of any size ({reason})") from error
    return _plain(program.module(), model, tuple(example.shape[1:]))


class _Chosen(nn.Module):
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
    """Each module's mode is its own afterwards: some may have been in evaluation mode for good."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def checked_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What the graph begins with: ``x``, once it is found to be of the shape [B, *shape] that was traced.

    Raises:
        ValueError: it is of another.
    """
    if tuple(x.shape[1:]) != shape:
        traced = ", ".join(map(str, shape))
        raise ValueError(f"images: expected the shape that was traced, [B, {traced}], got {list(x.shape)}")
    return x


def _plain(module: fx.GraphModule, model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """Without what belongs to export alone: trees of arguments, guards, assertions, the wrapper's name."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    held: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            (results,) = node.args
            graph.output(copied[results[0]])
        elif node.op == "placeholder":
            copied[node] = graph.call_function(checked_shape, (graph.node_copy(node), shape))
            copied[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            name, held_tensor = _original(str(node.target), module, model)
            held[name] = held_tensor
            copied[node] = graph.get_attr(name)
            copied[node].meta = dict(node.meta)
        elif not _is_check(node):
            copied[node] = _copy(graph, node, copied)
    graph.eliminate_dead_code()
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: held[name] for name in held if name in targets}, graph)


def _original(name: str, module: fx.GraphModule, model: nn.Module) -> tuple[str, Any]:
    """The model's own parameter or buffer and its name there; or a constant that the trace found."""
    own = name.removeprefix("model.")
    if own != name:
        with suppress(AttributeError):
            return own, attrgetter(own)(model)
    return name, attrgetter(name)(module)


def _is_check(node: fx.Node) -> bool:
    return any(part in str(node.target) for part in ("_guards_fn", "_assert", "sym_constrain_range"))


def _copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """One operation, without the type that it is told to give or work in where its input has that type anyway."""
    overload, given = node.target, _arguments(node)
    value = next(iter(given.values()), None)
    if not isinstance(overload, torch._ops.OpOverload) or not isinstance(value, fx.Node):
        return graph.node_copy(node, copied.__getitem__)
    before, after = value.meta["val"], node.meta["val"]
    if overload is aten.detach_.default and value.target is aten.lift_fresh_copy.default:
        return copied[value]
    if overload.overloadpacket in CASTS and before.dtype == after.dtype and before.device == after.device:
        if overload.overloadpacket is not aten._to_copy and not given.get("copy") and not given.get("memory_format"):
            return copied[value]
        own = graph.call_function(aten.clone.default, (copied[value],), {"memory_format": given.get("memory_format")})
        own.meta = dict(node.meta)
        return own
    own = graph.node_copy(node, copied.__getitem__)
    if overload.overloadpacket not in CASTS and given.get("dtype") == getattr(before, "dtype", None) is not None:
        first, *_ = own.args
        own.args = (first,)
        own.kwargs = {
            name: fx.map_arg(argument, copied.__getitem__)
            for name, argument in list(given.items())[1:]
            if name != "dtype"
        }
    return own


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Those that an ATen operation is given, by name, in order."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
