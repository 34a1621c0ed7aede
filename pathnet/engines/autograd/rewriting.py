"""Faster forms of what a pull-back computes, for one record and many gradients.

An operator that is linear in the gradient, element by element, becomes a multiplication by its factors, computed once
for each record.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pathnet.engines.autograd.capture import is_view
from pathnet.engines.autograd.dependence import Depends, dependence, examples_of, value_of
from pathnet.engines.autograd.products import chosen
from pathnet.engines.autograd.timing import fastest

__all__ = ["Rewriter"]

aten = torch.ops.aten

ELEMENTWISE = {
    getattr(aten, name).default
    for name in (
        "gelu_backward",
        "silu_backward",
        "threshold_backward",
        "sigmoid_backward",
        "tanh_backward",
        "hardswish_backward",
        "hardsigmoid_backward",
        "hardtanh_backward",
        "leaky_relu_backward",
        "elu_backward",
        "softplus_backward",
        "mish_backward",
        "log_sigmoid_backward",
    )
}
"""Backward passes of activations, each linear in its first argument, the gradient."""


class Rewriter:
    """A captured graph, and the values of its nodes for the example that it was captured at.

    Attributes:
        graph: the graph, changed in place.
        gradients: number of gradients among its inputs.
        known: choices between implementations, by what is computed; shared with other blocks.
    """

    def __init__(
        self, traced: fx.GraphModule, inputs: list[Tensor], gradients: int, known: dict[object, int]
    ) -> None:
        self.traced, self.graph, self.gradients, self.known = traced, traced.graph, gradients, known
        self.device = inputs[0].device
        self.values = examples_of(traced, inputs)
        self.depends = dependence(self.graph, gradients)

    def rewrite(self) -> None:
        """Apply every rule to every node, in order."""
        rules = {
            **dict.fromkeys(ELEMENTWISE, self._multiply),
            aten.native_batch_norm_backward.default: self._normalise,
            aten.mm.default: self._product,
            aten.addmm.default: self._product,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default: self._attend,
        }
        for node in list(self.graph.nodes):
            rule = rules.get(node.target)
            if rule is not None:
                with self.graph.inserting_before(node):
                    rule(node)
        for node in self.graph.nodes:
            # Rewritten products may lie in memory in another order.
            if node.target is aten.view.default and self.depends[node] == Depends.GRADIENT:
                node.target = aten.reshape.default
        self.graph.eliminate_dead_code()
        self._reuse()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call, with its example value and what it depends on."""
        node = self.graph.call_function(target, args, kwargs)
        self.values[node] = value_of(self.traced, node, self.values)
        self.depends[node] = max(
            (self.depends[argument] for argument in node.all_input_nodes), default=Depends.WEIGHTS
        )
        return node

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _multiply(self, node: fx.Node) -> None:
        grad, *rest = node.args
        if not self._linear_in_first(node):
            return
        example: Tensor = self.values[grad]  # type: ignore[index]
        ones = self.call(aten.ones.default, list(example.shape), dtype=example.dtype, device=example.device)
        factors = self.call(node.target, ones, *rest, **node.kwargs)
        self._replace(node, self.call(aten.mul.Tensor, grad, factors))

    def _linear_in_first(self, node: fx.Node) -> bool:
        """Return whether a gradient enters a node as its first argument alone."""
        first, *rest = node.all_input_nodes
        later = any(self.depends[argument] == Depends.GRADIENT for argument in rest)
        return first is node.args[0] and self.depends[first] == Depends.GRADIENT and not later

    def _normalise(self, node: fx.Node) -> None:
        """Multiply by the factors of a batch normalisation with running statistics."""
        grad, _, weight, _, variance, _, _, training, eps, _ = node.args
        users = list(node.users)
        if training or not self._linear_in_first(node) or any(user.args[1] != 0 for user in users):
            return
        rank = self.values[grad].ndim  # type: ignore[index]
        factors = self.call(aten.rsqrt.default, self.call(aten.add.Scalar, variance, eps))
        if weight is not None:
            factors = self.call(aten.mul.Tensor, factors, weight)
        factors = self.call(aten.view.default, factors, [1, -1, *(1,) * (rank - 2)])
        product = self.call(aten.mul.Tensor, grad, factors)
        for user in users:
            self._replace(user, product)

    def _product(self, node: fx.Node) -> None:
        """Compute a product with a weight by the fastest implementation."""
        if node.kwargs:
            return
        bias, (x, weight) = (None, node.args) if len(node.args) == 2 else (node.args[0], node.args[1:])
        constants = [weight] if bias is None else [weight, bias]
        if any(self.depends[constant] != Depends.WEIGHTS for constant in constants):  # type: ignore[index]
            return
        shift = None if bias is None else self.values[bias]  # type: ignore[index]
        if self.depends[x] == Depends.WEIGHTS or (shift is not None and shift.ndim != 1):  # type: ignore[index]
            return
        product = chosen(self.values[x], self.values[weight], shift, self.known)  # type: ignore[index]
        if product.held:
            self._replace(node, self.call(product, x))

    def _attend(self, node: fx.Node) -> None:
        """Pull a gradient back through attention with its weights kept: four products, and the softmax's own."""
        grad, query, key, value, _, _, dropout, causal = node.args[:8]
        mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
        if dropout or not self._linear_in_first(node) or any(user.args[1] > 2 for user in node.users):
            return
        q, k = self.values[query], self.values[key]  # type: ignore[index]
        if q.shape[1] != k.shape[1] or 4 * q.shape[-1] * 3 < k.shape[-2]:
            return
        factor = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
        weights = self.call(attention_weights, query, key, mask, causal, factor)
        constants = [
            self.call(turned, value),
            weights,
            self.call(aten.mul.Tensor, query, factor),
            self.call(aten.mul.Tensor, key, factor),
            self.call(turned, weights),
        ]
        example, values = self.values[grad], [self.values[constant] for constant in constants]
        arguments, options = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)

        def plain() -> object:
            return node.target(*arguments, **options)

        if self._faster(("attention", q.shape, k.shape, q.dtype), plain, lambda: attend_back(example, *values)):
            pulled = self.call(attend_back, grad, *constants)
            node.replace_all_uses_with(pulled)
            self.graph.erase_node(node)

    def _faster(self, key: object, plain: Callable[[], object], candidate: Callable[[], object]) -> bool:
        """Return whether a candidate is faster than what it replaces; measured once for each key."""
        if key not in self.known:
            self.known[key] = fastest([plain, candidate], self.device)
        return self.known[key] == 1

    def _reuse(self) -> None:
        """Multiply in place where nothing else reads a factor's memory."""
        for node in self.graph.nodes:
            if node.target is not aten.mul.Tensor or self.depends[node] != Depends.GRADIENT:
                continue
            base, fresh = node.args[0], True
            if not isinstance(base, fx.Node) or self.depends[base] != Depends.GRADIENT:
                continue
            value, result = self.values[base], self.values[node]
            while fresh and is_view(base):
                fresh, base = len(base.users) == 1, base.args[0]  # type: ignore[union-attr,assignment]
            fresh = fresh and base.op == "call_function" and len(base.users) == 1
            if fresh and not is_view(base) and base.target is not operator.getitem and value.shape == result.shape:
                if value.dtype == result.dtype:
                    node.target = aten.mul_.Tensor


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    """Return softmax(query key^T factor + mask), [..., T, S]; 0 where a query attends to nothing."""
    scores = query @ key.mT * factor
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0)


def turned(x: Tensor) -> Tensor:
    """Return a transposed copy, since products read it often."""
    return x.mT.contiguous()


def attend_back(
    grad: Tensor, turned_value: Tensor, weights: Tensor, query: Tensor, key: Tensor, turned_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull a gradient back through attention, to its query, key and value.

    Args:
        grad: [B, heads, T, D]
        weights: the softmax's, [B, heads, T, S].
        query, key: times the scale of the scores.
    """
    by_weights = grad @ turned_value
    by_scores = aten._softmax_backward_data(by_weights, weights, -1, weights.dtype)
    return by_scores @ key, by_scores.mT @ query, turned_weights @ grad
