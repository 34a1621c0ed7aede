"""The position of a training: steps taken, epochs tested; and how a checkpoint stores it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pathnet.checks import check_integer, check_number, described

__all__ = ["Epoch", "Position", "read_position"]


@dataclass(frozen=True)
class Epoch:
    """Results of one pass over the training split.

    Attributes:
        epoch: number of the epoch, from 0.
        train_loss: mean loss over its steps, with the label smoothing of the recipe.
        test_accuracy: accuracy on the test split after it, in [0, 1].
        seconds: time of its steps, in seconds.

    Example:
        >>> from pathnet import training
        >>> history = [training.Epoch(0, 0.412, 0.906, 3.1), training.Epoch(1, 0.135, 0.953, 3.0)]
        >>> [epoch.test_accuracy for epoch in history]
        [0.906, 0.953]
    """

    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float


@dataclass
class Position:
    """The point that a training has reached.

    Attributes:
        step: number of steps taken.
        history: the epochs that ended with a test.
        loss_sum: sum of the losses of the steps since then.
        seconds: time of the steps since then.
    """

    step: int = 0
    history: list[Epoch] = field(default_factory=list)
    loss_sum: float = 0.0
    seconds: float = 0.0


def read_position(facts: Any, epochs: int, steps_an_epoch: int) -> Position:
    """Return the position that a checkpoint stores.

    Args:
        facts: the stored object.
        epochs: number of epochs of the training.
        steps_an_epoch: number of steps in each of them.

    Raises:
        ValueError: the step is not one of this training, or the history does not hold the epochs up to it.
    """
    if not isinstance(facts, dict):
        raise ValueError(f"expected an object, got {described(facts)}")
    step = check_integer("step", facts.get("step"), 0, epochs * steps_an_epoch)
    history = facts.get("history")
    if not isinstance(history, list):
        raise ValueError(f"history: expected a list of epochs, got {described(history)}")
    tested = [_read_epoch(number, epoch) for number, epoch in enumerate(history)]
    ended, further = divmod(step, steps_an_epoch)
    # An interrupt may come between the last step of an epoch and its test.
    least = ended - 1 if ended and further == 0 else ended
    check_integer("history, how many epochs", len(tested), least, ended)
    loss_sum = check_number("loss_sum", facts.get("loss_sum"), 0)
    return Position(step, tested, loss_sum, check_number("seconds", facts.get("seconds"), 0))


def _read_epoch(number: int, facts: Any) -> Epoch:
    names = {attribute.name for attribute in fields(Epoch)}
    if not isinstance(facts, dict) or facts.keys() != names:
        raise ValueError(f"history: expected epochs of {', '.join(sorted(names))}, got {described(facts)}")
    return Epoch(
        check_integer("history, epoch", facts["epoch"], number, number),
        check_number("history, train_loss", facts["train_loss"], 0),
        check_number("history, test_accuracy", facts["test_accuracy"], 0, 1),
        check_number("history, seconds", facts["seconds"], 0),
    )
