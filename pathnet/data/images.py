"""A data set: two splits of images, their normalisation and augmentation, and batches of them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet.checks import check_flag, check_integer, check_tensor, described
from pathnet.data.splits import Images, OnDisk, check_split
from pathnet.streams import stream

__all__ = ["Data", "check_data_set"]

STATISTICS_SAMPLE = 10_000
VERSION = "v2:"
"""Prefix of a fingerprint. Older fingerprints have none, and do not cover shapes and file contents."""


@dataclass(frozen=True)
class Data:
    """A data set with its normalisation and its standard augmentation.

    Attributes:
        name: the data set's name in figures and run records.
        train: the training split, see `Images`.
        test: the test split.
        classes: the names of the labels 0, 1, ...
        crop_padding: number of zero pixels on each side before the random crop of the augmentation.
        flip: whether the augmentation mirrors half of the images.
        skipped: names of the images that are left out because they cannot be read.
        mean: mean of the pixels (0..255) of up to 10,000 training images, float32 [C].
        std: their standard deviation, float32 [C].
        image_shape: shape (C, H, W) of every image.

    Raises:
        ValueError: a split is not an `Images`, has no images or has labels outside the classes, or the images of the
            splits differ in shape.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> images, labels = data.random_batch(16, seed=0, batch=0)
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([16, 1, 8, 8]), torch.float32, torch.Size([16]))
        >>> [len(labels) for images, labels in data.test_batches(10)]
        [10, 6]
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
    image_shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected a string, got {described(self.name)}")
        is_tuple = isinstance(self.classes, tuple) and len(self.classes) > 0
        if not is_tuple or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes: expected a tuple of at least one name, got {described(self.classes)}")
        check_integer("crop_padding", self.crop_padding, 0)
        check_flag("flip", self.flip)
        for name, split in (("train", self.train), ("test", self.test)):
            check_split(name, split, len(self.classes))
        shapes = [list(split.take(torch.zeros(1, dtype=torch.int64)).shape[1:]) for split in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"test: expected images of the shape {shapes[0]} (the training ones'), got {shapes[1]}")
        object.__setattr__(self, "image_shape", tuple(shapes[0]))
        # Spread over the split, since a folder of classes is sorted by class.
        spread = torch.arange(0, len(self.train), max(1, len(self.train) // STATISTICS_SAMPLE))
        sample = self.train.take(spread[:STATISTICS_SAMPLE]).double()
        object.__setattr__(self, "mean", sample.mean((0, 2, 3)).float())
        # The sample standard deviation of a single pixel is undefined.
        correction = min(1, sample[:, 0].numel() - 1)
        std = sample.std((0, 2, 3), correction=correction)
        object.__setattr__(self, "std", std.clamp_min(1e-6).float())

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        origins = dict.fromkeys(getattr(split, "origin", type(split).__name__) for split in (self.train, self.test))
        return (
            f"Data({self.name!r}: {len(self.train):,} training and {len(self.test):,} test images of {shape}, "
            f"{len(self.classes):,} classes, {' and '.join(origins)})"
        )

    def fingerprint(self, like: str | None = None) -> str:
        """Return the data hash of a run: a version and a SHA-256.

        It covers the types, shapes and values of images and labels, the class names and the augmentation. For images
        on disk it covers the content of every file, which takes a pass over them, see `OnDisk.identity`.

        Args:
            like: the hash that an earlier run or checkpoint recorded. If it has no version, the result is a hash of
                that older kind: over values without shapes and names, or over names and sizes of files.

        Raises:
            ValueError: a file of images on disk cannot be read.
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
        """Return images as float32 with mean 0 and standard deviation 1 per channel.

        Args:
            images: uint8 [B, C, H, W]

        Returns:
            float32 [B, C, H, W]

        Raises:
            ValueError: the images have another type, or another number of channels than the data set.
        """
        if check_tensor("images", images).dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 [B, C, H, W], got {described(images)}")
        check_tensor("images", images, shape=(None, len(self.mean), None, None))
        mean, std = (part[:, None, None].to(images.device) for part in (self.mean, self.std))
        return (images.float() - mean) / std

    def augment(self, images: Tensor, rng: np.random.Generator, mirrored: Tensor | None = None) -> Tensor:
        """Return normalised images, float [B, C, H, W], padded with zeros, then randomly cropped and mirrored.

        This is the augmentation of He et al. 2016 for CIFAR. Crops have the size of the images.

        Args:
            images: float [B, C, H, W].
            rng: source of the crops and mirrorings.
            mirrored: the images to mirror, bool [B]; None for a random half. If the data set allows no flips
                (``flip``), none is mirrored.

        Raises:
            ValueError: images or ``mirrored`` have another type or shape, or ``rng`` is no generator of NumPy's.
        """
        check_tensor("images", images, "floating-point", (None,) * 4)
        if not isinstance(rng, np.random.Generator):
            raise ValueError(f"rng: expected a numpy.random.Generator, got {described(rng)}")
        batch, _, height, width = images.shape
        padding = self.crop_padding
        rows, columns = (torch.from_numpy(rng.integers(0, 2 * padding + 1, batch)) for _ in range(2))
        column = torch.arange(width).expand(batch, width)
        if mirrored is not None and check_tensor("mirrored", mirrored, shape=(batch,)).dtype != torch.bool:
            raise ValueError(f"mirrored: expected bool [B], got {described(mirrored)}")
        if self.flip:
            if mirrored is None:
                mirrored = torch.from_numpy(rng.random(batch) < 0.5)
            column = torch.where(mirrored[:, None].cpu(), column.flip(1), column)
        padded = F.pad(images, (padding,) * 4)
        row = rows[:, None] + torch.arange(height)
        column = columns[:, None] + column
        sample = torch.arange(batch)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)

    def random_batch(self, size: int, seed: int, batch: int) -> tuple[Tensor, Tensor]:
        """Return batch number ``batch`` of a seed: distinct training images, drawn uniformly.

        Args:
            size: number of images.
            seed: seed of the batches, at least 0.
            batch: number of the batch, from 0. It is a function of seed and number alone.

        Returns:
            Images, float32 [size, C, H, W], normalised but not augmented; labels, int64 [size].

        Raises:
            ValueError: the training split has fewer than ``size`` images, or an argument is negative or no integer.
        """
        size = check_integer("batch_size", size, 1)
        if size > len(self.train):
            raise ValueError(f"batch_size: expected 1 to {len(self.train)} (the training images), got {size}")
        seed, batch = check_integer("seed", seed, 0), check_integer("batch", batch, 0)
        indices = torch.from_numpy(
            stream(seed, "batch", batch).choice(len(self.train), size, replace=False, shuffle=False)
        )
        return self.normalise(self.train.take(indices)), self.train.labels[indices]

    def batch_size(self, most: int) -> int:
        """Return the size of the largest random batches of at most ``most`` images.

        Args:
            most: maximum number of images; the training split bounds it too.
        """
        return min(most, len(self.train))

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the test split in order, normalised, in batches of at most ``size`` images.

        Args:
            size: number of images in every batch but the last.

        Returns:
            An iterator of pairs: images, float32 [B, C, H, W], and labels, int64 [B].

        Raises:
            ValueError: ``size`` is less than 1 or no integer.
        """
        batches = torch.arange(len(self.test)).split(check_integer("size", size, 1))  # type: ignore[no-untyped-call]
        return ((self.normalise(self.test.take(indices)), self.test.labels[indices]) for indices in batches)


def check_data_set(name: str, value: object) -> Data:
    """Return ``value`` if it is a `Data`, else raise ValueError."""
    if not isinstance(value, Data):
        raise ValueError(f"{name}: expected a pathnet Data (two splits of images), got {described(value)}")
    return value
