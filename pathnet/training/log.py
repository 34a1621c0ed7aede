"""Numbers of a training for a writer."""

from __future__ import annotations

from pathnet.training.position import Epoch
from pathnet.writers import Scalars, Writer

__all__ = ["LOG_STEPS", "TrainingLog"]

LOG_STEPS = 10
"""Steps from one logged loss to the next."""


class TrainingLog:
    """Loss, learning rate and accuracy of a training.

    Numbers wait until the checkpoint holds their steps. A training that is killed repeats the steps after its
    checkpoint, and would log them twice.

    Args:
        writer: the writer; None to log nothing.
    """

    def __init__(self, writer: Writer | None) -> None:
        self._scalars = None if writer is None else Scalars("log", writer)
        self._waiting: list[tuple[str, float, int]] = []

    def step(self, step: int, loss: float, rate: float) -> None:
        """Log a step if it is due.

        Args:
            step: number of steps taken.
            loss, rate: loss and learning rate of the last of them.
        """
        if step % LOG_STEPS == 0:
            self._waiting += [("training/loss", loss, step), ("training/learning rate", rate, step)]

    def epoch(self, step: int, epoch: Epoch) -> None:
        """Log an epoch that ended with the given number of steps."""
        self._waiting += [
            ("epoch/training loss", epoch.train_loss, step),
            ("epoch/test accuracy", epoch.test_accuracy, step),
        ]

    def release(self, kept: int) -> None:
        """Write the numbers of the first ``kept`` steps, which will not be repeated."""
        count = sum(step <= kept for *_, step in self._waiting)
        if count and self._scalars is not None:
            self._scalars.write(self._waiting[:count])
        del self._waiting[:count]
