"""Pre-activation residual networks (He et al., "Identity Mappings in Deep Residual Networks", 2016)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.checks import check_integer, check_number, one_of
from pathnet.models.building import (
    EXPANSION,
    MOST_LAYERS,
    Kind,
    Shortcut,
    blocks_a_stage,
    check_block,
    check_size,
    convolution,
    initialised,
    linear_head,
    padded,
)
from pathnet.models.residual_net import Block, FusedForm, ResidualNet, Unit

__all__ = ["PreactBlock", "preact_resnet", "preact_resnet_imagenet"]

IMAGENET_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class PreactBlock(Block):
    """A chain of BN-ReLU-conv units with a skip connection (equation 2 of the paper; He et al. 2016).

    It maps [B, in_channels, H, W] to [B, widths[-1], H / stride, W / stride], sides rounded up. If the block changes
    shape, a ``projection`` skip reads the pre-activated input, as the residual module does: both branches then
    contain the first unit's BN and ReLU. A ``pad`` or ``pad_around`` skip reads the raw input: it takes every
    stride-th pixel and adds zero channels, after the input's or half before and half after them.

    Args:
        in_channels: number of channels of the block's input.
        kernels: kernel side of each unit.
        widths: number of output channels of each unit.
        stride: stride of the first 3x3 unit.
        shortcut: the skip connection if stride or channels change; it is the identity otherwise.
        survival: probability that a training step keeps the residual module (stochastic depth); in evaluation, the
            factor of the residual branch.

    Raises:
        ValueError: an argument is out of its range, no kernel has side 3, or kernels and widths differ in number.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> block = models.PreactBlock(8, kernels=(3, 3), widths=(16, 16), stride=2, shortcut="projection")
        >>> skip, residual = block.branches(torch.zeros(4, 8, 32, 32))
        >>> skip.shape, residual.shape
        (torch.Size([4, 16, 16, 16]), torch.Size([4, 16, 16, 16]))
    """

    def __init__(
        self,
        in_channels: int,
        kernels: Sequence[int],
        widths: Sequence[int],
        stride: int,
        shortcut: Shortcut,
        survival: float = 1.0,
    ) -> None:
        super().__init__()
        in_channels, kernels, widths, stride = check_block(in_channels, kernels, widths, stride, shortcut)
        self.survival = check_number("survival", survival, above=0, most=1)
        self.bns = nn.ModuleList()
        self.convs = nn.ModuleList()
        strided = kernels.index(3)
        channels = in_channels
        for position, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
            self.bns.append(nn.BatchNorm2d(channels))
            self.convs.append(convolution(channels, width, kernel, stride if position == strided else 1))
            channels = width
        self.stride = stride
        self.extra_channels = channels - in_channels
        changes_shape = stride != 1 or self.extra_channels != 0
        self.pad = changes_shape and shortcut != "projection"
        self.pad_before = self.extra_channels // 2 if self.pad and shortcut == "pad_around" else 0
        self.projection = convolution(in_channels, channels, 1, stride) if changes_shape and not self.pad else None

    def _preactivated(self, x: Tensor) -> Tensor:
        return F.relu(self.bns[0](x))

    def _skip(self, x: Tensor, preactivated: Tensor) -> Tensor:
        if self.projection is not None:
            return torch.as_tensor(self.projection(preactivated))
        if self.pad:
            return padded(x, self.stride, self.pad_before, self.extra_channels)
        return x

    def _residual(self, preactivated: Tensor) -> Tensor:
        x = self.convs[0](preactivated)
        for bn, conv in zip(self.bns[1:], self.convs[1:], strict=True):
            x = conv(F.relu(bn(x)))
        if not self.training and self.survival != 1:
            x = self.survival * x
        return torch.as_tensor(x)

    def skip(self, x: Tensor) -> Tensor:
        return self._skip(x, x if self.projection is None else self._preactivated(x))

    def residual(self, x: Tensor) -> Tensor:
        return self._residual(self._preactivated(x))

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preactivated = self._preactivated(x)
        return self._skip(x, preactivated), self._residual(preactivated)

    @torch.no_grad()
    def settle(self) -> None:
        torch.as_tensor(self.convs[-1].weight).mul_(self.survival)
        self.survival = 1.0

    def form(self) -> FusedForm | None:
        if not self.training and self.survival != 1:
            return None
        units = tuple(Unit(bn, conv) for bn, conv in zip(self.bns, self.convs, strict=True))  # type: ignore[arg-type]
        return FusedForm(units, self.projection, self.pad, self.pad_before)

    def unfused_reason(self) -> str:
        return f"its residual module is scaled by a survival probability of {self.survival:g}"


def _stage(
    channels: int, width: int, count: int, stride: int, kind: Kind, shortcut: Shortcut
) -> tuple[list[PreactBlock], int]:
    out_channels = width * EXPANSION[kind]
    kernels, widths = ((3, 3), (width, width)) if kind == "basic" else ((1, 3, 1), (width, width, out_channels))
    blocks = []
    for position in range(count):
        blocks.append(PreactBlock(channels, kernels, widths, stride if position == 0 else 1, shortcut))
        channels = out_channels
    return blocks, channels


def linear_decay(n: int, last: float) -> list[float]:
    """Return survival probabilities of n modules that decrease linearly to ``last``.

    They follow equation 4 of Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    return [1 - (i + 1) / n * (1 - last) for i in range(n)]


