"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pathnet.checks import check_integer, described
from pathnet.settings import Above, AtLeast, AtMost, Flag, Help, check_settings, documented

__all__ = ["Recipe", "check_recipe"]

Undrawn = Literal["none", "zero"]
Schedule = Literal["steps", "one-cycle"]
Flips = Literal["random", "alternating"]


@documented
@dataclass(frozen=True)
class Recipe:
    """Settings of SGD with Nesterov momentum, by default those of He et al. (2016), which the paper uses.

    Raises:
        ValueError: a setting has the wrong type or is out of its range.

    Example:
        >>> import pathnet
        >>> recipe = pathnet.training.Recipe(epochs=25, batch_size=32, warmup_steps=44)
        >>> [recipe.rate(step, steps=1000) for step in (0, 44, 500, 750)]
        [0.01, 0.1, 0.01, 0.001]
        >>> shorter = pathnet.training.Recipe(epochs=8, warmup_steps=200, schedule="one-cycle", label_smoothing=0.1)
        >>> [round(shorter.rate(step, steps=1000), 3) for step in (0, 100, 200, 600, 999)]
        [0.01, 0.055, 0.1, 0.05, 0.0]
    """

    epochs: Annotated[int, Help("Passes over the training split."), AtLeast(1)] = 200
    batch_size: Annotated[int, Help("Images per step; an incomplete last batch is dropped."), AtLeast(1)] = 128
    learning_rate: Annotated[
        float,
        Help("Largest learning rate, which the schedule lowers."),
        AtLeast(0),
        Flag("--lr"),
    ] = 0.1
    schedule: Annotated[
        Schedule,
        Help(
            "Learning rates. steps: the warm-up's, then the largest, divided by 10 after half of all steps and again "
            "after three quarters. one-cycle: rising linearly over the warm-up, or over half of all steps if that is "
            "less, then falling linearly to 0, which saves epochs (Smith and Topin 2018)."
        ),
        Flag(value="NAME"),
    ] = field(default="steps", kw_only=True)
    momentum: Annotated[float, Help("Nesterov momentum."), Above(0), AtMost(1)] = 0.9
    weight_decay: Annotated[float, Help("Weight decay of every parameter."), AtLeast(0)] = 1e-4
    warmup_steps: Annotated[int, Help("Number of warm-up steps, which very deep networks need."), AtLeast(0)] = 400
    warmup_learning_rate: Annotated[
        float,
        Help("Learning rate of the warm-up steps, or of the first of them with one-cycle."),
        AtLeast(0),
        Flag("--warmup-lr"),
    ] = 0.01
    augment: Annotated[
        bool, Help("Augment with random crops and flips, as the data set defines them."), Flag(negatable=True)
    ] = True
    flips: Annotated[
        Flips,
        Help(
            "Which images the augmentation mirrors. random: a random half in each epoch. alternating: a random half "
            "in the first epoch, the others in the second, and so on, so that two successive epochs show both forms "
            "of an image (Jordan 2024)."
        ),
        Flag(value="NAME"),
    ] = field(default="random", kw_only=True)
    label_smoothing: Annotated[
        float,
        Help(
            "Share of each label that the loss spreads evenly over all classes (Szegedy et al. 2016). 0: plain "
            "cross-entropy."
        ),
        AtLeast(0),
        AtMost(1),
    ] = field(default=0.0, kw_only=True)
    bfloat16: Annotated[
        bool,
        Help("Autocast forward and backward pass to bfloat16; weights and statistics stay float32."),
        Flag(negatable=True),
    ] = False
    modules: Annotated[
        int,
        Help(
            "Number of residual modules drawn for each batch (effective training). 0: all of them, or those that the "
            "network's survival probabilities draw (stochastic depth)."
        ),
        AtLeast(0),
    ] = 0
    undrawn: Annotated[
        Undrawn,
        Help(
            "Gradient of a module that is not drawn: none leaves the module as it is in that step, zero lets weight "
            "decay and momentum move it."
        ),
        Flag(value="GRAD"),
    ] = "none"
    seed: Annotated[
        int, Help("Seed of the order of images, their augmentation, and the drawn modules."), AtLeast(0)
    ] = 0

    def __post_init__(self) -> None:
        # Numbers become Python's own types, because recipes are compared with those read from files.
        check_settings(self)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step.

        With the schedule ``steps`` it is ``warmup_learning_rate`` in the first ``warmup_steps`` steps, then
        ``learning_rate``, a tenth of it from half of all steps on, and a hundredth from three quarters on.

        With ``one-cycle`` it rises linearly from ``warmup_learning_rate`` in step 0 to ``learning_rate`` in step
        ``warmup_steps``, or in the middle of a training that is shorter than two warm-ups. Then it falls linearly, to
        0 after the last step.

        Args:
            step: number of the step, from 0.
            steps: number of steps of the training.

        Returns:
            The rate, at least 0. It is 0 where ``step`` is ``steps`` or more and the schedule is ``one-cycle``.

        Raises:
            ValueError: ``step`` is negative, ``steps`` less than 1, or one of them no integer.
        """
        step, steps = check_integer("step", step, 0), check_integer("steps", steps, 1)
        if self.schedule == "one-cycle":
            return self._one_cycle(step, steps)
        if step < self.warmup_steps:
            return self.warmup_learning_rate
        return self.learning_rate * 0.1 ** sum(step >= drop * steps for drop in (0.5, 0.75))

    def _one_cycle(self, step: int, steps: int) -> float:
        # In a training that is shorter than its warm-up, the rate would never fall.
        rise = min(self.warmup_steps, steps // 2)
        if step < rise:
            return self.warmup_learning_rate + (self.learning_rate - self.warmup_learning_rate) * step / rise
        return self.learning_rate * max(0.0, (steps - step) / (steps - rise))


def check_recipe(value: object) -> None:
    """Raise ValueError unless ``value`` is a `Recipe`."""
    if not isinstance(value, Recipe):
        raise ValueError(f"recipe: expected a pathnet Recipe, got {described(value)}")
