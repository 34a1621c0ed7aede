"""Differentiable outputs and gradients under a routing: coefficients for each block's skip connection and modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import check_callable, check_tensor
from pathnet.models.coefficients import check_coefficients, known_as, of_blocks
from pathnet.models.residual_net import ResidualNet, check_inputs, check_net
from pathnet.models.wrapped import unwrapped
from pathnet.recording import (
    NOT_FINITE_GRADIENT,
    Loss,
    ValueCheck,
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


def routed(net: nn.Module, x: Any, routing: Routing | None, backward: Routing | None = None) -> Tensor:
    """Return the network's output under a routing, ``y <- join(a skip(y) + c residual(y))`` per block.

    It is differentiable: inputs and weights get gradients for any loss of the output. The backward pass may have
    other coefficients, ``g <- a' J_skip^T g + c' J_residual^T g``. The network's mode and autocast are left to the
    caller. Where all coefficients of a block are 1 the block itself runs, bit for bit. A branch whose coefficients
    are 0 in both directions is not computed. Where the backward coefficient is 0, weights without any other path to
    the loss get the gradient None, as those of dropped modules do in training: DistributedDataParallel then needs
    ``find_unused_parameters=True``.

    Under `torch.compile` a routing must be a tensor where the compiled program itself makes this call (a compiled
    network always gets a tensor from this function). The program does not depend on the routing's values, so one
    program serves all routings: all branches are computed, and a coefficient 0 leaves gradients of zeros in place of
    None. On a GPU, coefficients kept in host memory avoid a synchronisation.

    With different coefficients in the two directions, second derivatives are routed as first derivatives are: a
    branch with a backward coefficient of 0 is a constant to them. `routed_gradient` returns a path's gradient with
    its whole derivative. `pathnet.nn.fused_residual` runs one such block by fused kernels, with the same coefficients
    in both directions and first derivatives alone.

    Args:
        net: a `ResidualNet`, or one within DistributedDataParallel or `torch.compile`.
        x: [B, C, H, W], or other inputs of the network.
        routing: [n, 2], the (a, c) of every block from input to output, a floating-point tensor or nested numbers;
            None for ones. A tensor that requires grad gets a gradient; all branches are then computed. Also [n,
            parts], see `ResidualNet.parts`: for residual modules in parallel one coefficient each, by default c; for
            gates (highway) that of the gate itself, by default 0, which affects the backward pass alone.
        backward: likewise, the (a', c') of every block; by default ``routing``.

    Returns:
        [B, classes], or whatever the head returns.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        The network without its last block; and a backward pass along the path through all skip connections:

        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> _ = net.eval()
        >>> without = pathnet.routed(net, images, [[1, 1]] * 5 + [[1, 0]])
        >>> torch.equal(without, pathnet.lesion.delete(net, [5])(images))
        True
        >>> output = pathnet.routed(net, images, None, backward=[[1, 0]] * 6)
        >>> torch.nn.functional.cross_entropy(output, labels).backward()
        >>> net.stem.weight.grad.norm()
        tensor(0.0805)
        >>> print(net.blocks[0].convs[0].weight.grad)
        None
    """
    inner = unwrapped(net)
    if routing is not None:
        routing = check_coefficients("routing", routing, inner.n, inner.parts)
    if backward is not None:
        backward = check_coefficients("backward", backward, inner.n, inner.parts)
    check_inputs("x", x, inner)
    return torch.as_tensor(net(x, routing=routing, backward=backward))


def routed_gradient(net: ResidualNet, x: Any, target: Any, backward: Routing, loss: Loss = cross_entropy) -> Tensor:
    """Return the gradient at ``y_0``, the input of the first block, under a routing of the backward pass.

    It is differentiable: use it for penalties on the gradient along a path. Its value is that of
    `Tape.routed_gradients`, for the network in its present mode and types. Its derivative is complete: weights off
    the path, which determine the point of evaluation, get theirs too. (Gates of highway blocks are constants, as for
    paths.)

    Args:
        net: the network, in its present mode.
        x: [B, C, H, W], or other inputs of the network.
        target: the loss's second argument; for the default loss class labels, int64 [B] or [B, T].
        backward: [n, 2] or [n, parts]; see `routed`.
        loss: a differentiable function of (output, target); by default the mean cross-entropy, in nats.

    Returns:
        [B, C_0, H_0, W_0]; or [B, T, C] of tokens.

    Raises:
        ValueError: an argument is out of its range, a label is not among the classes, or the loss or its gradient is
            not finite; the last three are not checked while `torch.compile` traces.

    Example:
        A penalty on the gradient along the path through all skip connections:

        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> grad = pathnet.routed_gradient(net.eval(), images, labels, [[1, 0]] * 6)
        >>> grad.shape
        torch.Size([4, 8, 8, 8])
        >>> grad.norm().backward()
        >>> net.blocks[0].convs[0].weight.grad.norm()
        tensor(0.0023)
    """
    check_net(net)
    device = check_inputs("x", x, net).device
    tensors = {name: tensor.detach() for name, tensor in net.tensors(x, "x").items()}
    check_callable("loss", loss)
    labels = check_labels(target, device) if loss is cross_entropy else None
    coefficients = of_blocks(check_coefficients("backward", backward, net.n, net.parts))
    with torch.enable_grad():
        main, context = net.split(x, "x")
        net = net.bound(context)
        y = torch.as_tensor(net.stem(main))
        y = y if y.requires_grad else y.detach().requires_grad_()
        passes = []
        for block, factors in zip(net, coefficients, strict=True):
            # Copies, since a branch, a join or a head may begin with an in-place ReLU.
            parts = block.parts(y.clone())
            z = block.summed(parts)
            passes.append((y, parts, block.coefficients(factors), z, block.join(z.clone())))
            y = passes[-1][-1]
        output = net.head(y.clone())
        value = check_differentiable(loss(output, target))
        grad = _pulled_back(value, y)
        if not torch.compiler.is_compiling():
            # The gradient of a loss that is NaN may be 0.
            finite = torch.isfinite(grad.detach()).all().double()
            facts = output.detach(), value.detach().reshape(()), finite
            if not ValueCheck(tensors, labels, *facts, name="x").result()[1]:
                raise ValueError(NOT_FINITE_GRADIENT)
        for x_in, parts, factors, z, x_out in reversed(passes):
            grad = _pulled_back(x_out, z, grad)
            terms = [
                factor * _pulled_back(part, x_in, grad)
                for factor, part in zip(factors, parts, strict=True)
                if part is not None and not known_as(factor, 0)
            ]
            grad = sum(terms[1:], terms[0]) if terms else torch.zeros_like(x_in)
    return grad


def _pulled_back(output: Tensor, at: Tensor, grad: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(output, at, grad, create_graph=True, materialize_grads=True)[0]


def check_routing(routing: Tensor, n: int, parts: int = 2) -> None:
    """Raise ValueError unless ``routing`` is a finite floating-point tensor [P, n, 2], or [P, n, parts]."""
    check_tensor("routing", routing, "floating-point")
    if routing.ndim != 3 or routing.shape[1] != n or routing.shape[2] not in (2, parts):
        shapes = " or ".join(f"[P, {n}, {columns}]" for columns in sorted({2, parts}))
        raise ValueError(f"routing: expected shape {shapes} for {n} blocks, got {list(routing.shape)}")
    if not torch.isfinite(routing.float()).all():
        raise ValueError(
            "routing: expected coefficients that are finite in float32, got NaN, infinity or larger ones"
        )
