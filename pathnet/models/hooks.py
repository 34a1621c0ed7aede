"""Hooks of modules: the few that compute part of a model, and a user's, which run in no trace and no copy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.prune import BasePruningMethod

__all__ = ["copy_without_hooks", "hooked", "hooks_removed"]

Module = TypeVar("Module", bound=nn.Module)

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_KINDS = tuple(f"_global{kind}" for kind in KINDS)


def _belongs_to_model(hook: Any) -> bool:
    """Return whether a hook computes part of the model: a weight from others, or the shape of a lazy weight.

    `torch.nn.utils.weight_norm`, ``spectral_norm`` and the pruning methods register objects of their own classes.
    """
    if isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils."):
        return True
    return isinstance(getattr(hook, "__self__", None), LazyModuleMixin)


def _kept(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((number, hook) for number, hook in hooks.items() if _belongs_to_model(hook))


def hooked(model: nn.Module) -> list[str]:
    """Return the names of the modules with hooks that are no part of the model; "" is the model itself."""
    return [
        name
        for name, module in model.named_modules()
        if any(len(_kept(getattr(module, kind))) < len(getattr(module, kind)) for kind in KINDS)
    ]


def copy_without_hooks(model: Module) -> Module:
    """Return a deep copy of a model that has only the hooks that compute part of it.

    Hooks may hold what cannot be copied: files, locks, a trainer. Weights that hooks compute are copied without the
    graph that computed them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for kind in KINDS:
            hooks = getattr(module, kind)
            if hooks:
                memo[id(hooks)] = _kept(hooks)
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@contextmanager
def hooks_removed(model: nn.Module) -> Iterator[None]:
    """Remove a user's hooks of modules, of all modules and of parameters, and restore them afterwards."""
    module_dicts = [(vars(module), kind) for module in model.modules() for kind in KINDS if getattr(module, kind)]
    places = [*module_dicts, *((vars(module_hooks), kind) for kind in GLOBAL_KINDS)]
    before = [(attributes, kind, attributes[kind]) for attributes, kind in places]
    parameters = [(parameter, parameter._backward_hooks) for parameter in model.parameters()]
    try:
        for attributes, kind, hooks in before:
            attributes[kind] = _kept(hooks)
        for parameter, hooks in parameters:
            if hooks:
                _set_hooks(parameter, None)
        yield
    finally:
        for attributes, kind, hooks in before:
            attributes[kind] = hooks
        for parameter, hooks in parameters:
            if hooks:
                _set_hooks(parameter, hooks)


def _set_hooks(parameter: torch.Tensor, hooks: Any) -> None:
    parameter._backward_hooks = hooks
