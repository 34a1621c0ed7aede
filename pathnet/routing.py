"""Differentiable outputs and gradients, routed through skips and residuals by two coefficients a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathnet.checks import check_callable, check_tensor
from pathnet.models.coefficients import check_coefficients, known_as, of_blocks
from pathnet.models.residual_net import ResidualNet, check_inputs, check_net, unwrapped
from pathnet.recording import (
    NOT_FINITE_GRADIENT,
    Look,
    Loss,
    check_differentiable,
    check_labels,
    cross_entropy,
)

__all__ = [
    "check_routing",
    "routed",
    "routed_gradient",
]

Routing = Tensor | Sequence[Sequence[float]]


def routed(net: nn.Module, x: Tensor, routing: Routing | None, backward: Routing | None = None) -> Tensor:
    """The network's output under a routing, ``y <- join(a skip(y) + c residual(y))`` a block, differentiable.

    The backward pass may go by other coefficients, ``g <- a' J_skip^T g + c' J_residual^T g``. Gradients are of
    inputs and weights, for any loss of the output; modes and autocast are the caller's. Where all coefficients of a
    block are 1 the block itself runs, bit for bit. A branch whose coefficients are 0 in both directions is not
    computed; where that of the backward pass is 0, weights that nothing else reaches get the gradient None, as those
    of modules that are not drawn do in training: DistributedDataParallel then needs ``find_unused_parameters=True``.

    Under `torch.compile` a routing must be a tensor where the program itself makes this call (a compiled network is
    given one by this function in any case). Nothing of the program depends on its values, so that one serves all
    routings: all branches are computed, and a coefficient 0 leaves gradients of zeros in place of None. On a GPU,
    coefficients in the processor's memory save a wait.

    With different coefficients in the two directions, second derivatives are routed as first ones are: what a
    coefficient 0 keeps back is a constant to them. `routed_gradient` gives a path's gradient with its whole
    derivative. `pathnet.nn.fused_residual` is one block of this by fused kernels, with the same coefficients in both
    directions and first derivatives alone.

    Args:
        net: a `ResidualNet`, or one within DistributedDataParallel or `torch.compile`.
        x: [B, C, H, W], or what else the network's stem takes.
        routing: [n, 2], the (a, c) of every block from input to output, a floating-point tensor or nested numbers;
            None for ones. A tensor that requires grad gets a gradient; all branches are computed then. Of a network
            with gates (highway) also [n, 3]: the third coefficient is of what flows through the gate itself, 0 where
            it is not given. It is of the backward pass alone.
        backward: likewise, the (a', c') of every block; as ``routing`` by default.

    Returns:
        [B, classes], or what else the head gives.

    Raises:
        ValueError: an argument is not such a one.
    """
    inner = unwrapped(net)
    if routing is not None:
        routing = check_coefficients("routing", routing, inner.n, inner.parts)
    if backward is not None:
        backward = check_coefficients("backward", backward, inner.n, inner.parts)
    check_inputs("x", x, inner)
    return torch.as_tensor(net(x, routing=routing, backward=backward))


def routed_gradient(
    net: ResidualNet, x: Tensor, target: Tensor, backward: Routing, loss: Loss = cross_entropy
) -> Tensor:
    """The gradient at ``y_0``, the input of block 1, under a routing of the backward pass, as a differentiable value.

    For penalties on the gradient along a path. Its value is that of `Tape.routed_gradients`, of the network in its
    own mode and types. Its derivative is whole: weights beside the path, on which the gradient along it depends by
    the point at which it is taken, get theirs. (Gates of highway blocks are constants, as they are to paths.)

    Args:
        x: [B, C, H, W], or what else the network's stem takes.
        target: what the loss compares the output with.
        backward: [n, 2], or [n, 3] of a network with gates; see `routed`.
        loss: a differentiable function of (output, target); the mean cross-entropy by default.

    Returns:
        [B, C_0, H_0, W_0]

    Raises:
        ValueError: an argument is not such a one, a label is not among the classes, or the loss or its gradient is
            not finite; the latter three are not looked at while `torch.compile` traces.
    """
    check_net(net)
    check_inputs("x", x, net)
    check_callable("loss", loss)
    labels = check_labels(target, x.device) if loss is cross_entropy else None
    coefficients = of_blocks(check_coefficients("backward", backward, net.n, net.parts))
    with torch.enable_grad():
        y = torch.as_tensor(net.stem(x))
        y = y if y.requires_grad else y.detach().requires_grad_()
        entered, walked = [], y
        for block, own in zip(net, coefficients, strict=True):
            # Copies, since a branch, a join or a head may begin with an in-place ReLU.
            parts = block.three_parts(walked.clone()) if len(own) > 2 else block.branches(walked.clone())
            z = parts[0] + parts[1]
            left = block.join(z.clone())
            entered.append((walked, parts, z, left))
            walked = left
        output = net.head(walked.clone())
        value = check_differentiable(loss(output, target))
        grad = _pulled_back(value, walked)
        if not torch.compiler.is_compiling():
            # Of a loss that is NaN the gradient may well be 0.
            finite = torch.isfinite(grad.detach()).all().double()
            facts = output.detach(), value.detach().reshape(()), finite
            if not Look(x.detach(), labels, *facts, name="x").numbers()[1]:
                raise ValueError(NOT_FINITE_GRADIENT)
        for (before, parts, z, left), own in zip(reversed(entered), reversed(coefficients), strict=True):
            grad = _pulled_back(left, z, grad)
            through = [
                each * _pulled_back(part, before, grad)
                for each, part in zip(own, parts, strict=True)
                if part is not None and not known_as(each, 0)
            ]
            grad = sum(through[1:], through[0]) if through else torch.zeros_like(before)
    return grad


def _pulled_back(output: Tensor, at: Tensor, grad: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(output, at, grad, create_graph=True, materialize_grads=True)[0]


def check_routing(routing: Tensor, n: int, parts: int = 2) -> None:
    """Raises ValueError unless ``routing`` is a finite floating-point tensor [P, n, 2], or [P, n, parts]."""
    check_tensor("routing", routing, "floating-point")
    if routing.ndim != 3 or routing.shape[1] != n or routing.shape[2] not in (2, parts):
        shapes = " or ".join(f"[P, {n}, {columns}]" for columns in sorted({2, parts}))
        raise ValueError(f"routing: expected shape {shapes} for {n} blocks, got {list(routing.shape)}")
    if not torch.isfinite(routing.float()).all():
        raise ValueError(
            "routing: expected coefficients that are finite in float32, got NaN, infinity or larger ones"
        )
