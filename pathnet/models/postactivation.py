"""Post-activation residual networks (He et al., "Deep Residual Learning for Image Recognition", 2016)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.checks import one_of
from pathnet.models.building import (
    EXPANSION,
    Kind,
    Shortcut,
    blocks_a_stage,
    check_block,
    check_size,
    convolution,
    initialised,
    padded,
)
from pathnet.models.residual_net import Block, PostActivationForm, ResidualNet

__all__ = ["PostactBlock", "resnet"]


class PostactBlock(Block):
    """``y = relu(s(x) + f(x))``, where f is a chain of convolutions, each with its BN, and ReLUs between them.

    The ReLU after the addition belongs to both branches: it is the block's `join`, whose Jacobian every path passes.
    The block maps [B, in_channels, H, W] to [B, widths[-1], H / stride, W / stride], sides rounded up.

    Args:
        in_channels: number of channels of the block's input.
        kernels: kernel side of each convolution.
        widths: number of output channels of each convolution.
        stride: stride of the first 3x3 convolution.
        shortcut: the skip connection if stride or channels change: ``projection`` (a 1x1 convolution and BN) or
            ``pad`` (every stride-th pixel, zero channels appended) or ``pad_around`` (half of those channels before
            the input's, half after them); it is the identity otherwise.

    Raises:
        ValueError: an argument is out of its range, no kernel has side 3, or kernels and widths differ in number.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> block = models.PostactBlock(2, kernels=(3, 3), widths=(2, 2), stride=1, shortcut="projection")
        >>> block.lesioned(torch.tensor([-1.0, 2.0]).reshape(1, 2, 1, 1)).flatten()  # relu(s(x)), here relu(x)
        tensor([0., 2.])
    """

    def __init__(
        self, in_channels: int, kernels: Sequence[int], widths: Sequence[int], stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        in_channels, kernels, widths, stride = check_block(in_channels, kernels, widths, stride, shortcut)
        channels, strided = in_channels, kernels.index(3)
        self.convs, self.bns = nn.ModuleList(), nn.ModuleList()
        for position, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
            self.convs.append(convolution(channels, width, kernel, stride if position == strided else 1))
            self.bns.append(nn.BatchNorm2d(width))
            channels = width
        self.stride, self.extra_channels = stride, channels - in_channels
        changes_shape = stride != 1 or self.extra_channels != 0
        self.pad = changes_shape and shortcut != "projection"
        self.pad_before = self.extra_channels // 2 if self.pad and shortcut == "pad_around" else 0
        projects = changes_shape and not self.pad
        self.projection = convolution(in_channels, channels, 1, stride) if projects else None
        self.projection_bn = nn.BatchNorm2d(channels) if projects else None

    def skip(self, x: Tensor) -> Tensor:
        if self.projection is not None and self.projection_bn is not None:
            return torch.as_tensor(self.projection_bn(self.projection(x)))
        if self.pad:
            return padded(x, self.stride, self.pad_before, self.extra_channels)
        return x

    def residual(self, x: Tensor) -> Tensor:
        for position, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            x = bn(conv(F.relu(x) if position else x))
        return x

    def join(self, z: Tensor) -> Tensor:
        return F.relu(z)

    def form(self) -> PostActivationForm:
        convs, bns = tuple(self.convs), tuple(self.bns)
        return PostActivationForm(
            convs,  # type: ignore[arg-type]
            bns,  # type: ignore[arg-type]
            self.projection,
            self.projection_bn,
            self.pad,
            self.pad_before,
        )


def resnet(
    depth: int,
    width: int = 16,
    num_classes: int = 10,
    shortcut: Shortcut = "pad",
    block: Kind = "basic",
    in_channels: int = 3,
) -> ResidualNet:
    """Build the CIFAR form: a 3x3 stem, three stages of ``width``, ``2 width``, ``4 width``, a linear head.

    This is the CIFAR network of He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2. The
    stem is a convolution with BN and ReLU. The network maps images [B, in_channels, H, W] to logits [B, num_classes].
    Weights are drawn from torch's global generator.

    Args:
        depth: number of layers with weights along the longest path: 6n + 2 for ``basic``, 9n + 2 for ``bottleneck``.
        width: number of channels of the first stage (times four at a bottleneck block's output).
        num_classes: number of classes.
        shortcut: the skip connection of blocks that change shape: ``pad``, as in He et al. on CIFAR, ``pad_around``,
            or ``projection``.
        block: ``basic`` (two 3x3 convolutions) or ``bottleneck`` (1x1, 3x3, 1x1).
        in_channels: number of channels of the images.

    Raises:
        ValueError: an argument is out of its range, or the depth does not fit the kind of block.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> net = models.resnet(depth=20, width=8, in_channels=1)
        >>> net.n, net(torch.zeros(2, 1, 8, 8)).shape
        (9, torch.Size([2, 10]))
    """
    one_of("shortcut", shortcut, Shortcut)
    width, in_channels = check_size("width", width), check_size("in_channels", in_channels)
    num_classes, count = check_size("num_classes", num_classes), blocks_a_stage(depth, block)
    channels, blocks = width, []
    for stage in range(3):
        inner, out = width << stage, EXPANSION[block] * (width << stage)
        kernels, widths = ((3, 3), (inner, inner)) if block == "basic" else ((1, 3, 1), (inner, inner, out))
        for position in range(count):
            strided = stage > 0 and position == 0
            blocks.append(PostactBlock(channels, kernels, widths, 2 if strided else 1, shortcut))
            channels = out
    stem = nn.Sequential(
        OrderedDict(conv=convolution(in_channels, width, 3), bn=nn.BatchNorm2d(width), relu=nn.ReLU())
    )
    head = nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))
    )
    config = {
        "model": "resnet",
        "depth": int(depth),
        "width": width,
        "num_classes": num_classes,
        "shortcut": shortcut,
        "block": block,
        "in_channels": in_channels,
    }
    return initialised(ResidualNet(stem, blocks, head, config))
