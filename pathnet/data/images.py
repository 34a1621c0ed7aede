"""Images and labels, in memory or on disk; a data set of two splits; batches of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet.checks import check_flag, check_integer, check_tensor, described
from pathnet.data.decoding import MOST_SIDE, BrokenImage, decode, read_image, regular
from pathnet.streams import stream

__all__ = ["Data", "Images", "InMemory", "OnDisk", "check_data_set", "in_threads"]

STATISTICS_SAMPLE = 10_000
IN_FLIGHT = 1024
VERSION = "v2:"
"""What a fingerprint begins with; those of before had no such beginning, and did not cover shapes and contents."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Images(Protocol):
    """A split of a data set: labels at hand, images by index."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]"""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """Return images, uint8 [len(indices), C, H, W]."""
        ...

    def identity(self) -> bytes:
        """Return a digest of the types, shapes and values of images and labels."""
        ...

    def legacy_identity(self) -> bytes:
        """Return the bytes that fingerprints without a version were taken over."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A split whose images, uint8 [N, C, H, W], live in memory."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if check_tensor("images", self.images).dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images: expected uint8 [N, C, H, W], got {described(self.images)}")
        _check_labels("labels", self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Tensor:
        """Return images, uint8 [len(indices), C, H, W], by their numbers, int64 [K]."""
        return self.images[_check_indices(indices, len(self))]

    def identity(self) -> bytes:
        """Return a digest of the types, shapes and values of images and labels."""
        header = f"{self.images.dtype} {list(self.images.shape)} {self.labels.dtype}".encode()
        return b" ".join([b"in memory", header, _digest(self.images), _digest(self.labels)])

    def legacy_identity(self) -> bytes:
        """Return the bytes that fingerprints without a version were taken over: images and labels, no shapes."""
        return _bytes(self.images) + _bytes(self.labels)


@dataclass(frozen=True)
class OnDisk:
    """A split whose image files are decoded when they are taken, resized and cropped to ``side``."""

    files: Sequence[Path]
    labels: Tensor
    side: int
    _pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_list = isinstance(self.files, Sequence) and not isinstance(self.files, str | bytes)
        if not is_list or not all(isinstance(file, Path) for file in self.files):
            raise ValueError(f"files: expected a sequence of paths, got {described(self.files)}")
        _check_labels("labels", self.labels, len(self.files))
        check_integer("side", self.side, 1, MOST_SIDE)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> Tensor:
        """Return images, uint8 [len(indices), 3, side, side], by their numbers, int64 [K]."""
        decoded = self._pool.map(self._decoded, _check_indices(indices, len(self)).tolist())
        images = np.array(list(decoded), np.uint8).reshape(-1, self.side, self.side, 3)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def identity(self) -> bytes:
        """Return a digest of the side, the labels and the content of every file.

        All files are read, once in a process, by threads: at the speed of the disk or of SHA-256, which is seconds
        for a gigabyte and minutes for the 150 GB of ImageNet.
        """
        return b" ".join([b"on disk", str(self.side).encode(), self._content, _digest(self.labels)])

    @cached_property
    def _content(self) -> bytes:
        digest = hashlib.sha256()
        for content in in_threads(_file_digest, self.files):
            digest.update(content)
        return digest.digest()

    def legacy_identity(self) -> bytes:
        """Return the bytes that fingerprints without a version were taken over: names and sizes of the files."""
        sizes = "".join(f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for file in self.files)
        return sizes.encode(errors="surrogateescape") + str(self.side).encode()

    def _decoded(self, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        file = self.files[index]
        return decode(read_image(file), str(file), self.side)


@dataclass(frozen=True)
class Data:
    """A data set with its normalisation and its standard augmentation.

    Attributes:
        name: its name in figures and run records.
        train, test: the two splits.
        classes: the names of the labels 0, 1, ...
        crop_padding: zero pixels on each side before the random crop of the augmentation.
        flip: whether the augmentation mirrors half of the images.
        skipped: the images that were left out because they cannot be read.
        mean, std: float32 [C], of the pixels (0..255) of up to 10,000 training images.

    Raises:
        ValueError: a split is none, has no images or labels outside the classes, or the splits differ in the images'
            shape.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    crop_padding: int = 4
    flip: bool = True
    skipped: tuple[str, ...] = ()
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected a string, got {described(self.name)}")
        is_tuple = isinstance(self.classes, tuple) and len(self.classes) > 0
        if not is_tuple or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes: expected a tuple of at least one name, got {described(self.classes)}")
        check_integer("crop_padding", self.crop_padding, 0)
        check_flag("flip", self.flip)
        for name, split in (("train", self.train), ("test", self.test)):
            _check_split(name, split, len(self.classes))
        shapes = [list(split.take(torch.zeros(1, dtype=torch.int64)).shape[1:]) for split in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"test: expected images of the shape {shapes[0]} (the training ones'), got {shapes[1]}")
        # Spread over the split, which a folder of classes holds in the order of its classes.
        spread = torch.arange(0, len(self.train), max(1, len(self.train) // STATISTICS_SAMPLE))
        few = self.train.take(spread[:STATISTICS_SAMPLE]).double()
        object.__setattr__(self, "mean", few.mean((0, 2, 3)).float())
        # A single pixel has no deviation from others.
        correction = min(1, few[:, 0].numel() - 1)
        std = few.std((0, 2, 3), correction=correction)
        object.__setattr__(self, "std", std.clamp_min(1e-6).float())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train.take(torch.zeros(1, dtype=torch.int64)).shape[1:]
        return channels, height, width

    def fingerprint(self, like: str | None = None) -> str:
        """Return the data hash of a run: a version, and a SHA-256.

        It covers the types, shapes and values of images and labels (the content of every file of a set that stays
        on disk, which takes a pass over them, see `OnDisk.identity`), the names of the classes and the
        augmentation.

        Args:
            like: the hash that an earlier run or checkpoint recorded. Where it has no version, the hash is of that
                kind: over the values without shapes and names, or the names and sizes of files.
        """
        if isinstance(like, str) and not like.startswith(VERSION):
            return self._legacy_fingerprint(like)
        header = {"classes": self.classes, "crop_padding": int(self.crop_padding), "flip": bool(self.flip)}
        digest = hashlib.sha256()
        for part in (json.dumps(header, sort_keys=True).encode(), self.train.identity(), self.test.identity()):
            digest.update(hashlib.sha256(part).digest())
        return VERSION + digest.hexdigest()

    def _legacy_fingerprint(self, recorded: str) -> str:
        digest = hashlib.sha256(self.train.legacy_identity())
        digest.update(self.test.legacy_identity())
        if digest.hexdigest() == recorded and any(isinstance(split, OnDisk) for split in (self.train, self.test)):
            warnings.warn(
                f"data: {self.name} was recorded by the names and sizes of its files; whether their content has "
                "changed since then is not known",
                RuntimeWarning,
                stacklevel=3,
            )
        return digest.hexdigest()

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 [B, C, H, W] as float32 of mean 0 and standard deviation 1 a channel."""
        if check_tensor("images", images).dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 [B, C, H, W], got {described(images)}")
        check_tensor("images", images, shape=(None, len(self.mean), None, None))
        mean, std = (part[:, None, None].to(images.device) for part in (self.mean, self.std))
        return (images.float() - mean) / std

    def augment(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Return normalised images, float [B, C, H, W], padded by zeros, cropped at random to their size, and flipped
        at random."""
        check_tensor("images", images, "floating-point", (None,) * 4)
        if not isinstance(rng, np.random.Generator):
            raise ValueError(f"rng: expected a numpy.random.Generator, got {described(rng)}")
        batch, _, height, width = images.shape
        padding = self.crop_padding
        rows, columns = (torch.from_numpy(rng.integers(0, 2 * padding + 1, batch)) for _ in range(2))
        column = torch.arange(width).expand(batch, width)
        if self.flip:
            column = torch.where(torch.from_numpy(rng.random(batch) < 0.5)[:, None], column.flip(1), column)
        padded = F.pad(images, (padding,) * 4)
        row = rows[:, None] + torch.arange(height)
        column = columns[:, None] + column
        sample = torch.arange(batch)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)

    def random_batch(self, size: int, seed: int, batch: int) -> tuple[Tensor, Tensor]:
        """Return batch number ``batch`` of the plan of ``seed``: distinct training images, drawn uniformly.

        Returns:
            images, float32 [size, C, H, W], normalised, not augmented; labels, int64 [size].

        Raises:
            ValueError: the training split has fewer than ``size`` images, or an argument is no such integer.
        """
        size = check_integer("batch_size", size, 1)
        if size > len(self.train):
            raise ValueError(f"batch_size: expected 1 to {len(self.train)} (the training images), got {size}")
        seed, batch = check_integer("seed", seed, 0), check_integer("batch", batch, 0)
        chosen = stream(seed, "batch", batch).choice(len(self.train), size, replace=False, shuffle=False)
        indices = torch.from_numpy(chosen)
        return self.normalise(self.train.take(indices)), self.train.labels[indices]

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the test split in order, normalised, in batches of at most ``size``."""
        parts = torch.arange(len(self.test)).split(check_integer("size", size, 1))  # type: ignore[no-untyped-call]
        return ((self.normalise(self.test.take(indices)), self.test.labels[indices]) for indices in parts)


def check_data_set(name: str, value: object) -> Data:
    """Return ``value``, a `Data`; raise ValueError where it is none."""
    if not isinstance(value, Data):
        raise ValueError(f"{name}: expected a pathnet Data (two splits of images), got {described(value)}")
    return value


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield what a function returns for each item, in order, computed by threads a stretch of the items ahead."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), IN_FLIGHT):
            yield from pool.map(function, items[start : start + IN_FLIGHT])


def _check_labels(name: str, labels: object, images: int) -> None:
    tensor = check_tensor(name, labels)
    if tensor.dtype != torch.int64 or tensor.shape != (images,):
        raise ValueError(f"{name}: expected int64 [{images}], got {described(tensor)}")


def _check_indices(indices: object, images: int) -> Tensor:
    numbers = check_tensor("indices", indices, "integer", (None,))
    if numbers.dtype == torch.bool:
        raise ValueError(f"indices: expected the numbers of images, got {described(numbers)}")
    numbers = numbers.long()
    if outside := numbers[(numbers < 0) | (numbers >= images)].tolist():
        raise ValueError(f"indices: expected numbers from 0 to {images - 1}, got {outside[0]}")
    return numbers


def _check_split(name: str, split: object, classes: int) -> None:
    if not isinstance(split, Images):
        raise ValueError(f"{name}: expected a split, such as InMemory or OnDisk, got {described(split)}")
    if not len(split):
        raise ValueError(f"{name}: expected at least one image, got none")
    _check_labels(f"{name}.labels", split.labels, len(split))
    outside = torch.nonzero((split.labels < 0) | (split.labels >= classes))
    if len(outside):
        row = int(outside[0])
        origin = f" ({split.files[row]})" if isinstance(split, OnDisk) else ""
        raise ValueError(
            f"{name}: expected labels from 0 to {classes - 1} (the classes), got {int(split.labels[row])} in row "
            f"{row}{origin}"
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().data).digest()


def _file_digest(file: Path) -> bytes:
    if problem := regular(file):
        raise BrokenImage(str(file), problem)
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
