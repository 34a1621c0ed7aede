"""Limits of the kernels: the networks, images and routings that they support."""

from __future__ import annotations

import torch
from torch import Tensor

from pathnet.engines.forms import unsupported_block
from pathnet.engines.triton.network import TritonNetwork
from pathnet.models.residual_net import ResidualNet

__all__ = ["MAX_ELEMENTS", "MAX_SIDE", "check_images", "check_sides", "room_of", "unsupported_side"]

ROOM = 4 << 30
"""Bytes for the gradients of one backward pass: some hundred routings of a CIFAR network at batch 128."""

MAX_ELEMENTS = (1 << 31) - (1 << 16)
"""Maximum number of elements of an activation: kernels number them, and those beyond in the last tile, in int32."""

MAX_SIDE = 1 << 19
"""Maximum side of an image, for which `tiles.quotient` is exact."""


def room_of(device: torch.device) -> int:
    """Return the bytes for the gradients of one backward pass: `ROOM`, on a small GPU a quarter of its memory."""
    if device.type not in ("cuda", "xpu"):
        return ROOM
    return min(ROOM, int(torch.get_device_module(device).get_device_properties(device).total_memory) // 4)


def unsupported_side(net: ResidualNet) -> str | None:
    """Return why the kernels cannot run a network that has tables, or None."""
    for index, block in enumerate(net):
        form = block.form()
        reason = None if form is None else unsupported_block(form)
        if reason is not None:
            return f"block {index}: {reason}"
    return None


def check_images(network: TritonNetwork, y0: Tensor) -> None:
    """Raise ValueError for a batch ``y_0`` [B, C_0, H_0, W_0] that the kernels do not support."""
    if len(y0) * network.largest >= MAX_ELEMENTS:
        limit = (MAX_ELEMENTS - 1) // network.largest
        raise ValueError(f"images: expected at most {limit} for the triton engine, got {len(y0)}")
    check_sides("images", y0)
    pixels = [shape.pixels for shape in network.normalized if shape is not None]
    if network.bn == "batch" and len(y0) == 1 and 1 in pixels:
        raise ValueError("images: expected more than one value per channel for batch statistics, got one")


def check_sides(name: str, images: Tensor) -> None:
    """Raise ValueError, with the argument's name, for images [B, C, H, W] with too long a side."""
    if max(images.shape[2:]) > MAX_SIDE:
        shape = list(images.shape[2:])
        raise ValueError(f"{name}: expected sides of at most {MAX_SIDE} pixels for the triton engine, got {shape}")
