"""Copies from the host to a device without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without synchronising.

    Host tensors are pinned first, since a copy from pageable memory would wait for the device.
    """
    if values.device == device:
        return values
    pinned = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=True)
