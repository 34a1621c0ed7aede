"""Modules that act in training alone, as a trace calls them."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["TrainingOnly"]


class TrainingOnly(nn.Module):
    """Calls a module of the model that returns its very input in evaluation, such as stochastic depth.

    Engines leave it out of evaluation, as they leave out dropout.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def is_active(self) -> bool:
        return self.module.training

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]
