"""Sums of path gradients by length from the plain loop over all paths, and networks whose modules are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import pathnet
from helpers.cases import Case, shaken
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import EXACT_WALK, FLOAT32_SAMPLE_NORM
from pathnet.models import Block, ResidualNet, preact_resnet

SERVES = {"reference": ["running", "batch"], "autograd": ["running", "batch"], "cpu": ["running", "batch"]}
"""The engines, and the modes of batch normalisation in which they have sums by length."""


ENGINES = list(SERVES)
JOBS = [(engine, bn) for engine, modes in SERVES.items() for bn in modes]
PRECISION = {"reference": "float64", "autograd": "float64"}
"""Precision by engine; float32 for the engines that are not listed."""


PLACES = ["y0", "image", "stem_weight"]


def recorded(
    engine: str, net: ResidualNet, images: Tensor, labels: Tensor, bn: str = "running", at: str = "y0"
) -> pathnet.Tape:
    precision: Any = PRECISION.get(engine, "float32")
    return pathnet.record(net, images, labels, bn=bn, engine=engine, precision=precision, at=at)  # type: ignore[arg-type]


def tolerance(engine: str) -> float:
    """Return the maximum error of one sum, relative to its norm."""
    return EXACT_WALK if engine in PRECISION else FLOAT32_SAMPLE_NORM


@cache
def every_path(case: Case, bn: str, at: str) -> tuple[Tensor, Tensor]:
    """Return, by the plain loop, the sums by length [n + 1, ...], and the sums of squared norms [n + 1]."""
    net, (images, labels) = case.net(), case.images()
    return added_up(net.n, [detach_loop(net, images, labels, code, bn, at) for code in codes(net.n)])


def codes(n: int) -> Tensor:
    return pathnet.paths.enumerate_all(n)


def added_up(n: int, walked: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    sums, squares = walked[0].new_zeros(n + 1, *walked[0].shape), walked[0].new_zeros(n + 1)
    for code, gradient in zip(codes(n), walked, strict=True):
        sums[int(code.sum())] += gradient
        squares[int(code.sum())] += gradient.square().sum()
    return sums, squares


def tree(net: ResidualNet, images: Tensor, labels: Tensor, bn: str) -> list[Tensor]:
    """Return the gradients at ``y_0`` along all paths, in the order of `enumerate_all`; paths share common tails."""
    exact = in_float64(net, bn)
    points = [exact.stem(images.double()).detach()]
    for block in exact:
        points.append(block(points[-1]).detach())
    y = points[-1].requires_grad_()
    grads = [torch.autograd.grad(nn.functional.cross_entropy(exact.head(y), labels), y)[0]]
    for block, point in reversed(list(zip(exact, points, strict=False))):
        x = point.requires_grad_()
        ends = block.skip(x), block.residual(x)
        grads = [
            torch.autograd.grad(end, x, grad, retain_graph=True)[0] for grad in grads for end in ends
        ]  # block 1 comes last and is the lowest bit
    return grads


def assert_close(actual: Tensor, expected: Tensor, most: float) -> None:
    for k, (measured, other) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(measured, other) < most, k


def ten_blocks() -> tuple[ResidualNet, Tensor, Tensor]:
    """Return ten blocks with projections, pads and strides; images; labels."""
    torch.manual_seed(3)
    kinds = [preact_resnet(8, 3, num_classes=5, in_channels=3, shortcut=kind) for kind in ("projection", "pad")]
    wide = preact_resnet(14, 6, num_classes=5)
    blocks = [kinds[0].blocks[0], kinds[1].blocks[0], kinds[0].blocks[1], *list(wide.blocks)[:2] * 3, wide.blocks[2]]
    net = shaken(ResidualNet(kinds[0].stem, blocks, wide.head))  # type: ignore[arg-type]
    net.head = shaken(preact_resnet(14, 3, num_classes=5)).head  # type: ignore[arg-type, assignment]
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    return net.eval(), images, labels


class Scalar(Block):
    """``y = x + w x``"""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def residual(self, x: Tensor) -> Tensor:
        return self.weight * x


def scalars(weights: Sequence[float], batch: int = 3) -> tuple[ResidualNet, Tensor, Tensor]:
    """Return a network whose modules are numbers; the gradient of the loss at its output is one everywhere."""
    net = ResidualNet(nn.Identity(), [Scalar(weight) for weight in weights], nn.Flatten(0))
    return net, torch.ones(batch, 1, 1, 1), torch.zeros(batch)


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()
