"""Contexts after which a model is as it was before."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules import transformer

from pathnet.models.block import Block
from pathnet.models.hooks import hooks_removed

__all__ = ["attributes_restored", "evaluating_restored", "plain", "uncompiled"]

OF_MODULES = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has."""

_LOCK = threading.RLock()
"""Held while a model is traced: the traces of torch change its classes for all threads."""


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wraps, or the block that a fused one views, or the model itself."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model.plain() if isinstance(model, Block) else model


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Let a model run as its code says, and restore it afterwards.

    It runs without compilation of itself, of its submodules and of functions that it calls, without the kernels of
    fused blocks, without reentrant checkpoints, which cannot be differentiated with respect to chosen tensors,
    without a user's hooks, and without control flow on the values of a transformer's mask.
    """
    with _LOCK, ExitStack() as stack:
        children = _uncompiled_children(model)
        modules = [module for module in model.modules() if module._compiled_call_impl is not None]
        calls = [(module, module._compiled_call_impl) for module in modules]
        for module in modules:
            module._compiled_call_impl = None
        stack.enter_context(_eager())
        stack.enter_context(hooks_removed(model))
        checkpoint_function = torch.utils.checkpoint.CheckpointFunction
        torch.utils.checkpoint.CheckpointFunction = _NoCheckpoint  # type: ignore[assignment,misc]
        detect_causal_mask = transformer._detect_is_causal_mask
        transformer._detect_is_causal_mask = _as_hinted
        try:
            yield
        finally:
            transformer._detect_is_causal_mask = detect_causal_mask
            torch.utils.checkpoint.CheckpointFunction = checkpoint_function  # type: ignore[misc]
            for module, call in calls:
                module._compiled_call_impl = call
            for parent, name, child in children:
                parent._modules[name] = child


def _as_hinted(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Stand for the function of `nn.TransformerEncoder` that reads a mask's values to find out if it is causal.

    That is a hint alone: the mask itself is applied.
    """
    return is_causal is True


class _NoCheckpoint:
    """Stands for the autograd function of reentrant checkpoints, and keeps all intermediate results."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _uncompiled_children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put the original modules in place of compiled and fused ones; return what was there: parent, name, module."""
    children = []
    pending, visited = [model], {model}
    while pending:
        parent = pending.pop()
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            original = uncompiled(child)
            if original is not child:
                children.append((parent, name, child))
                parent._modules[name] = original
            if original not in visited:
                visited.add(original)
                pending.append(original)
    return children


@contextmanager
def _eager() -> Iterator[None]:
    """Run functions that `torch.compile` wraps as they are, also while `torch.fx` traces them."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        # Nothing is compiled; the import takes long.
        yield
        return
    import torch._dynamo.config

    with (
        torch.compiler.set_stance("force_eager"),
        torch._dynamo.config.patch(error_on_nested_fx_trace=False),
    ):
        yield


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the attributes and buffers of every module afterwards, to the same objects.

    Lists, dictionaries and sets among the attributes get their items back: a model may cache masks in them.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    containers = [
        (value, copy.copy(value))
        for _, attributes, _ in before
        for name, value in attributes.items()
        if type(value) in (dict, list, set) and name not in OF_MODULES
    ]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for current, original in ((vars(module), attributes), (module._buffers, buffers)):
                current.clear()
                current.update(original)
        for container, items in containers:
            container.clear()
            if isinstance(container, list):
                container.extend(items)
            else:
                container.update(items)


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
        with (
            # Around `eval`, which some models override.
            attributes_restored(model),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            model.eval().requires_grad_(False)
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
