"""Contexts after which a model is as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["attributes_restored", "evaluating_restored"]


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the attributes and buffers of every module afterwards, to the same objects."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for current, original in ((vars(module), attributes), (module._buffers, buffers)):
                current.clear()
                current.update(original)


@contextmanager
def evaluating_restored(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients of weights, and restore it afterwards.

    What is restored are modes, attributes, ``requires_grad``, buffers, the random state, and attention's fast path.
    """
    modes = [(module, module.training) for module in model.modules()]
    requirements = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval().requires_grad_(False)
        with (
            attributes_restored(model),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes:
            module.training = training
        for parameter, required in requirements:
            parameter.requires_grad_(required)
        with torch.no_grad():
            for buffer, original in buffers:
                if not torch.equal(buffer, original):
                    buffer.copy_(original)
