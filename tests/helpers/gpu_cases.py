"""The networks of the triton engine's tests on a GPU: a dozen fixed ones, since the kernels of each new form of block
take a core a second and a half each to compile. A run reads from here what to compile ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.cases import SMALL, Case, shaken
from pathnet.models import Block, PostactBlock, PreactBlock, ResidualNet, preact_resnet, resnet
from pathnet.recording import BatchNormMode, Precision

Job = tuple[BatchNormMode, Precision]

ALL: tuple[Job, ...] = (("running", "float32"), ("running", "bfloat16"), ("batch", "float32"), ("batch", "bfloat16"))


@dataclass(frozen=True)
class GpuCase:
    """A network, images [batch, 3, height, width], and the BN modes and precisions of its tests.

    Attributes:
        build: makes the network, after `torch.manual_seed`.
    """

    id: str
    build: Callable[[], ResidualNet]
    batch: int
    height: int
    width: int
    jobs: tuple[Job, ...]

    def net(self) -> ResidualNet:
        torch.manual_seed(0)
        return shaken(self.build()).eval()

    def images(self) -> tuple[Tensor, Tensor]:
        """Return float32 [B, 3, H, W] and int64 [B]."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.height, self.width, generator=generator)
        return images, torch.randint(0, 5, (self.batch,), generator=generator)


def chain(channels: int, blocks: Sequence[Block], relu: bool = False) -> ResidualNet:
    """Return the blocks after a convolution, with a ReLU between for post-activation blocks."""
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False))
    if relu:
        stem.append(nn.ReLU())
    *_, last = [module for module in blocks[-1].modules() if isinstance(module, nn.BatchNorm2d)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    net = ResidualNet(stem, blocks, head)
    net(torch.zeros(2, 3, 8, 8))
    return net


def odd_widths() -> ResidualNet:
    """Return blocks whose widths are multiples neither of 16 nor of 8."""
    blocks: list[Block] = [
        PreactBlock(17, (3, 3), (17, 17), 1, "pad"),
        PreactBlock(17, (3, 3), (21, 21), 2, "pad"),
        PreactBlock(21, (3, 3), (21, 21), 1, "pad"),
    ]
    return chain(17, blocks)


def one_channel() -> ResidualNet:
    blocks: list[Block] = [
        PreactBlock(1, (3, 3), (2, 1), 1, "pad"),
        PreactBlock(1, (3, 3), (3, 3), 2, "projection"),
    ]
    return chain(1, blocks)


def other_kernels() -> ResidualNet:
    """Return blocks of one and two convolutions, with kernels of 5, 3 and 1."""
    blocks: list[Block] = [
        PreactBlock(8, (5, 3), (11, 8), 1, "projection"),
        PreactBlock(8, (3,), (9,), 2, "projection"),
        PreactBlock(9, (3, 1), (6, 12), 1, "pad"),
    ]
    return chain(8, blocks)


def wider_than_a_tile() -> ResidualNet:
    blocks: list[Block] = [
        PreactBlock(70, (3, 3), (70, 70), 1, "projection"),
        PreactBlock(70, (3, 3), (74, 74), 2, "projection"),
    ]
    return chain(70, blocks)


def bottlenecks() -> ResidualNet:
    """Return the first blocks of ResNet-50 to 200."""
    blocks: list[Block] = [
        PreactBlock(64, (1, 3, 1), (64, 64, 256), 1, "projection"),
        PreactBlock(256, (1, 3, 1), (64, 64, 256), 1, "projection"),
        PreactBlock(256, (1, 3, 1), (128, 128, 512), 2, "projection"),
    ]
    return chain(64, blocks)


def post_basic() -> ResidualNet:
    blocks: list[Block] = [
        PostactBlock(12, (3, 3), (9, 12), 1, "pad"),
        PostactBlock(12, (3, 3), (19, 19), 2, "pad"),
        PostactBlock(19, (3, 3), (19, 19), 1, "pad"),
    ]
    return chain(12, blocks, relu=True)


def post_bottlenecks() -> ResidualNet:
    """Return post-activation blocks without a ReLU before the first."""
    blocks: list[Block] = [
        PostactBlock(10, (1, 3, 1), (5, 5, 10), 1, "projection"),
        PostactBlock(10, (1, 3, 1), (6, 6, 24), 2, "projection"),
        PostactBlock(24, (1, 3, 1), (6, 6, 24), 1, "projection"),
    ]
    return chain(10, blocks)


CASES = [
    # Its kernels are those of the papers' networks, which are compiled in any case.
    GpuCase("preact-14", lambda: preact_resnet(14, num_classes=5), 9, 27, 31, ALL),
    GpuCase("bottlenecks", bottlenecks, 3, 26, 29, (("running", "bfloat16"), ("batch", "bfloat16"))),
    GpuCase("resnet-14", lambda: resnet(14, num_classes=5), 8, 28, 32, (("running", "float32"),)),
    GpuCase("odd-widths", odd_widths, 9, 13, 7, (("batch", "bfloat16"),)),
    GpuCase("one-channel", one_channel, 3, 1, 5, (("running", "float32"),)),
    GpuCase("other-kernels", other_kernels, 11, 9, 10, (("running", "bfloat16"),)),
    GpuCase("wider-than-a-tile", wider_than_a_tile, 8, 11, 12, (("batch", "float32"),)),
    GpuCase("post-basic", post_basic, 9, 13, 14, (("running", "bfloat16"),)),
    GpuCase("post-bottlenecks", post_bottlenecks, 10, 9, 16, (("batch", "float32"),)),
]
"""Networks of at most 6 blocks, so brute force can compute all paths."""

DEEP = Case("resnet-110", 110, width=16, side=32, batch=16)

WIDTH_16 = Case("basic-16", 8, width=16, side=32)

FUSED = [(SMALL[2], True), (WIDTH_16, True), (WIDTH_16, False), (SMALL[4], False)]
"""Networks whose blocks are trained, and whether in training mode: padded skips, projections, bottlenecks."""


def jobs() -> list[tuple[GpuCase, BatchNormMode, Precision]]:
    return [(case, bn, precision) for case in CASES for bn, precision in case.jobs]
