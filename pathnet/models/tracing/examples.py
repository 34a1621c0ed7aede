"""Guesses at what a model takes, from its layers and its own account of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["examples"]

BATCH = 2
TOKENS = 16
SIDES = (64, 224, 32, 299)


def examples(model: nn.Module) -> Iterator[Tensor]:
    """Batches of two that the model may take, the likeliest first."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in _own(model):
        yield tensor.to(device)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            most = module.num_embeddings
            yield torch.randint(most // 2, most, (BATCH, TOKENS), generator=generator).to(device)
            break
    kinds = dict.fromkeys(
        (module.in_channels, len(module.kernel_size), module.weight.dtype)
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )
    # The first layer need not be the first to be registered; images have three channels or one.
    for channels, dims, dtype in sorted(kinds, key=lambda kind: kind[0] not in (1, 3)):
        for side in (*_sides(model), *SIDES):
            shape = (BATCH, channels, *((side,) * dims if isinstance(side, int) else side))
            yield torch.randn(shape, generator=generator).to(device, dtype)
    widths = dict.fromkeys(
        (module.in_features, module.weight.dtype) for module in model.modules() if isinstance(module, nn.Linear)
    )
    for width, dtype in widths:
        yield torch.randn(BATCH, width, generator=generator).to(device, dtype)


def _own(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that the model keeps for such a purpose (Hugging Face)."""
    given: Any = getattr(model, "dummy_inputs", None)
    if isinstance(given, Mapping):
        for name in ("input_ids", "pixel_values"):
            if isinstance(given.get(name), Tensor):
                yield given[name]


def _sides(model: nn.Module) -> Iterator[int | tuple[int, ...]]:
    """The sizes of images that the model names itself (timm, Hugging Face)."""
    for name in ("pretrained_cfg", "default_cfg"):
        size = (getattr(model, name, None) or {}).get("input_size")
        if size:
            yield tuple(size[1:])
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        yield size
