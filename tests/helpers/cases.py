"""Networks and batches for tests: random weights, random statistics, awkward shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pathnet.models import Block, PostactBlock, PreactBlock, ResidualNet, preact_resnet


@dataclass(frozen=True)
class Case:
    """A network and a batch; ``id`` names them in test reports."""

    id: str
    depth: int
    block: str = "basic"
    shortcut: str = "projection"
    width: int = 4
    side: int = 8
    batch: int = 3
    in_channels: int = 3

    def net(self, seed: int = 0) -> ResidualNet:
        torch.manual_seed(seed)
        net = preact_resnet(
            self.depth,
            self.width,
            num_classes=5,
            shortcut=self.shortcut,  # type: ignore[arg-type]
            block=self.block,  # type: ignore[arg-type]
            in_channels=self.in_channels,
        )
        return shaken(net).eval()

    def images(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, C, H, W] and labels int64 [B]."""
        generator = torch.Generator().manual_seed(seed + 1000)
        images = torch.randn(self.batch, self.in_channels, self.side, self.side, generator=generator)
        return images, torch.randint(0, 5, (self.batch,), generator=generator)


def shaken(net: ResidualNet) -> ResidualNet:
    """Replace initial values, which hide errors: BN gets random factors, shifts (of both signs) and statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::3] *= -1
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return net


def faint(net: ResidualNet, seed: int, growth: int = 0) -> ResidualNet:
    """Scale the network's modules so that some shrink a gradient by 1e-40, beyond float32's range.

    Others let it grow by 10^growth. The factors of their BNs or the weights of their convolutions are scaled.
    """
    rng = np.random.default_rng([seed, 3])
    for i, block in enumerate(net.blocks):
        power = [-40, -36, growth, -20, 0][(seed + i) % 5]
        kind = nn.BatchNorm2d if power > 0 or rng.random() < 0.6 else nn.Conv2d
        layers = [module for module in block.modules() if isinstance(module, kind)]
        for layer in layers:
            layer.weight.data *= 10.0 ** (power / len(layers))
    return net


def random_shortcut(rng: np.random.Generator, padding: float) -> str:
    """Return ``pad`` or ``pad_around``, each with half of the probability ``padding``, or ``projection``."""
    draw = rng.random() / padding
    return "pad" if draw < 0.5 else "pad_around" if draw < 1 else "projection"


def random_net(seed: int) -> tuple[ResidualNet, Tensor, Tensor]:
    """Return one to six blocks of random kinds, widths (1 to 17), strides and skips; images; labels."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    in_channels, channels = int(rng.choice([1, 3])), int(rng.choice([1, 2, 5, 7, 8, 16, 17]))
    stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    blocks: list[Block] = []
    for _ in range(rng.integers(1, 7)):
        kernels = [(3, 3), (1, 3, 1), (3,), (5, 3), (3, 1)][rng.integers(5)]
        out_channels = channels if rng.random() < 0.6 else channels + int(rng.integers(0, 9))
        widths = [*rng.integers(1, 12, len(kernels) - 1).tolist(), out_channels]
        stride = 2 if rng.random() < 0.25 else 1
        shortcut = random_shortcut(rng, 0.4)
        blocks.append(PreactBlock(channels, kernels, widths, stride, shortcut))  # type: ignore[arg-type]
        channels = out_channels
    head = nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)
    )
    batch, height, width = int(rng.choice([1, 1, 2, 3])), int(rng.integers(1, 14)), int(rng.integers(1, 14))
    images = torch.randn(batch, in_channels, height, width)
    return shaken(ResidualNet(stem, blocks, head)).eval(), images, torch.randint(0, 5, (batch,))


def measured_net(seed: int, small: bool = False) -> tuple[ResidualNet, Tensor, Tensor]:
    """Return a network like those that experiments measure, with any width up to 70; images; labels.

    It has two to six basic or bottleneck blocks, at most two of them with stride 2; each channel of its last
    activation has at least 32 values.

    Args:
        small: whether the width is at most 20, and images are at most 10 x 10.
    """
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    kind = ["basic", "bottleneck"][rng.integers(2)]
    width = int(rng.integers(4, 21 if small else 71)) if kind == "basic" else int(rng.integers(3, 6 if small else 18))
    channels, expansion = (width, 1) if kind == "basic" else (4 * width, 4)
    stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    blocks: list[Block] = []
    count = int(rng.integers(2, 7))
    strided = {*rng.choice(count, rng.integers(0, 3), replace=False).tolist()}
    for i in range(count):
        grown = width + int(rng.integers(0, 5)) if i in strided else width
        kernels, widths = ((3, 3), (grown, grown)) if kind == "basic" else ((1, 3, 1), (grown, grown, 4 * grown))
        shortcut = random_shortcut(rng, 0.4)
        blocks.append(PreactBlock(channels, kernels, widths, 2 if i in strided else 1, shortcut))  # type: ignore[arg-type]
        channels, width = expansion * grown, grown
    head = nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)
    )
    largest = 10 if small else 32 if channels <= 20 else 19 if channels <= 36 else 13
    height, width = (int(side) for side in rng.integers(8, largest + 1, 2))
    batch = int(rng.integers(8, 12)) if strided else int(rng.integers(1, 6))
    images = torch.randn(batch, 3, height, width)
    return shaken(ResidualNet(stem, blocks, head)).eval(), images, torch.randint(0, 5, (batch,))


def post_activation_net(seed: int, bn: str = "running") -> tuple[ResidualNet, Tensor, Tensor]:
    """Return two to six post-activation blocks, basic or bottleneck, with either skip where shapes change.

    The stem ends with a ReLU or does not. Also return images, more of them in BN mode ``batch``, and labels.
    """
    rng = np.random.default_rng([seed, 2])
    torch.manual_seed(seed)
    channels = int(rng.integers(3, 20))
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    if seed % 4 != 1:
        stem.append(nn.ReLU())
    if seed % 3 == 0:
        stem.append(nn.MaxPool2d(3, 2, 1))
    blocks: list[Block] = []
    for _ in range(rng.integers(2, 7)):
        out = channels if rng.random() < 0.6 else channels + int(rng.integers(0, 6))
        inner = int(rng.integers(3, 20))
        kernels, widths = ((3, 3), (inner, out)) if rng.random() < 0.6 else ((1, 3, 1), (inner, inner, out))
        shortcut = random_shortcut(rng, 0.5)
        blocks.append(PostactBlock(channels, kernels, widths, 2 if rng.random() < 0.25 else 1, shortcut))  # type: ignore[arg-type]
        channels = out
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    height, width = (int(side) for side in rng.integers(9, 17, 2))
    images = torch.randn(int(rng.integers(1, 5)) + 7 * (bn == "batch"), 3, height, width)
    return shaken(ResidualNet(stem, blocks, head)).eval(), images, torch.randint(0, 5, (len(images),))


SMALL = [
    Case("basic-projection-3", 8),
    Case("basic-projection-6", 14),
    Case("basic-pad-3", 8, shortcut="pad", side=7),
    Case("basic-pad-around-6", 14, shortcut="pad_around", width=5, side=9, batch=2),
    Case("bottleneck-projection-3", 11, block="bottleneck", width=3, side=7),
    Case("bottleneck-pad-3", 11, block="bottleneck", shortcut="pad", width=3, side=5, batch=2),
    Case("bottleneck-projection-6", 20, block="bottleneck", width=3, side=6, batch=2),
]
"""Networks of at most 6 blocks, so brute force can compute all paths."""
