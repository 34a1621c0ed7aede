"""Passes over the test batches of a data set, or over a caller's own batches; and answers counted against labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import check_integer, described
from pathnet.data.batches import Batches, labelled
from pathnet.data.images import Data

__all__ = ["Answers", "Passes", "check_all", "check_classes", "count_answers", "of_element", "spread"]

IGNORED = -100
"""Label of the positions of a sequence that do not count, PyTorch's ``ignore_index``."""
UNCOUNTED = -1
"""Mark of an answer that does not count, beside 0 for a right one and 1 for a wrong one."""


class Passes:
    """Passes over the same test batches, each an iteration over (inputs, labels).

    Batches that are no `Data` are used as they come. An iterator serves one pass; any other iterable may be read
    again and must then yield the same labels.

    Args:
        data: a data set, `Batches`, or an iterable of batches.
        size: maximum number of images in a batch of a data set.
        images: number of images of a data set's test split, spread evenly over it; 0 for all.
        passes: number of passes, with the reason for more than one.

    Attributes:
        samples: the number of labels that count; None while it is not known, during the first pass over an iterable.

    Raises:
        ValueError: ``data`` or ``images`` is out of its range, or an iterator cannot be read that often.
    """

    def __init__(
        self, data: Data | Batches | Iterable[Any], size: int, images: int = 0, passes: tuple[int, str] = (1, "")
    ) -> None:
        self._data, self._size = data, size
        self.samples: int | None = None
        self._labels: list[Tensor] = []
        if isinstance(data, Data):
            self._indices = spread(data, images)
            self.samples = len(self._indices)
            return
        check_all(images)
        if isinstance(data, Batches):
            self.samples = sum(map(_counted, (labels for _, labels in data.test)))
        elif isinstance(data, Iterator) and passes[0] > 1:
            times, reason = passes
            raise ValueError(
                f"data: expected batches that can be read {times} times ({reason}), such as a list of them, got "
                f"{described(data)}"
            )
        self._again = passes[0] > 1

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        data = self._data
        if isinstance(data, Data):
            for part in self._indices.split(self._size):  # type: ignore[no-untyped-call]
                yield data.normalise(data.test.take(part)), data.test.labels[part]
        elif isinstance(data, Batches):
            yield from data.test
        else:
            yield from self._loaded(data)

    def element(self, number: int) -> Any:
        """Return a context in which an error names the element, where the batches are not those of a data set."""
        return of_element(number, named=not isinstance(self._data, Data))

    def _loaded(self, data: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        count = samples = 0
        if self.samples is None:
            self._labels = []
        for inputs, labels in labelled("data", data):
            if self._again and self.samples is None:
                self._labels.append(labels)
            elif self._again and not (count < len(self._labels) and torch.equal(labels, self._labels[count])):
                raise ValueError(
                    f"data: expected the same batches in every pass, got other labels in element {count}; load them "
                    "without shuffling, or keep them in a list"
                )
            count, samples = count + 1, samples + _counted(labels)
            yield inputs, labels
        if self.samples is not None and samples != self.samples:
            raise ValueError(f"data: expected the same batches in every pass, got {count} of {len(self._labels)}")
        self.samples = samples


def check_all(images: int) -> None:
    """Raise ValueError unless ``images`` is 0, as it must be for batches that are used as they come."""
    if check_integer("images", images):
        raise ValueError(f"images: expected 0 for batches that are no data set, got {described(images)}")


def spread(data: Data, images: int) -> Tensor:
    """Return indices of test images spread evenly over the split, int64 [images].

    Args:
        images: number of images; 0 for all.

    Raises:
        ValueError: ``images`` exceeds the test split.
    """
    images = check_integer("images", images)
    if not 0 <= images <= len(data.test):
        raise ValueError(f"images: expected 0 (all) to {len(data.test)} (the test images), got {described(images)}")
    count = images or len(data.test)
    return torch.arange(count) * len(data.test) // count


@contextmanager
def of_element(number: int, named: bool = True) -> Iterator[None]:
    """Name the element of ``data`` in the errors that its batch raises in a network.

    Args:
        named: whether batches have such names; if not, errors pass as they are.

    Raises:
        ValueError: the network refuses the batch.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError, KeyError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        about = ("images:", "inputs:", "target:", "x:", "data:")
        # An error of another argument, as pathnet words it, is not about the batch.
        other = re.match(r"[a-z_]+: ", text) and not text.startswith(about)
        if not named or (isinstance(error, ValueError) and other):
            raise
        if text.startswith("data:"):
            raise ValueError(f"{text} in element {number}") from None
        raise ValueError(f"data: expected batches that the network takes, got element {number} ({text})") from error


def count_answers(output: Tensor, labels: Tensor) -> Tensor:
    """Return what `Answers.of` reads about a batch of L labels, int64 [4 + L], without waiting for a GPU.

    Args:
        output: [B, classes], or [B, T, classes] of sequences.
        labels: int64 [B]; or [B, T], where -100 does not count.

    Raises:
        ValueError: there is not one label for each row of the output.
    """
    if not isinstance(output, Tensor) or output.shape[:-1] != labels.shape:
        rows = f"{list(output.shape[:-1])} rows" if isinstance(output, Tensor) else described(output)
        raise ValueError(f"data: expected labels for the output's {rows}, got {list(labels.shape)}")
    counting = _counting(labels)
    wrong, classes = (output.argmax(-1) != labels).long(), labels.where(counting, 0)
    finite, last = torch.isfinite(output).all(), labels.new_tensor(output.shape[-1] - 1)
    facts = torch.stack([finite, classes.min(), classes.max(), last])
    return torch.cat([facts, wrong.where(counting, UNCOUNTED).flatten()])


class Answers(NamedTuple):
    """Answers of one batch: which are wrong, bool [labels that count], and whether all outputs are finite."""

    misclassified: NDArray[np.bool_]
    finite: bool

    @property
    def wrong(self) -> int:
        """Number of wrong answers."""
        return int(self.misclassified.sum())

    @property
    def total(self) -> int:
        """Number of labels that count."""
        return len(self.misclassified)

    @classmethod
    def of(cls, facts: Tensor) -> Answers:
        """Return the answers whose facts `count_answers` returned.

        Raises:
            ValueError: a label is not among the classes.
        """
        numbers = facts.cpu().numpy()
        (finite, least, most, last), marks = numbers[:4].tolist(), numbers[4:]
        _check_range(least, most, last + 1)
        return cls(marks[marks != UNCOUNTED] == 1, bool(finite))


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless all labels, int64 [B] or [B, T], that count are among the classes."""
    counted = labels.where(_counting(labels), 0)
    _check_range(int(counted.min()), int(counted.max()), classes)


def _check_range(least: int, most: int, classes: int) -> None:
    if least < 0 or most >= classes:
        raise ValueError(f"data: expected labels 0 to {classes - 1} (the network's classes), got {least} to {most}")


def _counting(labels: Tensor) -> Tensor:
    # Labels of images always count: an image without one is no test image.
    return labels != IGNORED if labels.ndim > 1 else torch.ones_like(labels, dtype=torch.bool)


def _counted(labels: Tensor) -> int:
    return int(_counting(labels).sum())
