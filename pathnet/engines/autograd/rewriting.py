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


ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

MOST_KEYS = 12
"""Maximum number of keys, over the width of a head, for which attention's weights are kept."""


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
        rules: dict[Any, Callable[[fx.Node], None]] = {
            **dict.fromkeys(ELEMENTWISE, self._multiply),
            aten.native_batch_norm_backward.default: self._normalise,
            aten.mm.default: self._product,
            aten.addmm.default: self._product,
            aten.convolution_backward.default: self._convolve,
            ATTENTION_BACKWARD: self._attend,
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

    def _faster(self, key: object, plain: Callable[[], object], candidate: Callable[[], object]) -> bool:
        """Return whether a candidate is faster than what it replaces; measured once for each key."""
        if key not in self.known:
            self.known[key] = fastest([plain, candidate], self.device)
        return self.known[key] == 1

    def _plainly(self, node: fx.Node) -> Callable[[], object]:
        return lambda: value_of(self.traced, node, self.values)

    def _linear_in_first(self, node: fx.Node) -> bool:
        """Return whether a gradient enters a node as its first argument alone."""
        first, *rest = node.all_input_nodes
        later = any(self.depends[argument] == Depends.GRADIENT for argument in rest)
        return first is node.args[0] and self.depends[first] == Depends.GRADIENT and not later

    def _multiply(self, node: fx.Node) -> None:
        args: Any = node.args
        if not self._linear_in_first(node):
            return
        example: Tensor = self.values[args[0]]
        ones = self.call(aten.ones.default, list(example.shape), dtype=example.dtype, device=example.device)
        factors = self.call(node.target, ones, *args[1:], **node.kwargs)
        self._replace(node, self.call(aten.mul.Tensor, args[0], factors))

    def _normalise(self, node: fx.Node) -> None:
        """Multiply by the factors of a batch normalisation with running statistics.

        Not where autocast mixes types: the product would be of another one than the gradient.
        """
        args: Any = node.args
        grad, _, weight, _, variance, _, _, training, eps, _ = args
        users: list[Any] = list(node.users)
        if training or not self._linear_in_first(node) or any(user.args[1] != 0 for user in users):
            return
        if self.values[variance].dtype != self.values[grad].dtype:
            return
        factors = self.call(aten.rsqrt.default, self.call(aten.add.Scalar, variance, eps))
        if weight is not None:
            factors = self.call(aten.mul.Tensor, factors, weight)
        factors = self.call(aten.view.default, factors, [1, -1, *(1,) * (self.values[grad].ndim - 2)])
        product = self.call(aten.mul.Tensor, grad, factors)
        for user in users:
            self._replace(user, product)

    def _product(self, node: fx.Node) -> None:
        """Compute a product with a weight by the fastest implementation."""
        args: Any = node.args
        bias, (x, weight) = (None, args) if len(args) == 2 else (args[0], args[1:])
        constants = [constant for constant in (weight, bias) if constant is not None]
        if node.kwargs or any(self.depends[constant] != Depends.WEIGHTS for constant in constants):
            return
        shift = None if bias is None else self.values[bias]
        if self.depends[x] == Depends.WEIGHTS or (shift is not None and shift.ndim != 1):
            return
        product = chosen(self.values[x], self.values[weight], shift, self.known)
        if product.held:
            self._replace(node, self.call(product, x))

    def _convolve(self, node: fx.Node) -> None:
        """Pull a gradient back through a convolution of stride 1 as a convolution with the turned weight."""
        args: Any = node.args
        grad, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
        users: list[Any] = list(node.users)
        if self.depends[weight] != Depends.WEIGHTS or any(user.args[1] != 0 for user in users):
            return
        if transposed or any(step != 1 for step in stride) or not self._linear_in_first(node):
            return
        kernel = self.values[weight].shape[2:]
        outer = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        if any(width < 0 for width in outer):
            return
        turned_weight = self.call(turned_kernel, weight, groups)
        rest = (None, stride, outer, dilation, False, [0] * len(kernel), groups)
        example, constant = self.values[grad], self.values[turned_weight]

        def candidate() -> object:
            return aten.convolution.default(example, constant, *rest)

        described = ("convolution", example.shape, example.stride(), example.dtype, self.values[x].shape, kernel)
        if self._faster((*described, groups, str(rest)), self._plainly(node), candidate):
            pulled = self.call(aten.convolution.default, grad, turned_weight, *rest)
            for user in users:
                self._replace(user, pulled)

    def _attend(self, node: fx.Node) -> None:
        """Pull a gradient back through attention with its weights kept: four products, and the softmax's own."""
        args: Any = node.args
        grad, query, key, value, _, _, dropout, causal = args[:8]
        mask: Any = node.kwargs.get("attn_mask")
        scale: Any = node.kwargs.get("scale")
        users: list[Any] = list(node.users)
        if dropout or not self._linear_in_first(node) or any(user.args[1] > 2 for user in users):
            return
        q, k = self.values[query], self.values[key]
        # The weights take no more memory than the rest of a block.
        if q.shape[1] != k.shape[1] or k.shape[-2] > MOST_KEYS * q.shape[-1]:
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
        described = ("attention", q.shape, k.shape, q.dtype, causal)
        if self._faster(described, self._plainly(node), lambda: attend_back(example, *values)):
            self._replace(node, self.call(attend_back, grad, *constants))

    def _reuse(self) -> None:
        """Multiply in place where nothing else reads a factor's memory."""
        for node in self.graph.nodes:
            if node.target is not aten.mul.Tensor or self.depends[node] != Depends.GRADIENT:
                continue
            base: Any = node.args[0]
            if not isinstance(base, fx.Node) or self.depends[base] != Depends.GRADIENT:
                continue
            value, result = self.values[base], self.values[node]
            same = value.shape == result.shape and value.dtype == result.dtype
            while is_view(base) and len(base.users) == 1:
                base = base.args[0]
                # Elements of an expanded tensor share memory.
                same = same and self.values[base].numel() == value.numel()
            fresh = base.op == "call_function" and base.target is not operator.getitem and not is_view(base)
            if same and fresh and len(base.users) == 1:
                node.target = aten.mul_.Tensor


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    """Return softmax(query key^T factor + mask), [..., T, S]; 0 where a query attends to nothing."""
    scores = query @ key.mT * factor
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    # A float32 mask is one for half-precision queries too.
    return scores.softmax(-1).masked_fill(nothing, 0.0).to(query.dtype)


def turned(x: Tensor) -> Tensor:
    """Return a transposed copy, since products read it often."""
    return x.mT.contiguous()


def turned_kernel(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of the convolution that pulls a gradient back.

    Args:
        weight: [O, I / groups, *kernel]

    Returns:
        [I, O / groups, *kernel]
    """
    in_groups = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return in_groups.flatten(0, 1).flip(list(range(2, weight.ndim))).contiguous()


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
