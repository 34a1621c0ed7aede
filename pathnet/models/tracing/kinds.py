"""The kinds of residual modules in words, by the operations that they consist of."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from pathnet.models.tracing.operations import is_activation

__all__ = ["counted", "has_activation", "kind_of"]

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "mm")
LINEAR = ("linear", "addmm")
PASSING = ("dropout", "to", "type_as", "clone", "expand", "view", "reshape", "contiguous", "_to_copy", "getitem")
"""Operations that the weights of attention pass between their softmax and the product with the values."""


def counted(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def has_activation(part: nn.Module | None) -> bool:
    """Return whether a part contains an elementwise function without weights."""
    if not isinstance(part, fx.GraphModule):
        return part is not None
    modules = dict(part.named_modules())
    return any(is_activation(node, modules) for node in part.graph.nodes)


def kind_of(part: nn.Module) -> str:
    """Return the kind of a residual module: mixture of experts, attention, convolutions, perceptron, linear layer or
    other.

    The names of weights do not count, since they mislead: "post_attention_layernorm" is not attention. The class of a
    module that the trace calls whole does.
    """
    nodes = list(part.graph.nodes) if isinstance(part, fx.GraphModule) else []
    names = [_name(node) for node in nodes if node.op in ("call_function", "call_method")]
    modules = list(part.modules())
    attends = any("attention" in name for name in names) or any("Attention" in type(m).__name__ for m in modules)
    if not attends and ("topk" in names or any(_is_mixture(module) for module in modules)):
        return "mixture of experts"
    if attends or any(_weighs_values(node, dict(part.named_modules())) for node in nodes):
        return "attention"
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in modules) or any(
        name.startswith("conv") for name in names
    ):
        return "convolutions"
    linear = sum(map(_is_linear, nodes)) + sum(isinstance(module, nn.Linear) for module in modules)
    if linear > 1:
        return "perceptron"
    return "linear layer" if linear else "other"


def _name(node: fx.Node) -> str:
    """Return the name of a function or method, without overload: ``addmm`` for ``aten.addmm.default``."""
    name = str(getattr(node.target, "__name__", node.target))
    return name.partition(".")[0]


def _is_mixture(module: nn.Module) -> bool:
    """Return whether a module that the trace calls whole is a mixture of experts, by its class."""
    name = type(module).__name__
    return "Experts" in name or "MoE" in name or "Moe" in name


def _weighs_values(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node is a softmax whose result is multiplied by a matrix, as the weights of attention are."""
    is_softmax = (
        isinstance(modules.get(str(node.target)), nn.Softmax)
        if node.op == "call_module"
        else ("softmax" in _name(node))
    )
    return is_softmax and any(_is_product(user) for user in _users(node, modules))


def _users(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """Yield the operations that use a value, past those that only pass it on."""
    for user in node.users:
        yield user
        passes = isinstance(modules.get(str(user.target)), (nn.Dropout, nn.Identity)) or _name(user) in PASSING
        if passes:
            yield from _users(user, modules)


def _is_linear(node: fx.Node) -> bool:
    """Return whether an operation is a product with weights."""
    if node.op == "call_module":
        return False
    return _name(node) in LINEAR or (_is_product(node) and any(map(_of_weights, node.all_input_nodes)))


def _of_weights(node: fx.Node) -> bool:
    """Return whether a value is computed from attributes alone."""
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_of_weights, node.all_input_nodes)))


def _is_product(node: fx.Node) -> bool:
    return node.op != "call_module" and _name(node) in PRODUCTS
