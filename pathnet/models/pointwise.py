"""Strided 1x1 convolutions: projections, and the gates beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Pointwise"]


class Pointwise(nn.Conv2d):
    """A 1x1 convolution with a stride whose weight gradient is that of stride 1 over every stride-th pixel.

    oneDNN, as torch 2.13 ships it, writes beyond its buffers in the weight gradient of a strided 1x1 convolution with
    few input channels in channels_last, on processors with AVX2 and without AVX-512. Where no weight gradient can be
    asked for, the convolution runs as it is, and traces as one.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], self.weight, self.bias)
