"""Strided 1x1 convolutions, for projections and gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Pointwise"]


class Pointwise(nn.Conv2d):
    """A strided 1x1 convolution that computes its weight gradient at stride 1 over the subsampled input.

    On processors with AVX2 but without AVX-512, the oneDNN of torch 2.13 writes beyond its buffers in the weight
    gradient of a strided 1x1 convolution with few input channels in channels_last. If no weight gradient can be
    requested, the convolution runs unchanged, and is traced as a convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], self.weight, self.bias)
