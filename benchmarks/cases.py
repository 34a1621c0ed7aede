"""The network and batches that are timed, and how many operations a walk through it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pathnet
from pathnet.models import ResidualNet

__all__ = ["Case", "PAPER", "REHEARSAL", "module_operations", "network"]


@dataclass(frozen=True)
class Case:
    """A pre-activation network of basic blocks and its batches of random images."""

    depth: int = 110
    width: int = 16
    side: int = 32
    batch: int = 128

    @property
    def n(self) -> int:
        """The number of blocks."""
        return (self.depth - 2) // 2

    def net(self, device: torch.device) -> ResidualNet:
        return network(self.depth, self.width).to(device)

    def images(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, H, W] and int64 [B]"""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.batch, 3, self.side, self.side, generator=generator)
        labels = torch.randint(0, 10, (self.batch,), generator=generator)
        return images.to(device), labels.to(device)


PAPER = Case()
"""The network of the paper's section 4: 54 blocks, CIFAR size."""

REHEARSAL = Case(depth=14, width=4, side=8, batch=4)


def network(depth: int, width: int) -> ResidualNet:
    """Random weights, BN with statistics and factors of their own, in evaluation mode."""
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(depth, width)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.7, 1.5)  # type: ignore[arg-type]
    return net.eval()


def module_operations(net: ResidualNet, side: int) -> list[int]:
    """Floating-point operations of one sample's walk through each residual module: two a multiply-add, of its
    convolutions, at an image of ``side`` pixels."""
    operations = []
    for block in net.blocks:
        total = 0
        for conv in block.convs:
            side = (side - 1) // conv.stride[0] + 1
            taps = conv.kernel_size[0] * conv.kernel_size[1]
            # Backward as forward: every weight meets every position of the output.
            total += 2 * conv.in_channels * conv.out_channels * taps * side * side
        operations.append(total)
    return operations