def preact_resnet(
    depth: int,
    width: int = 16,
    num_classes: int = 10,
    shortcut: Shortcut = "projection",
    block: Kind = "basic",
    in_channels: int = 3,
    survival: float = 1.0,
) -> ResidualNet:
    """Build the CIFAR form: a 3x3 stem, three stages of ``width``, ``2 width``, ``4 width``, a linear head.

    Stages 2 and 3 begin with stride 2. Depth 110 with basic blocks has 54 blocks, 18 per stage: the network of
    the paper's section 4 (He et al., "Identity Mappings in Deep Residual Networks", 2016). It maps images
    [B, in_channels, H, W] to logits [B, num_classes]. Images may have any side: 32 for CIFAR, 8 for the digits.
    Weights are drawn from torch's global generator.

    Args:
        depth: number of layers with weights along the longest path: 6n + 2 for ``basic``, 9n + 2 for ``bottleneck``.
        width: number of channels of the first stage (times four at a bottleneck block's output).
        num_classes: number of classes.
        shortcut: the skip connection of blocks that change shape: ``projection`` (1x1 convolution of the
            pre-activated input), ``pad`` (every second pixel of the raw input, zero channels appended) or
            ``pad_around`` (half of the zero channels before the input's, half after them).
        block: ``basic`` (two 3x3 convolutions) or ``bottleneck`` (1x1, 3x3, 1x1).
        in_channels: number of channels of the images.
        survival: survival probability of the last module in training with stochastic depth; those of the other
            modules rise linearly towards 1 at the first (Huang et al. 2016). 1 for training without stochastic depth.

    Raises:
        ValueError: an argument is out of its range, or the depth does not fit the kind of block.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> net = models.preact_resnet(depth=110)
        >>> net.n, net(torch.zeros(1, 3, 32, 32)).shape
        (54, torch.Size([1, 10]))
        >>> stochastic = models.preact_resnet(depth=14, survival=0.4)
        >>> [round(block.survival, 1) for block in stochastic]
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    """
    one_of("shortcut", shortcut, Shortcut)
    width, in_channels = check_size("width", width), check_size("in_channels", in_channels)
    num_classes = check_size("num_classes", num_classes)
    survival = check_number("survival", survival, above=0, most=1)
    count = blocks_a_stage(depth, block)
    channels, blocks = width, []
    for stage in range(3):
        stage_blocks, channels = _stage(channels, width << stage, count, 1 if stage == 0 else 2, block, shortcut)
        blocks += stage_blocks
    for built, probability in zip(blocks, linear_decay(len(blocks), survival), strict=True):
        built.survival = probability
    config: dict[str, Any] = {
        "model": "preact_resnet",
        "depth": int(depth),
        "width": width,
        "num_classes": num_classes,
        "shortcut": shortcut,
        "block": block,
        "in_channels": in_channels,
    }
    if survival != 1:
        config["survival"] = survival
    return initialised(
        ResidualNet(convolution(in_channels, width, 3), blocks, linear_head(channels, num_classes), config)
    )


def preact_resnet_imagenet(depth: int = 200, num_classes: int = 1000, width: int = 64) -> ResidualNet:
    """Build the ImageNet form: a 7x7 stem with max-pooling and four stages of bottleneck blocks.

    Depth 200 has 66 blocks (3, 24, 36, 3): the network of the paper's Figure 4. The stem has no BN and ReLU,
    since the first block begins with them. The network maps images [B, 3, H, W], of side 224 in training on ImageNet,
    to logits [B, num_classes].

    Args:
        depth: 50, 101, 152 or 200.
        num_classes: number of classes.
        width: number of channels inside the first stage's bottlenecks.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> net = models.preact_resnet_imagenet(depth=50, num_classes=20, width=4)
        >>> net.n, net(torch.zeros(2, 3, 64, 64)).shape
        (16, torch.Size([2, 20]))
    """
    depth = check_integer("depth", depth, 1, MOST_LAYERS)
    if depth not in IMAGENET_STAGES:
        raise ValueError(f"depth: expected {', '.join(map(str, IMAGENET_STAGES))}, got {depth}")
    width, num_classes = check_size("width", width), check_size("num_classes", num_classes)
    stem = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
    channels, blocks = width, []
    for stage, count in enumerate(IMAGENET_STAGES[depth]):
        stage_blocks, channels = _stage(
            channels, width << stage, count, 1 if stage == 0 else 2, "bottleneck", "projection"
        )
        blocks += stage_blocks
    config = {
        "model": "preact_resnet_imagenet",
        "depth": depth,
        "num_classes": num_classes,
        "width": width,
    }
    return initialised(ResidualNet(stem, blocks, linear_head(channels, num_classes), config))
