"""Guesses at the inputs of a model, from its layers and its configuration."""

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
    """Yield batches of two samples that the model may accept, likeliest first."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in _dummy_inputs(model):
        yield tensor.to(device)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            vocabulary = module.num_embeddings
            yield torch.randint(vocabulary // 2, vocabulary, (BATCH, TOKENS), generator=generator).to(device)
            break
    kinds = dict.fromkeys(
        (module.in_channels, len(module.kernel_size), module.weight.dtype)
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )
    # The first layer need not be registered first, but images have three channels or one.
    for channels, dims, dtype in sorted(kinds, key=lambda kind: kind[0] not in (1, 3)):
        for side in (*_configured_sides(model), *SIDES):
            shape = (BATCH, channels, *((side,) * dims if isinstance(side, int) else side))
            yield torch.randn(shape, generator=generator).to(device, dtype)
    widths = dict.fromkeys(
        (module.in_features, module.weight.dtype) for module in model.modules() if isinstance(module, nn.Linear)
    )
    for width, dtype in widths:
        yield torch.randn(BATCH, width, generator=generator).to(device, dtype)


def _dummy_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Yield the example inputs that a Hugging Face model provides."""
    dummies: Any = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, Mapping):
        for name in ("input_ids", "pixel_values"):
            if isinstance(dummies.get(name), Tensor):
                yield dummies[name]


def _configured_sides(model: nn.Module) -> Iterator[int | tuple[int, ...]]:
    """Yield the image sizes in the configuration of a timm or Hugging Face model."""
    for name in ("pretrained_cfg", "default_cfg"):
        size = (getattr(model, name, None) or {}).get("input_size")
        if size:
            yield tuple(size[1:])
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        yield size
