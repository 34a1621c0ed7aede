"""The model that a network views, and what the network lacks of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from pathnet.checks import listed

__all__ = ["ViewedModel"]

MOST_NAMED = 3
ROOT = "the model itself"
"""Name of the model among names of its modules."""


class ViewedModel:
    """The model whose modules a network shares; it is no submodule of the network.

    Copies and pickled files hold the model only where a class overrides `train`, since the network's own modules
    suffice otherwise.

    Attributes:
        model: the model, or None.
        branches: names of the modules whose branch in training the network lacks.
        hooked: names of the modules with hooks that are no part of the network.
    """

    def __init__(
        self, model: nn.Module | None = None, branches: Iterable[str] = (), hooked: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.branches, self.hooked = (tuple(name or ROOT for name in names) for names in (branches, hooked))

    def trains(self, net: nn.Module) -> bool:
        """Return whether the model of a network is in training mode; for a copy without it, any of its modules."""
        if self.model is not None:
            return self.model.training
        return any(module.training and not _has_statistics(module) for module in net.modules())

    def check(self) -> None:
        """Raise ValueError if the network lacks a branch that the model takes in training."""
        if self.branches:
            words = [name if name == ROOT else repr(name) for name in self.branches]
            modules = listed(words[:MOST_NAMED])
            if len(words) > MOST_NAMED:
                modules += f" and up to {len(words) - MOST_NAMED} more"
            raise ValueError(
                f"net: expected evaluation mode, since tracing fixed the training branch of {modules}; training "
                "would run as evaluation does"
            )

    def train(self, net: nn.Module, mode: bool) -> None:
        """Set the mode of the model, and of modules of the network that stand for some of the model's."""
        if self.model is None:
            return
        self.model.train(mode)
        norms = {id(norm.running_mean): norm for norm in self.model.modules() if _has_statistics(norm)}
        for module in net.modules():
            if _has_statistics(module):
                module.training = norms.get(id(module.running_mean), module).training

    def _is_needed(self) -> bool:
        return self.model is not None and any(
            type(module).train is not nn.Module.train for module in self.model.modules()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ViewedModel:
        model = copy.deepcopy(self.model, memo) if self._is_needed() else None
        return ViewedModel(model, self.branches, self.hooked)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": self.model if self._is_needed() else None}


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
