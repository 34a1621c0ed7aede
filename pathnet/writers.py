"""Writers of numbers by name and step: TensorBoard's, or a few lines around another service."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Protocol

from pathnet.checks import described

__all__ = ["Scalars", "Writer", "check_writer", "is_writer"]


class Writer(Protocol):
    """Anything with a method ``add_scalar``, such as `torch.utils.tensorboard.SummaryWriter`.

    It is called with a name, a number, and the number of steps taken; steps of different names are interleaved. If
    there is a method ``flush``, it is called after each group of numbers.

    Example:
        >>> class Printing:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(f"{tag} at step {global_step}: {scalar_value:.2f}")
        >>> Printing().add_scalar("training/loss", 0.6931, 10)
        training/loss at step 10: 0.69
    """

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


def is_writer(value: object) -> bool:
    """Return whether a value is a `Writer`."""
    return callable(getattr(value, "add_scalar", None)) and not isinstance(value, type)


def check_writer(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a `Writer`.

    Args:
        name: name of the argument in the error.
        value: the value to check.
    """
    if not is_writer(value):
        raise ValueError(f"{name}: expected a writer with a method add_scalar, got {described(value)}")


class Scalars:
    """Numbers for a writer, whose failure costs those numbers and not the training."""

    def __init__(self, name: str, writer: Writer) -> None:
        self._name, self._writer, self._warned = name, writer, False

    def write(self, scalars: Iterable[tuple[str, float, int]]) -> None:
        """Write numbers, each with its name and step, and flush them; the first failure is a RuntimeWarning."""
        step = -1
        try:
            for tag, value, step in scalars:
                self._writer.add_scalar(tag, value, step)
            if callable(flush := getattr(self._writer, "flush", None)):
                flush()
        except Exception as error:
            if not self._warned:
                self._warned = True
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{self._name}: the writer failed at step {step} ({reason}); training goes on, and what the "
                    "writer does not take is lost",
                    RuntimeWarning,
                    stacklevel=3,
                )
