"""A model as a graph of operations over its own modules and weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "Dropout",
    "Recording",
    "Traced",
    "Watching",
    "differs",
    "first_line",
    "path_of",
    "paths_of",
    "placeholder",
    "where",
]


Dropout = nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class Traced:
    """A graph without operations in place.

    Attributes:
        held: what the graph names: modules, parameters, buffers and constants.
        kind: what traced it, ``torch.fx`` or ``torch.export``, and what it left whole.
        whole: the modules with control flow that it left whole.
        frozen: the batch normalisations whose statistics are fixed.
        dropouts: of the model's dropout modules those that are left out, with their names.
    """

    graph: fx.Graph
    held: dict[str, Any]
    kind: str
    frozen: tuple[str, ...] = ()
    whole: tuple[nn.Module, ...] = ()
    dropouts: tuple[tuple[str, Dropout], ...] = ()


class Recording(fx.Interpreter):
    """Runs a graph node by node; ``keep`` is given each node's value, and returns what to go on with."""

    def __init__(self, module: fx.GraphModule, keep: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(module)
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        return self.keep(n, super().run_node(n))


class Watching(fx.Interpreter):
    """Runs a graph that is to change nothing in place, but for copies that are made for it."""

    def run_node(self, n: fx.Node) -> Any:
        kept = [own for own in n.all_input_nodes if own.target is not torch.clone or len(own.users) > 1]
        given = [value for own in kept if isinstance(value := self.env[own], Tensor)]
        versions = [value._version for value in given]
        result = super().run_node(n)
        if [value._version for value in given] != versions:
            raise ValueError(f"{where(n)} changes its input in place")
        return result


def placeholder(graph: fx.Graph) -> fx.Node:
    (found,) = (node for node in graph.nodes if node.op == "placeholder")
    assert isinstance(found, fx.Node)
    return found


def paths_of(node: fx.Node) -> list[str]:
    """The modules of the model that an operation is in, from the outermost inwards, the model itself apart."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (re.sub(r"^(L\['self'\]\.?)?(model\.|model$)?", "", str(path)) for path, _ in stack.values())
    return [path for path in paths if path and not path.startswith("_empty_nn_module_stack")]


def path_of(node: fx.Node) -> str:
    """The innermost module that an operation is in; empty where it is the model itself."""
    return next(reversed(paths_of(node)), "")


def where(node: fx.Node) -> str:
    """An operation in words: what it is, and in which module of the model."""
    if node.op == "call_module":
        return f"module {node.target!r}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    own = path_of(node)
    return f"{str(target).removesuffix('.default')} (node {node.name!r}" + (f" in module {own!r})" if own else ")")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def differs(given: Tensor, expected: Tensor, size: float = 0.0) -> bool:
    """By more than rounding, relative to the norm of what is expected; ``size`` is that of all of it."""
    if given.shape != expected.shape or not torch.isfinite(expected).all():
        return True
    own = float(expected.double().norm())
    rounding = torch.finfo(expected.dtype).eps
    return not float((given.double() - expected.double()).norm()) <= rounding**0.5 * own + 100 * rounding * size
