"""Operations in place as operations that make new tensors, so that a graph's edges tell all that flows."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["functional", "with_item"]

NAMES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "xor")
OPERATORS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in NAMES}
OPERATORS |= {operator.iand: operator.and_, operator.ior: operator.or_}


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x`` with ``x[index] = value``, as a new tensor."""
    x = x.clone()
    x[index] = value
    return x


def functional(graph: fx.Graph, held: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> fx.Graph:
    """The graph with each operation in place replaced by one that makes a new tensor, and without `nn.Identity`.

    What reads a tensor after it was changed reads the new one. A change through a view is not followed: whoever
    traces compares the graph's output with the model's.

    Args:
        held: the modules that the graph names.
        values: what each node gave in one run of ``graph``, all of them alive.
    """
    result = fx.Graph()
    now: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            result.output(fx.map_arg(node.args[0], now.__getitem__))
            continue
        if node.op == "call_module" and type(held[str(node.target)]) is nn.Identity:
            now[node] = now[node.all_input_nodes[0]]
            continue
        changed = _changed(node, held, values)
        before = dict(now)
        if changed is not None and _needs_copy(node):
            before[changed] = result.call_function(torch.clone, (now[changed],))
            before[changed].meta = dict(node.meta)
        own = result.node_copy(node, before.__getitem__)
        if changed is not None or _may_be_in_place(node):
            own.target, own.args, own.kwargs = _out_of_place(own)
        now[node] = own
        if changed is not None:
            for other in list(now):
                if _same(values[other], values[changed]):
                    now[other] = own
    return result


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one tensor."""
    if one is other:
        return True
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _may_be_in_place(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in OPERATORS


def _changed(node: fx.Node, held: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The node whose tensor an operation changes, or None."""
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if first is None or not isinstance(values[first], Tensor) or node.op not in _IS_IN_PLACE:
        return None
    return first if _IS_IN_PLACE[node.op](node, held) else None


def _module_in_place(node: fx.Node, held: Mapping[str, Any]) -> bool:
    module = held[str(node.target)]
    return isinstance(module, nn.Module) and getattr(module, "inplace", False) is True


def _method_in_place(node: fx.Node, held: Mapping[str, Any]) -> bool:
    name = str(node.target)
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _function_in_place(node: fx.Node, held: Mapping[str, Any]) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable and str(target.overloadpacket).endswith("_")
    if target in OPERATORS or target is operator.setitem:
        return True
    name = getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or _flag(node) is True


_IS_IN_PLACE: dict[str, Callable[[fx.Node, Mapping[str, Any]], bool]] = {
    "call_module": _module_in_place,
    "call_method": _method_in_place,
    "call_function": _function_in_place,
}


def _flag(node: fx.Node) -> Any:
    """The argument ``inplace`` of a function that has one."""
    assert callable(node.target)
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace")
    except (TypeError, ValueError):
        return None


def _needs_copy(node: fx.Node) -> bool:
    """Whether the operation has no form that makes a new tensor."""
    if node.op == "call_module":
        return True
    return node.op == "call_method" and not hasattr(Tensor, str(node.target).removesuffix("_"))


def _out_of_place(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
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
        return getattr(getattr(torch.ops.aten, name), target._overloadname), args, kwargs
    assert callable(target)
    name = getattr(target, "__name__", "")
    if name.endswith("_"):
        return getattr(torch, name[:-1], None) or getattr(F, name[:-1]), args, kwargs
    bound = inspect.signature(target).bind(*args, **kwargs)
    bound.arguments["inplace"] = False
    return target, bound.args, bound.kwargs
