"""VGG, a network without skip connections (Simonyan and Zisserman 2015).

The paper compares residual networks with it (section 4.1).
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.checks import check_flag, check_integer
from pathnet.models.building import MOST_LAYERS, check_size, initialised
from pathnet.models.residual_net import Block, ResidualNet

__all__ = ["VggLayer", "vgg"]


MOST_STAGES = 32


class VggLayer(Block):
    """A 3x3 convolution, BN, ReLU, and max-pooling at the end of a stage, as a block whose skip connection is zero.

    If the layer is deleted, its input passes on, pooled if the layer pools, instead of zeros (section 4.1).

    Args:
        channels: number of channels of input and output, [B, channels, H, W].
        pool: whether max-pooling halves the sides of the output, rounded down.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> layer, x = models.VggLayer(8, pool=True), torch.ones(2, 8, 4, 4)
        >>> layer(x).shape, layer.skip(x).abs().max(), layer.lesioned(x).min()
        (torch.Size([2, 8, 2, 2]), tensor(0.), tensor(1.))
    """

    def __init__(self, channels: int, pool: bool) -> None:
        super().__init__()
        channels, pool = check_size("channels", channels), check_flag("pool", pool)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = pool

    def _pooled(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if self.pool else x

    def skip(self, x: Tensor) -> Tensor:
        return 0.0 * self._pooled(x)

    def residual(self, x: Tensor) -> Tensor:
        return self._pooled(F.relu(self.bn(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x)

    def lesioned(self, x: Tensor) -> Tensor:
        return self._pooled(x)


def vgg(
    depth: int = 15, width: int = 128, num_classes: int = 10, in_channels: int = 3, stages: int = 4
) -> ResidualNet:
    """Build a network of ``depth`` layers with weights and ``width`` channels throughout.

    The defaults are the paper's (section 4.1). The stem is the first layer, which changes the number of channels and
    so cannot be deleted. Each further convolution is a block. The classifier, after average pooling, is the last
    layer. The network maps images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        depth: number of convolutions, plus one for the classifier.
        width: number of channels.
        num_classes: number of classes.
        in_channels: number of channels of the images.
        stages: number of stages; max-pooling between them halves the images' side.

    Raises:
        ValueError: an argument is out of its range, or the network is too shallow for its stages.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> net = models.vgg(depth=15, width=32, in_channels=1, stages=3)
        >>> net.n, net(torch.zeros(2, 1, 8, 8)).shape
        (13, torch.Size([2, 10]))
    """
    width, in_channels = check_size("width", width), check_size("in_channels", in_channels)
    num_classes, stages = check_size("num_classes", num_classes), check_integer("stages", stages, 1, MOST_STAGES)
    depth = check_integer("depth", depth, 1, MOST_LAYERS)
    # The first stage ends in a block, since the stem does not pool.
    least = (3 * stages + 1) // 2 + 1
    if depth < least:
        raise ValueError(f"depth: expected at least {least} layers for {stages} stages, got {depth}")
    convolutions = depth - 1
    ends = {round(convolutions * (stage + 1) / stages) for stage in range(stages - 1)}
    stem = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, width, 3, padding=1, bias=False), bn=nn.BatchNorm2d(width), relu=nn.ReLU()
        )
    )
    blocks = [VggLayer(width, layer in ends) for layer in range(2, convolutions + 1)]
    head = nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(width, num_classes))
    )
    config = {
        "model": "vgg",
        "depth": depth,
        "width": width,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "stages": stages,
    }
    return initialised(ResidualNet(stem, blocks, head, config))
