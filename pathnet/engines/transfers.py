"""Copies from the host to a device that do not wait."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy that waits for no work on the device, as a copy of pageable memory would."""
    if values.device == device:
        return values
    pinned = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=True)
