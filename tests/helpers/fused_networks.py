"""A small network in training, a batch for it, and a count of the blocks that run fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cases import shaken
from pathnet import models
from pathnet.models import ResidualNet
from pathnet.nn import fusing

__all__ = ["batch", "count_runs", "network"]


def network(shortcut: Any = "projection", block: Any = "basic", survival: float = 1.0) -> ResidualNet:
    torch.manual_seed(0)
    depth = 14 if block == "basic" else 11
    return shaken(models.preact_resnet(depth, 4, 5, shortcut, block, survival=survival)).train()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which each run of a block's kernels adds the engine's name from now on."""
    names: list[str] = []
    run = fusing.run_fused

    def counted(kernels: Any, *arguments: Any) -> Tensor:
        names.append(kernels)
        return run(kernels, *arguments)

    monkeypatch.setattr(fusing, "run_fused", counted)
    return names
