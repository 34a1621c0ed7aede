"""Networks of every kind for routed passes, and their outputs and gradients written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.cases import Case, shaken
from helpers.oracles import in_float64
from pathnet import models
from pathnet.models import Block, ResidualNet

EXACT = 1e-12


class PostActivation(Block):
    """A block with a join, and an in-place ReLU in it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.skip_conv = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.bn = nn.BatchNorm2d(channels)

    def skip(self, x: Tensor) -> Tensor:
        return self.skip_conv(x)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def join(self, z: Tensor) -> Tensor:
        return F.relu(z, inplace=True)


class Eager(Block):
    """A block that changes its input in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def residual(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x, inplace=True))


def in_place() -> ResidualNet:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return ResidualNet(nn.Conv2d(3, 4, 3), [Eager(4) for _ in range(3)], head)


def post_activation() -> ResidualNet:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return ResidualNet(nn.Conv2d(3, 4, 3), [PostActivation(4) for _ in range(3)], head)


NETS: dict[str, Callable[[], ResidualNet]] = {
    "preact": lambda: models.preact_resnet(8, 4, 5),
    "padded": lambda: models.preact_resnet(8, 4, 5, shortcut="pad"),
    "bottleneck": lambda: models.preact_resnet(11, 3, 5, block="bottleneck"),
    "stochastic depth": lambda: models.preact_resnet(8, 4, 5, survival=0.4),
    "highway": lambda: models.highway(8, 4, 5),
    "vgg": lambda: models.vgg(6, 4, 5, stages=2),
    "join": post_activation,
}


def random_net_of(kind: str, bn: str = "running") -> ResidualNet:
    torch.manual_seed(0)
    net = shaken(NETS[kind]())
    return in_float64(net, bn) if bn != "training" else net.double().train()


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    images, labels = Case("", 8, batch=count).images()
    return images.double(), labels


def random(n: int, parts: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, parts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7))


def gradients(net: nn.Module, output: Tensor, labels: Tensor) -> dict[str, Tensor | None]:
    for parameter in net.parameters():
        parameter.grad = None
    F.cross_entropy(output, labels).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def forward(
    net: ResidualNet, images: Tensor, join: Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the output, and ``y_0``, where ``join(i, skip, residual, gate)`` returns the input of block i's join."""
    y0 = y = net.stem(images)
    if not y0.requires_grad:
        y0 = y = y0.requires_grad_()
    for i, block in enumerate(net.blocks):
        gate = block.parts(y)[2] if block.has_gate else None
        y = block.join(join(i, block.skip(y), block.residual(y), gate))
    return net.head(y), y0


def as_if(value: Tensor, gradient: Tensor) -> Tensor:
    """Return a tensor with the value of one tensor and the gradient of another."""
    return value.detach() + gradient - gradient.detach()
