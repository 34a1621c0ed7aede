"""The rule by which a record keeps its graphs, and the bytes that it takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["KEPT_SHARE", "available", "storages"]

KEPT_SHARE = 0.25
"""Share of the memory that is free when a batch is recorded, which the record's saved activations may fill."""


def available(device: torch.device) -> int:
    """Return the bytes of free memory: a GPU's, or what the system can give without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return UNKNOWN


UNKNOWN = 8 << 30
"""Bytes that are taken to be free where the system does not tell."""


def storages(tensors: Iterable[Tensor]) -> dict[object, int]:
    """Return the bytes of each storage behind the tensors."""
    sizes: dict[object, int] = {}
    for tensor in tensors:
        if tensor.is_mkldnn:
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        elif tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes
