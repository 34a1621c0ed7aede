"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathnet.checks import MOST_INTEGER, check_flag, check_integer, check_number, described, one_of

__all__ = ["Recipe", "check_recipe"]

Undrawn = Literal["none", "zero"]


@dataclass(frozen=True)
class Recipe:
    """Settings of SGD with Nesterov momentum, by default those of He et al. (2016), which the paper uses.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step; the last, smaller batch of an epoch is dropped.
        learning_rate: initial learning rate, divided by ten after half and after three quarters of all steps.
        warmup_steps: first steps, at ``warmup_learning_rate``, which very deep networks need.
        warmup_learning_rate: learning rate of the warm-up steps.
        momentum: momentum of SGD, in Nesterov's form.
        weight_decay: weight decay of every parameter.
        augment: apply the random crops and flips that the data set defines.
        bfloat16: autocast the forward and backward passes; weights and statistics stay float32.
        modules: number of residual modules drawn for each batch (effective training); 0 to draw by the network's
            survival probabilities (stochastic depth), or all modules if it has none.
        undrawn: gradient of modules that are not drawn: ``none`` keeps their weights in that step, ``zero`` lets
            weight decay and momentum change them.
        seed: seed of the order of the images, their augmentation and the drawn modules.
    """

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 400
    warmup_learning_rate: float = 0.01
    augment: bool = True
    bfloat16: bool = False
    modules: int = 0
    undrawn: Undrawn = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        # Convert to Python's own number types, because recipes are compared with those read from files.
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_steps", 0), ("modules", 0), ("seed", 0)):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least, MOST_INTEGER))
        for name in ("learning_rate", "warmup_learning_rate", "weight_decay"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), 0))
        object.__setattr__(self, "momentum", check_number("momentum", self.momentum, above=0, most=1))
        for name in ("augment", "bfloat16"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        one_of("undrawn", self.undrawn, Undrawn)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step ``step`` (from 0) of ``steps``."""
        step, steps = check_integer("step", step, 0), check_integer("steps", steps, 1)
        if step < self.warmup_steps:
            return self.warmup_learning_rate
        return self.learning_rate * 0.1 ** sum(step >= drop * steps for drop in (0.5, 0.75))


def check_recipe(value: object) -> None:
    """Raise ValueError unless ``value`` is a `Recipe`."""
    if not isinstance(value, Recipe):
        raise ValueError(f"recipe: expected a pathnet Recipe, got {described(value)}")
