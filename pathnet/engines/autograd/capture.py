"""A block's forward pass and pull-backs as one graph of ATen operators."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pathnet.models.context import Context
from pathnet.models.residual_net import Block

__all__ = ["CAPTURING", "NotCapturedError", "capture", "is_view", "random_like"]

aten = torch.ops.aten

CAPTURING = RLock()
"""Held during a capture: tracing replaces methods of `torch.nn.Module` for the whole process, and puts them back."""

READS = {
    getattr(Tensor, name)
    for name in ("__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage")
}
"""Methods that hand values out without an operator, so that a trace takes them for constants."""


class NotCapturedError(Exception):
    """A block whose operators depend on values, draw random numbers, or change tensors that others read."""


class _ReadsRefused(TorchFunctionMode):
    """Refusal of `READS`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise NotCapturedError(f"{func.__name__} reads values")
        return func(*args, **(kwargs or {}))


def capture(
    block: Block, context: Context, x: Tensor, copies: bool, wanted: Sequence[int], to: torch.dtype
) -> tuple[fx.GraphModule, list[Tensor]]:
    """Trace a block at an example input.

    Args:
        block: not bound to a context yet.
        copies: see `plain_pullbacks`.
        wanted: the pull-backs to trace: 0 is the join's, 1 + j that of part j.
        to: the type of the gradients between blocks.

    Returns:
        A graph of (x, gradients of the wanted pull-backs, tensors of the context) that returns the block's output,
        then the pulled gradients, without operators that change a tensor; and the inputs that it was traced at.

    Raises:
        NotCapturedError: there is no such graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    names = [name for name, value in context.values.items() if isinstance(value, Tensor)]

    def run(x: Tensor, grads: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        bound = block
        if context.values:
            traced = {**context.values, **dict(zip(names, values, strict=True))}
            bound = block.bound(Context(traced, context.batch_dims))
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            entry = leaf.clone() if copies else leaf
            parts = bound.parts(entry)
            z = bound.summed(parts).detach().requires_grad_()
            y = bound.join(z.clone() if copies else z)
        pairs: list[tuple[Any, Tensor]] = [(y, z), *((part, leaf) for part in parts)]
        pulled = []
        for number, grad in zip(wanted, grads, strict=True):
            output, source = pairs[number]
            grad = grad.to(output.dtype)
            pulled.append(torch.autograd.grad(output, source, grad, retain_graph=True)[0].to(to))
        return [y.detach(), *pulled]

    bound = block.bound(context)
    with torch.no_grad():
        z = bound.summed(bound.parts(x.clone()))
        y = bound.join(z.clone())
    grads = [random_like(z if number else y, to) for number in wanted]
    values = [context.values[name] for name in names]
    try:
        with _ReadsRefused():
            traced = make_fx(run)(x, grads, values)
        _without_mutations(traced.graph)
        _check(traced.graph)
    except NotCapturedError:
        raise
    except Exception as error:
        raise NotCapturedError(f"{type(error).__name__}: {error}") from error
    return traced, [x, *grads, *values]


def random_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return normal numbers in the shape and strides of a tensor; PyTorch's own generator is left alone."""
    generator = torch.Generator("cpu").manual_seed(tensor.numel())
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
    return torch.empty_like(tensor, dtype=dtype).copy_(numbers)


def schema_of(node: fx.Node) -> Any:
    """Return the schema of a node's operator; None for other nodes."""
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def is_view(node: fx.Node) -> bool:
    """Return whether a node's result shares the memory of its input."""
    schema = schema_of(node)
    if schema is None:
        return node.target is operator.getitem and is_view(node.args[0])  # type: ignore[arg-type]
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def _without_mutations(graph: fx.Graph) -> None:
    """Replace operators that change a tensor by those that return a new one, and remove detachments."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = schema_of(node)
        if schema is None or not schema.is_mutable:
            continue
        target, operator_ = node.args[0], _functional(schema)
        fresh = isinstance(target, fx.Node) and target.op == "call_function" and not is_view(target)
        before = [user for user in target.users if place[user] < place[node]] if fresh else []
        if operator_ is None or not fresh or any(is_view(user) for user in before):
            raise NotCapturedError(f"{schema.name} changes a tensor that others may read")
        with graph.inserting_before(node):
            new = graph.call_function(operator_, node.args, node.kwargs)
        new.meta = node.meta
        place[new] = place[node]
        for user in [user for user in target.users if place[user] > place[node]]:
            user.replace_input_with(target, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _functional(schema: Any) -> Any:
    """Return the operator that computes what an in-place one writes; None if there is none."""
    name = schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    overload = schema.overload_name or "default"
    return getattr(packet, overload, None)


def _check(graph: fx.Graph) -> None:
    """Raise NotCapturedError for operators whose shapes depend on values, and for those that draw random numbers."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape in tags and not _indexes_by_numbers(node):
            raise NotCapturedError(f"{node.target} returns a shape that depends on values")
        if torch.Tag.nondeterministic_seeded not in tags:
            continue
        # Attention counts as random for its dropout alone.
        arguments = node.target._schema.arguments
        settings = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        settings |= dict(zip([argument.name for argument in arguments], node.args, strict=False)) | dict(node.kwargs)
        if settings.get("dropout_p") != 0:
            raise NotCapturedError(f"{node.target} draws random numbers")


def _indexes_by_numbers(node: fx.Node) -> bool:
    """Return whether a node selects by integers, which give one shape, and not by a mask."""
    if node.target is not aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    masks = (torch.bool, torch.uint8)
    return all(index is None or index.meta["val"].dtype not in masks for index in indices)
