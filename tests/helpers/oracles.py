"""Truths without pathnet's engines: plain PyTorch as a researcher would first write it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.models import ResidualNet


def in_float64(net: ResidualNet, bn: str) -> ResidualNet:
    net = copy.deepcopy(net).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(bn == "batch")
    return net


def forward_gradient(
    net: ResidualNet,
    images: Tensor,
    labels: Tensor,
    bn: str,
    at: str,
    route: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return dloss/d(place) in float64 where ``route(i, skip, residual)`` joins block i's branches."""
    net = in_float64(net, bn)
    images = images.double().requires_grad_()
    y0 = net.stem(images)
    y = y0
    for i, block in enumerate(net.blocks):
        y = block.join(route(i, block.skip(y), block.residual(y)))
    place = {"y0": y0, "image": images, "stem_weight": net.stem_weight()}[at]
    return torch.autograd.grad(F.cross_entropy(net.head(y), labels), place)[0]


def detach_loop(
    net: ResidualNet, images: Tensor, labels: Tensor, path: Tensor, bn: str = "running", at: str = "y0"
) -> Tensor:
    """Return one path's gradient: the ordinary forward pass, with the branch next to the path detached."""

    def route(i: int, skip: Tensor, residual: Tensor) -> Tensor:
        return skip.detach() + residual if path[i] else skip + residual.detach()

    return forward_gradient(net, images, labels, bn, at, route)


def autograd(net: ResidualNet, images: Tensor, labels: Tensor, bn: str = "running", at: str = "y0") -> Tensor:
    """Return the ordinary gradient."""
    return forward_gradient(net, images, labels, bn, at, lambda i, skip, residual: skip + residual)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by that of ``expected``; where that is zero, not divided."""
    size = expected.norm()
    return float((actual.double() - expected).norm() / (size if size > 0 else 1.0))


def krawtchouk(n: int, k: int, m: int) -> int:
    """Return the coefficient of x^k in (1 - x)^m (1 + x)^(n - m), multiplied out."""
    polynomial = [1]
    for sign in [-1] * m + [1] * (n - m):
        polynomial = [a + sign * b for a, b in zip([*polynomial, 0], [0, *polynomial], strict=True)]
    return polynomial[k]
