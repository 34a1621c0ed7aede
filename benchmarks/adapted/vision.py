"""A vision transformer and a ConvNeXt in plain PyTorch, as an ordinary user writes them; nothing of pathnet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.adapted.language import Layer, perceptron

__all__ = ["ConvNeXt", "ConvNeXtBlock", "Vit"]


class Vit(nn.Module):
    """Images [B, 3, side, side] to logits [B, classes], read from a class token."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + (side // patch) ** 2, width))
        self.layers = nn.ModuleList(Layer(width, heads, causal=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.logits(x)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(images.shape[0], -1, -1), patches], 1) + self.positions

    def logits(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.norm(x)[:, 0]))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A 7x7 depthwise convolution, a normalisation and a perceptron of each position: one residual module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), perceptron(width, 4 * width)
        # As in a trained network: the 1e-6 of an initialisation would leave the gradients of most paths at nothing.
        self.scale = nn.Parameter(0.1 + 0.1 * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        positions = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return torch.as_tensor((self.scale * self.mlp(positions)).permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """Images [B, 3, side, side] to logits [B, classes], by stages of blocks with downsampling layers between them."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0]))
        self.between = nn.ModuleList(
            nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, 2, stride=2))
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvNeXtBlock(width) for _ in range(depth))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for stage, blocks in enumerate(self.stages):
            if stage > 0:
                x = self.between[stage - 1](x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.norm(x.mean((2, 3)))))
