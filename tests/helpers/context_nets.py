"""A network whose blocks and head read a context: each sample's scale, given beside the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.models import Block, ResidualNet
from pathnet.models.context import NO_CONTEXT, Context

CLASSES = 4


class ScaledBlock(Block):
    """``y = s x + s tanh(W x)`` with each sample's scale s."""

    def __init__(self, linear: nn.Module, context: Context = NO_CONTEXT) -> None:
        super().__init__()
        self.linear, self.context = linear, context

    def skip(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.context.values["scale"] * x)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.context.values["scale"] * torch.tanh(self.linear(x)))

    def bound(self, context: Context) -> Block:
        # In another module, as bound blocks may be: names of parameters change.
        return ScaledBlock(nn.Sequential(self.linear), context)


class ScaledNet(ResidualNet):
    """A network of inputs ``(images, scale)`` or ``{"x": images, "scale": scale}``, images [B, 5], scale [B, 1]."""

    def __init__(self, stem: nn.Module, blocks: Sequence[Block], head: nn.Module) -> None:
        super().__init__(stem, blocks, head)

    def split(self, inputs: Any) -> tuple[Tensor, Context]:
        if not isinstance(inputs, dict):
            inputs = dict(zip(("x", "scale"), inputs, strict=True))
        return inputs["x"], Context({"scale": inputs["scale"]}, {"scale": 0})

    def bound(self, context: Context) -> ResidualNet:
        return ScaledNet(self.stem, [block.bound(context) for block in self], self.head)


def scaled_net(blocks: int = 3) -> ScaledNet:
    torch.manual_seed(0)
    parts = [ScaledBlock(nn.Linear(6, 6)) for _ in range(blocks)]
    return ScaledNet(nn.Linear(5, 6), parts, nn.Linear(6, CLASSES)).eval()


def scaled_inputs(batch: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the inputs (images, scale) and labels."""
    generator = torch.Generator().manual_seed(seed)
    images, scale = torch.randn(batch, 5, generator=generator), torch.rand(batch, 1, generator=generator) + 0.5
    return (images, scale), torch.randint(0, CLASSES, (batch,), generator=generator)
