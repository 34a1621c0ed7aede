"""Blocks for `pathnet.nn.fused_residual`, and the results of a step through them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from helpers.cases import shaken
from helpers.oracles import relative_error
from pathnet.models import Block, PreactBlock, ResidualNet
from pathnet.nn import fused_residual

__all__ = [
    "FLOAT32",
    "KINDS",
    "batch_for",
    "block_of",
    "compare",
    "fused",
    "results",
    "routed",
    "truth",
]

KINDS: dict[str, tuple[Any, ...]] = {
    "basic": (4, (3, 3), (4, 4), 1, "projection"),
    "basic-16": (16, (3, 3), (16, 16), 1, "projection"),
    "basic-projection": (3, (3, 3), (6, 6), 2, "projection"),
    "basic-pad": (3, (3, 3), (7, 7), 2, "pad"),
    "basic-pad-around": (3, (3, 3), (8, 8), 2, "pad_around"),
    "bottleneck": (8, (1, 3, 1), (3, 3, 8), 1, "projection"),
    "bottleneck-projection": (5, (1, 3, 1), (3, 4, 20), 2, "projection"),
    "one-unit": (5, (3,), (5,), 1, "projection"),
    "large-kernel": (2, (5, 3), (3, 2), 1, "projection"),
    "one-channel": (1, (3, 3), (1, 1), 1, "projection"),
}

FLOAT32 = 1e-5
"""Relative error of a whole tensor: a few hundred roundings of 2^-24, amplified by differences of large sums."""


def block_of(kind: str, training: bool) -> PreactBlock:
    torch.manual_seed(1)
    block = PreactBlock(*KINDS[kind])
    shaken(ResidualNet(nn.Identity(), [block], nn.Identity()))
    return block.train(training)


def batch_for(kind: str, batch: int = 3, side: int = 7) -> tuple[Tensor, Tensor]:
    """Return a float32 input, and a random direction of the output's shape."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, KINDS[kind][0], side, side + 1, generator=generator)
    block = block_of(kind, training=False)
    return x, torch.randn(block(x).shape, generator=generator)


def results(block: PreactBlock, x: Tensor, direction: Tensor, output: Tensor) -> dict[str, Tensor]:
    """Return output and buffers, and the gradients of the output's product with a direction, by name."""
    leaves = {"x": x, **dict(block.named_parameters())}
    product = (output * direction.to(output.dtype)).sum()
    grads = torch.autograd.grad(product, list(leaves.values()), allow_unused=True)
    with_grad = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    return {"output": output.detach(), **with_grad, **buffers}


def routed(block: Block, x: Tensor, a: float, c: float) -> Tensor:
    skip, residual = block.branches(x)
    return a * skip + c * residual


def truth(block: PreactBlock, x: Tensor, direction: Tensor, a: float = 1.0, c: float = 1.0) -> dict[str, Tensor]:
    """Return the results of the block's own modules in float64."""
    exact, x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    return results(exact, x, direction.double(), routed(exact, x, a, c))


def fused(
    block: PreactBlock, x: Tensor, direction: Tensor, a: float = 1.0, c: float = 1.0, engine: Any = "auto"
) -> dict[str, Tensor]:
    block, x = copy.deepcopy(block), x.detach().requires_grad_()
    return results(block, x, direction, fused_residual(block, x, a, c, engine))


def compare(measured: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert measured.keys() == expected.keys()
    for name, value in measured.items():
        assert relative_error(value, expected[name].double()) < tolerance, name
