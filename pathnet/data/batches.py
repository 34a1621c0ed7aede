"""Batches of a caller's own loader: checked element by element, read once or several times, or kept in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from pathnet.checks import described

__all__ = ["Batches", "elements", "labelled", "sent"]

LABELS = "labels"
"""Key of the labels in a batch that is a mapping, as the loaders of Hugging Face yield them."""
MOST_BATCHES = 100_000
"""Maximum number of batches that are kept in memory."""


def elements(name: str, batches: object) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs and the target of each element, as they come.

    Args:
        name: the argument's name in errors.
        batches: an iterable of pairs (inputs, target), or of mappings with the target under ``labels``.

    Raises:
        ValueError: it is no such iterable, or empty; or an element is neither, or holds inputs without a sample or
            with NaN. The error tells its position.
    """
    number = -1
    for number, element in enumerate(_iterated(name, batches)):
        if isinstance(element, Mapping) and LABELS in element:
            inputs, target = {key: value for key, value in element.items() if key != LABELS}, element[LABELS]
        elif isinstance(element, tuple | list) and len(element) == 2:
            inputs, target = element
        else:
            raise ValueError(
                f"{name}: expected (inputs, {LABELS}) pairs, or mappings with {LABELS!r}, got {_what(element)} in "
                f"element {number}"
            )
        if problem := _problem_of_inputs(inputs):
            raise ValueError(f"{name}: expected {problem} in element {number}")
        yield inputs, target
    if number < 0:
        raise ValueError(f"{name}: expected at least one batch, got none")


def labelled(name: str, batches: object) -> Iterator[tuple[Any, Tensor]]:
    """Yield the inputs and the labels of each element, the labels int64 [B] or, for sequences, [B, T].

    Raises:
        ValueError: see `elements`; or an element's inputs are neither a tensor nor a collection of tensors, or its
            labels are not int64, or not as many as the samples.
    """
    for number, (inputs, labels) in enumerate(elements(name, batches)):
        if problem := _problem_of_labels(inputs, labels):
            raise ValueError(f"{name}: expected {problem} in element {number}")
        yield inputs, labels


def _iterated(name: str, batches: object) -> Iterator[Any]:
    try:
        if not isinstance(batches, str | bytes | Mapping | Tensor):
            return iter(batches)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        pass
    raise ValueError(
        f"{name}: expected a pathnet Data, or batches as (inputs, {LABELS}) pairs, got {described(batches)}"
    )


def _what(element: object) -> str:
    if isinstance(element, Mapping):
        return f"a mapping of {', '.join(map(str, element)) or 'nothing'}"
    return (
        f"a {type(element).__name__} of {len(element)}" if isinstance(element, tuple | list) else described(element)
    )


def _tensors(inputs: object) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _problem_of_inputs(inputs: object) -> str:
    """Return what is expected of a batch's inputs and what they are, or nothing if all is well."""
    for tensor in _tensors(inputs):
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
            return f"dense inputs that hold values, got {described(tensor)}"
        if tensor.ndim and not len(tensor):
            return f"at least one sample, got inputs {list(tensor.shape)}"
        if tensor.is_floating_point() and not _finite(tensor.float(), alone=isinstance(inputs, Tensor)):
            return "finite inputs, got NaN or infinity"
    return ""


def _finite(tensor: Tensor, alone: bool) -> bool:
    # Beside the images, infinity may be meant, as in an additive mask of attention.
    return bool(torch.isfinite(tensor).all() if alone else not torch.isnan(tensor).any())


def _problem_of_labels(inputs: object, labels: object) -> str:
    if not _tensors(inputs):
        return f"inputs that are a tensor, or a tuple or mapping of tensors, got {described(inputs)}"
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.layout != torch.strided:
        return f"int64 class labels, got {described(labels)}"
    if labels.is_nested or labels.is_meta or labels.ndim == 0 or labels.numel() == 0:
        return f"at least one label, in a tensor [B] or [B, T], got {described(labels)}"
    if isinstance(inputs, Tensor) and inputs.ndim and len(inputs) != len(labels):
        return f"labels for {len(inputs)} samples (the inputs'), got {list(labels.shape)}"
    return ""


