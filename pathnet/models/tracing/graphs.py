"""A model as a graph of operations over the model's modules and weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from pathnet.models.shape_guards import ShapeGuards

__all__ = [
    "Dropout",
    "ReadOnlyInterpreter",
    "RecordingInterpreter",
    "TracedGraph",
    "ancestors_of",
    "copy_node",
    "describe_node",
    "differs",
    "first_line",
    "is_inside",
    "module_path",
    "module_paths",
    "operation",
    "output_node",
    "placeholders",
]


WRITES = {"with_item": "an assignment to x[...]", "written_through": "a write into a view"}
"""Operations that stand for an assignment in the model's code."""

Dropout = nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph without in-place operations.

    Attributes:
        attributes: the modules, parameters, buffers and constants that the graph refers to, by name.
        traced_by: ``torch.fx`` or ``torch.export``, and which modules it left untraced.
        frozen_statistics: the batch normalisations that always use running statistics.
        untraced: the modules that appear as one node each, because of their control flow.
        dropouts: the model's dropout modules that the trace omits, with their names.
        guards: the conditions on the inputs' shapes under which the trace holds.
    """

    graph: fx.Graph
    attributes: dict[str, Any]
    traced_by: str
    frozen_statistics: tuple[str, ...] = ()
    untraced: tuple[nn.Module, ...] = ()
    dropouts: tuple[tuple[str, Dropout], ...] = ()
    guards: ShapeGuards | None = None


class _Interpreter(fx.Interpreter):
    """Interpreter of a graph and its attributes, by name. It needs no `fx.GraphModule`, whose code takes long."""

    def __init__(self, attributes: Mapping[str, Any], graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.attributes = attributes

    def fetch_attr(self, target: str) -> Any:
        return self.attributes[target]

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.attributes[target](*args, **kwargs)


class RecordingInterpreter(_Interpreter):
    """Interpreter whose ``on_value`` receives each node's value, and returns the value to continue with."""

    def __init__(
        self, attributes: Mapping[str, Any], graph: fx.Graph, on_value: Callable[[fx.Node, Any], Any]
    ) -> None:
        super().__init__(attributes, graph)
        self.on_value = on_value

    def run_node(self, n: fx.Node) -> Any:
        return self.on_value(n, super().run_node(n))


class ReadOnlyInterpreter(_Interpreter):
    """Interpreter that raises ValueError where an operation changes an input in place that others may read."""

    def run_node(self, n: fx.Node) -> Any:
        # A clone with a single user exists to be changed by it.
        read_only = [node for node in n.all_input_nodes if node.target is not torch.clone or len(node.users) > 1]
        tensors = [value for node in read_only if isinstance(value := self.env[node], Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = super().run_node(n)
        if [tensor._version for tensor in tensors] != versions:
            raise ValueError(f"{describe_node(n)} changes its input in place")
        return result


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Return the input nodes of a graph."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors be one operation of a graph, also where `pickle` traces the graph again."""

    @wraps(function)
    def one_node(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(one_node, args, *args, **kwargs)
        return function(*args, **kwargs)

    return one_node


def ancestors_of(ends: Iterable[fx.Node], within: Collection[fx.Node], start: fx.Node | None = None) -> set[fx.Node]:
    """Return the ends and their ancestors among ``within``, back to ``start``, which is not included."""
    ancestors: set[fx.Node] = set()
    pending = [end for end in ends if end is not start]
    while pending:
        node = pending.pop()
        if node not in ancestors:
            ancestors.add(node)
            pending += [parent for parent in node.all_input_nodes if parent in within and parent is not start]
    return ancestors


def output_node(graph: fx.Graph) -> fx.Node:
    """Return the node that marks the output of a graph."""
    (node,) = (node for node in graph.nodes if node.op == "output")
    assert isinstance(node, fx.Node)
    return node


def module_paths(node: fx.Node) -> list[str]:
    """Return the names of the modules that contain an operation, outermost first, without the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (re.sub(r"^(L\['self'\]\.?)?(model\.|model$)?", "", str(path)) for path, _ in stack.values())
    return [path for path in paths if path and not path.startswith("_empty_nn_module_stack")]


def module_path(node: fx.Node) -> str:
    """Return the name of the innermost module that contains an operation, or "" where that is the model itself."""
    return next(reversed(module_paths(node)), "")


def is_inside(node: fx.Node, name: str) -> bool:
    """Return whether an operation is inside the named module of the model, or is that module."""
    target = [str(node.target)] if node.op == "call_module" else []
    return any(path == name or path.startswith(f"{name}.") for path in (*module_paths(node), *target))


def describe_node(node: fx.Node) -> str:
    """Return an operation in words: what it is, and which module of the model contains it."""
    if node.op == "call_module":
        return f"module {node.target!r}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    target = WRITES.get(target, target)
    path = module_path(node)
    return f"{str(target).removesuffix('.default')} (node {node.name!r}" + (f" in module {path!r})" if path else ")")


def copy_node(
    node: fx.Node,
    graph: fx.Graph,
    copies: Mapping[fx.Node, Any],
    attributes: dict[str, Any],
    traced: Mapping[str, Any],
) -> fx.Node:
    """Copy an operation of a traced graph into another graph, with the module or tensor that it refers to.

    Args:
        copies: the new node, or the constant, for each copied node.
        attributes: the modules and tensors of the new graph by name.
        traced: those of the traced graph.
    """
    copied = graph.node_copy(node, copies.__getitem__)
    copied.meta = {}
    if node.op in ("call_module", "get_attr"):
        copied.target = _add_attribute(str(node.target), traced[str(node.target)], attributes)
    return copied


def _add_attribute(name: str, value: Any, attributes: dict[str, Any]) -> str:
    """Add a module or tensor to a graph's attributes, and return its name there.

    A tensor gets a name without dots, so that it is not registered a second time in the module it belongs to.
    """
    if isinstance(value, Tensor):
        name = name.replace(".", "_")
    while attributes.get(name, value) is not value:
        name += "_"
    attributes[name] = value
    return name


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def differs(actual: Tensor, expected: Tensor, scale: float = 0.0) -> bool:
    """Return whether two tensors differ by more than rounding, relative to the norm of ``expected``.

    Args:
        scale: norm of the largest tensor computed alongside, whose rounding error is tolerated here too.
    """
    if actual.shape != expected.shape or not torch.isfinite(expected).all():
        return True
    norm = float(expected.double().norm())
    epsilon = torch.finfo(expected.dtype).eps
    distance = float((actual.double() - expected.double()).norm())
    return not distance <= epsilon**0.5 * norm + 100 * epsilon * scale
