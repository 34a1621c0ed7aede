"""Parts that the builders of networks share: layers, heads, initial weights, and checks of sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.checks import check_integer, check_integers, one_of
from pathnet.models.pointwise import Pointwise
from pathnet.models.residual_net import ResidualNet

__all__ = [
    "EXPANSION",
    "MOST_LAYERS",
    "Kind",
    "Shortcut",
    "blocks_a_stage",
    "check_block",
    "check_size",
    "convolution",
    "initialised",
    "linear_head",
    "padded",
]

Shortcut = Literal["projection", "pad", "pad_around"]
Kind = Literal["basic", "bottleneck"]

EXPANSION = {"basic": 1, "bottleneck": 4}
MOST_SIDE = 1 << 10
MOST_CHANNELS = 1 << 16
MOST_CLASSES = 1 << 24
MOST_LAYERS = 100_000


def padded(x: Tensor, stride: int, before: int, extra_channels: int) -> Tensor:
    """Return every stride-th pixel of [B, C, H, W] with zero channels added, ``before`` of them in front."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, extra_channels - before))


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    if kernel == 1 and stride > 1:
        return Pointwise(in_channels, out_channels, stride)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def linear_head(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(channels, num_classes),
        )
    )


def initialised(net: ResidualNet) -> ResidualNet:
    """Initialise the weights of a network as He et al. 2015 do, and return it.

    Fan-out variance keeps the norm of gradients roughly constant through a residual module.
    """
    for module in net.modules():
        # There is nothing to initialise on the meta device, where torch would import sympy for it: seconds.
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return net


def check_size(name: str, value: object) -> int:
    """Return a number of channels or classes as a Python integer.

    Raises:
        ValueError: it is not an integer, less than 1, or more than any network has.
    """
    return check_integer(name, value, 1, MOST_CLASSES if name == "num_classes" else MOST_CHANNELS)


def check_block(
    in_channels: int, kernels: Sequence[int], widths: Sequence[int], stride: int, shortcut: Shortcut
) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """Return the input channels, kernel sides, widths and stride of a chain of convolutions as Python integers.

    Raises:
        ValueError: one is out of its range, no kernel has side 3, or kernels and widths differ in number.
    """
    one_of("shortcut", shortcut, Shortcut)
    sides = check_integers("kernels", kernels, 1, MOST_SIDE)
    if 3 not in sides:
        raise ValueError(f"kernels: expected a side of 3 among them, got {list(sides)}")
    channels = check_integers("widths", widths, 1, MOST_CHANNELS)
    if len(channels) != len(sides):
        raise ValueError(f"widths: expected {len(sides)} (one per kernel), got {len(channels)}")
    return check_size("in_channels", in_channels), sides, channels, check_integer("stride", stride, 1, MOST_SIDE)


def blocks_a_stage(depth: int, block: Kind) -> int:
    """Return the number of blocks in each of the three stages of the CIFAR form.

    Raises:
        ValueError: the kind of block is unknown, or the depth does not fit it.
    """
    one_of("block", block, Kind)
    depth = check_integer("depth", depth, 1, MOST_LAYERS)
    layers = 6 if block == "basic" else 9
    if depth < layers + 2 or (depth - 2) % layers:
        below = max(layers + 2, depth - (depth - 2) % layers)
        raise ValueError(
            f"depth: {block} blocks need a depth of {layers}n + 2 (such as {below} or {below + layers}), got {depth}"
        )
    return (depth - 2) // layers