def sent(inputs: Any, device: torch.device) -> Any:
    """Return inputs with all their tensors on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: sent(value, device) for key, value in inputs.items()}
    return type(inputs)(sent(value, device) for value in inputs) if type(inputs) in (tuple, list) else inputs


class Batches:
    """Batches in memory, which experiments and lesions read in the place of a `Data`.

    Every batch is used as it comes: inputs are normalised already, and neither drawn, split nor joined again. An
    element is a pair (inputs, labels), or a mapping with the labels under ``labels``. Inputs are a tensor with the
    batch first, or the tuple or mapping of tensors that an adapted network takes.

    Args:
        test: the batches on which errors are measured.
        train: the batches for gradients and for recalibrated batch normalisation; by default gradients are measured
            on ``test``, and nothing can be recalibrated.
        name: the data set's name in figures and run records.

    Raises:
        ValueError: an argument is no iterable of batches; what is wrong with an element is told by its position.

    Example:
        >>> import torch
        >>> import pathnet
        >>> loader = [(torch.randn(8, 1, 8, 8), torch.arange(8)) for _ in range(3)]  # or a DataLoader
        >>> batches = pathnet.data.Batches(test=loader, name="my images")
        >>> batches
        Batches('my images': 3 test batches)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> pathnet.lesion.errors(net, batches, [pathnet.lesion.Lesion()]).images
        24
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, test: Iterable[Any], train: Iterable[Any] | None = None, name: str = "batches") -> None:
        if not isinstance(name, str):
            raise ValueError(f"name: expected a string, got {described(name)}")
        self.name = name
        self.test = _kept("test", test)
        self.train = None if train is None else _kept("train", train)

    def __repr__(self) -> str:
        training = "" if self.train is None else f", {_counted(self.train, 'training')}"
        return f"Batches({self.name!r}: {_counted(self.test, 'test')}{training})"

    def fingerprint(self, like: str | None = None) -> str:
        """Return the data hash of a run: a version and a SHA-256 of all types, shapes and values.

        Args:
            like: the hash that an earlier run recorded; not used, as there is only one version.
        """
        digest = hashlib.sha256()
        for split in (self.test, self.train):
            for pair in split or ():
                _hash(digest, pair)
            digest.update(b"|")
        return f"batches-v1:{digest.hexdigest()}"

    def test_batches(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """Return the test batches as they are.

        Args:
            size: not used; `Data.test_batches` splits its images by it.

        Returns:
            An iterator of pairs: inputs, and labels, int64 [B] or [B, T].
        """
        return iter(self.test)

    def random_batch(self, size: int, seed: int, batch: int) -> tuple[Any, Tensor]:
        """Return training batch number ``batch`` as it is: inputs, and labels, int64 [B] or [B, T].

        Args:
            size: not used; `Data.random_batch` draws as many images.
            seed: not used; `Data.random_batch` draws images by it.
            batch: number of the batch, from 0.

        Raises:
            ValueError: there are fewer batches.
        """
        batches = self.training_batches
        if not 0 <= batch < len(batches):
            raise ValueError(f"batches: expected at most {len(batches)} (those of {self.name}), got {batch + 1}")
        return batches[batch]

    def batch_size(self, most: int) -> int:
        """Return the number of samples in the largest training batch.

        Args:
            most: not used; it bounds the batches of `Data.batch_size`.
        """
        return max(len(labels) for _, labels in self.training_batches)

    @property
    def training_batches(self) -> tuple[tuple[Any, Tensor], ...]:
        """Batches for gradients, pairs of inputs and targets [B, ...]."""
        return self.test if self.train is None else self.train


def _counted(batches: Sized, split: str) -> str:
    return f"{len(batches):,} {split} batch{'' if len(batches) == 1 else 'es'}"


def _kept(name: str, batches: object) -> tuple[tuple[Any, Tensor], ...]:
    kept: list[tuple[Any, Tensor]] = []
    for pair in labelled(name, batches):
        if len(kept) == MOST_BATCHES:
            raise ValueError(f"{name}: expected at most {MOST_BATCHES:,} batches, to keep them in memory, got more")
        kept.append(pair)
    return tuple(kept)


def _hash(digest: Any, value: object) -> None:
    """Add the types, shapes and values of tensors and collections to a digest."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            _hash(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)}(".encode())
        for part in value:
            _hash(digest, part)
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())
