"""The operations that a search for residual connections tells apart: additions, activations, reshapes, clones."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = [
    "CLONES",
    "CONCATENATIONS",
    "RESHAPES",
    "allow_any_strides",
    "feeds_a_sum",
    "is_activation",
    "is_relu",
    "operands_of",
    "past_dropout",
]

aten = torch.ops.aten

ADDITIONS = {operator.add, torch.add, aten.add.Tensor, "add", "__add__"}
SUBTRACTIONS = {operator.sub, torch.sub, torch.subtract, aten.sub.Tensor, "sub", "subtract", "__sub__"}
REVERSED = {torch.rsub, aten.rsub.Tensor, "__rsub__"}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate, torch.hstack, torch.vstack, aten.cat.default}
CLONES = {torch.clone, aten.clone.default}
RESHAPES = {"view", "reshape", torch.reshape, aten.view.default, aten.reshape.default}
VIEWS = {"view": "reshape", "view_as": "reshape_as"}
VIEWS |= {aten.view.default: aten.reshape.default, aten.view_as.default: aten.reshape_as.default}  # type: ignore[dict-item]
"""Operations that need certain strides of their input, each with the same for any strides."""

DROPOUTS = {F.dropout, torch.dropout, aten.dropout.default}

RELUS = {torch.relu, F.relu, aten.relu.default}
ACTIVATIONS = RELUS | {torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu}
ACTIVATIONS |= {F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh, F.softsign, F.logsigmoid}
ACTIVATIONS |= {
    getattr(aten, name).default
    for name in ("sigmoid", "tanh", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardswish", "hardtanh")
}
METHODS = {"relu", "sigmoid", "tanh"}
MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus)
MODULES += (nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.Sigmoid, nn.Tanh)  # type: ignore[assignment]


def operands_of(node: fx.Node) -> list[tuple[Any, float]] | None:
    """Return the operands of an addition or subtraction, each with its factor; None for any other operation."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS | SUBTRACTIONS | REVERSED:
        return None
    operands = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    alpha = node.kwargs.get("alpha", 1)
    if len(operands) != 2 or not isinstance(alpha, (int, float)):
        return None
    if node.target in REVERSED:
        operands.reverse()
    if node.target in ADDITIONS:
        return [(operands[0], 1.0), (operands[1], float(alpha))]
    return [(operands[0], 1.0), (operands[1], -float(alpha))]


def allow_any_strides(node: fx.Node) -> None:
    """Turn a view, which needs certain strides of its input, into a reshape; leave other operations as they are."""
    kwargs = {"shape" if name == "size" else name: value for name, value in node.kwargs.items()}
    to_dtype = any(isinstance(value, torch.dtype) for value in (*node.args, *kwargs.values()))
    if node.target in VIEWS and not to_dtype:
        node.target, node.kwargs = VIEWS[node.target], kwargs


def is_relu(node: fx.Node, attributes: Mapping[str, Any]) -> bool:
    if node.op == "call_module":
        return type(attributes[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in RELUS) or (
        node.op == "call_method" and node.target == "relu"
    )


def is_activation(node: fx.Node, attributes: Mapping[str, Any]) -> bool:
    """Return whether an operation is an elementwise function without weights."""
    if node.op == "call_module":
        return isinstance(attributes[str(node.target)], MODULES)
    return (node.op == "call_function" and node.target in ACTIVATIONS) or (
        node.op == "call_method" and node.target in METHODS
    )


def past_dropout(node: fx.Node) -> fx.Node:
    """Return the input of dropout functions that are switched off, as they are traced in evaluation mode."""
    while _is_inactive_dropout(node) and len(node.all_input_nodes[0].users) == 1:
        (node,) = node.all_input_nodes
    return node


def feeds_a_sum(node: fx.Node) -> bool:
    """Return whether the only use of a value is as an operand of an addition or subtraction."""
    while len(node.users) == 1:
        (user,) = node.users
        if not _is_inactive_dropout(user):
            return operands_of(user) is not None
        node = user
    return False


def _is_inactive_dropout(node: fx.Node) -> bool:
    if node.target not in DROPOUTS:
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train"))
    return training is False
