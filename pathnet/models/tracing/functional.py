"""Functionalization: in-place operations become out-of-place ones, so a graph's edges show all data flow."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.tracing.aliases import Aliases, written_through
from pathnet.models.tracing.graphs import describe_node, operation
from pathnet.models.tracing.operations import allow_any_strides

__all__ = ["functionalize", "with_item"]

NAMES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "xor")
OPERATORS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in NAMES}
OPERATORS |= {operator.iand: operator.and_, operator.ior: operator.or_}


@operation
def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of ``x`` with ``x[index] = value``."""
    x = x.clone()
    x[index] = value
    return x


def functionalize(graph: fx.Graph, attributes: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> fx.Graph:
    """Return the graph with every in-place operation replaced by an out-of-place one, and without `nn.Identity`.

    Later readers of a changed tensor, of its views and of what it is a view of, read the new values. Views become
    reshapes, which are the same where nothing is in place and take any memory layout: a part of the network may get a
    tensor in another one than the model does, such as with the batch first.

    Args:
        attributes: the modules that the graph refers to, by name.
        values: the value of each node in one run of ``graph``, all of them alive.

    Raises:
        ValueError: an operation writes into a tensor in a way that has no out-of-place counterpart.
    """
    result = fx.Graph()
    aliases = Aliases(graph, values)
    # The new node with the current value of each old node.
    current: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            result.output(fx.map_arg(node.args[0], current.__getitem__))
            continue
        if node.op == "call_module" and type(attributes[str(node.target)]) is nn.Identity:
            current[node] = current[node.all_input_nodes[0]]
            continue
        changed = _changed_input(node, attributes, values)
        inputs = dict(current)
        if changed is not None and _needs_copy(node):
            inputs[changed] = result.call_function(torch.clone, (current[changed],))
            inputs[changed].meta = dict(node.meta)
        new_node = result.node_copy(node, inputs.__getitem__)
        if changed is not None or _may_be_in_place(node):
            new_node.target, new_node.args, new_node.kwargs = _out_of_place(new_node)
        current[node] = new_node
        if changed is not None:
            aliases.update(result, current, changed, node, new_node)
    _erase_unused_views(result)
    for node in result.nodes:
        allow_any_strides(node)
    return result


def _erase_unused_views(graph: fx.Graph) -> None:
    """Erase views, and writes through them, that nothing reads any more."""
    for node in reversed(graph.nodes):
        is_view = node.op in ("call_function", "call_method") and not node.users
        if is_view:
            graph.erase_node(node)


def _may_be_in_place(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in OPERATORS


def _changed_input(node: fx.Node, attributes: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> fx.Node | None:
    """Return the node whose tensor an operation changes in place, or None."""
    if isinstance(node.kwargs.get("out"), (fx.Node, tuple, list)):
        raise ValueError(f"{describe_node(node)} writes its result into another tensor (out=), which has no gradient")
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if first is None or not isinstance(values[first], Tensor) or node.op not in _IS_IN_PLACE:
        return None
    return first if _IS_IN_PLACE[node.op](node, attributes) else None


def _module_in_place(node: fx.Node, attributes: Mapping[str, Any]) -> bool:
    module = attributes[str(node.target)]
    return isinstance(module, nn.Module) and getattr(module, "inplace", False) is True


def _method_in_place(node: fx.Node, attributes: Mapping[str, Any]) -> bool:
    name = str(node.target)
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _function_in_place(node: fx.Node, attributes: Mapping[str, Any]) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable and str(target.overloadpacket).endswith("_")
    if target in OPERATORS or target is operator.setitem:
        return True
    name = getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or _inplace_argument(node) is True


_IS_IN_PLACE: dict[str, Callable[[fx.Node, Mapping[str, Any]], bool]] = {
    "call_module": _module_in_place,
    "call_method": _method_in_place,
    "call_function": _function_in_place,
}


def _inplace_argument(node: fx.Node) -> Any:
    """Return the argument ``inplace`` of a function call, or None if the function has none."""
    assert callable(node.target)
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace")
    except (TypeError, ValueError):
        return None


def _needs_copy(node: fx.Node) -> bool:
    """Return whether an in-place operation has no out-of-place counterpart, and must run on a copy."""
    if node.op == "call_module":
        return True
    return node.op == "call_method" and not hasattr(Tensor, str(node.target).removesuffix("_"))


def _out_of_place(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return target, args and kwargs of the out-of-place counterpart of an operation."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if node.op == "call_module" or _needs_copy(node):
        return target, args, kwargs
    if node.op == "call_method":
        return str(target).removesuffix("_"), args, kwargs
    if target in OPERATORS:
        return OPERATORS[target], args, kwargs
    if target is operator.setitem:
        return with_item, args, kwargs
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::").removesuffix("_")
        if name == "copy":
            # The out-of-place operation has no derivative.
            return written_through, args[:2], {}
        return getattr(getattr(torch.ops.aten, name), target._overloadname), args, kwargs
    assert callable(target)
    name = getattr(target, "__name__", "")
    if name.endswith("_"):
        return getattr(torch, name[:-1], None) or getattr(F, name[:-1]), args, kwargs
    bound = inspect.signature(target).bind(*args, **kwargs)
    bound.arguments["inplace"] = False
    return target, bound.args, bound.kwargs
