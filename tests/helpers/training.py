"""A small training, and steps of it as one would first write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pathnet import models
from pathnet.models import ResidualNet
from pathnet.training import Recipe

__all__ = [
    "DRAWS",
    "SMALL",
    "Board",
    "FusedCalls",
    "Interrupt",
    "fresh",
    "fused_passes",
    "left_out",
    "updated",
    "zeroed",
]

SMALL = Recipe(epochs=2, batch_size=32, learning_rate=0.05, warmup_steps=3)


class Interrupt(Exception):
    """Stand-in for an interrupt from the keyboard."""


class Board:
    """A writer that keeps what it gets, and has no ``flush``.

    Attributes:
        scalars: by name and step, in the order in which they came.
        repeated: the names and steps that came more than once.
    """

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.repeated: list[tuple[str, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        if (tag, global_step) in self.scalars:
            self.repeated.append((tag, global_step))
        self.scalars[tag, global_step] = scalar_value


class FusedCalls(TorchDispatchMode):
    """Count of the forward and the backward passes of fused blocks while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += function is torch.ops.pathnet.cpu_fused_residual.default
        self.backward += function is torch.ops.pathnet.cpu_fused_residual_backward.default
        return function(*args, **(kwargs or {}))


def fused_passes(net: ResidualNet, drawn: Sequence[bool] | None) -> int:
    """Return the number of blocks that compute a convolution in a step: in their module, or in their projection."""
    return sum(
        keep or block.projection is not None for block, keep in zip(net.blocks, drawn or (True,) * net.n, strict=True)
    )


def fresh() -> ResidualNet:
    """Return an untrained network of three blocks, always the same."""
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, in_channels=3)


def zeroed(net: ResidualNet, x: Tensor, drawn: Sequence[bool]) -> Tensor:
    """Return the output with every module computed, and modules that are not drawn multiplied by zero."""
    y = net.stem(x)
    for block, keep in zip(net.blocks, drawn, strict=True):
        first = F.relu(block.bns[0](y))
        residual = block.convs[0](first)
        for bn, conv in zip(block.bns[1:], block.convs[1:], strict=True):
            residual = conv(F.relu(bn(residual)))
        skip = y if block.projection is None else block.projection(first)
        if block.pad:
            skip = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1]))
        y = skip + float(keep) * residual
    return net.head(y)


def left_out(net: ResidualNet, drawn: Sequence[bool]) -> set[str]:
    """Return the parameters that only undrawn modules use; a projection shares its block's first BN."""
    names = set()
    for i, (block, keep) in enumerate(zip(net.blocks, drawn, strict=True)):
        for name, _ in block.named_parameters():
            shared = block.projection is not None and name.startswith(("projection", "bns.0"))
            if not keep and not shared:
                names.add(f"blocks.{i}.{name}")
    return names


DRAWS = [(True, False, True, False, True, False), (False, True, False, True, False, True), (False,) * 6, (True,) * 6]


def updated(
    net: ResidualNet,
    velocity: dict[str, Tensor],
    gradients: dict[str, Tensor],
    untouched: set[str],
    rate: float,
    decay: float,
) -> None:
    """Take one step of SGD with Nesterov momentum 0.9, for all parameters except the untouched ones."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name not in untouched:
                g = gradients[name] + decay * p
                velocity[name] = 0.9 * velocity[name] + g if name in velocity else g
                p.sub_(rate * (g + 0.9 * velocity[name]))
