"""Data sets that need no files: scikit-learn's digits, and noise."""

from __future__ import annotations

import math

import numpy as np
import torch

from pathnet.checks import check_integer, described
from pathnet.data.images import Data, InMemory
from pathnet.streams import stream

__all__ = ["digits", "synthetic"]

MOST_VALUES = 1 << 30
"""Most numbers in a synthetic split: 8 GiB of noise."""


def digits() -> Data:
    """Return scikit-learn's 1,797 hand-written digits, 8x8 and one channel; the last 360 are the test split.

    The last fifth was written by other people than the first four, so this is the harder split. A flipped digit
    is no digit, so that the augmentation only shifts, by up to one pixel.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = slice(None, 1437), slice(1437, None)
    return Data(
        "digits",
        InMemory(images[train], labels[train]),
        InMemory(images[test], labels[test]),
        tuple("0123456789"),
        crop_padding=1,
        flip=False,
    )


def synthetic(images: int = 512, classes: int = 10, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Data:
    """Return noise around one random image a class: learnable at once, for tests and timings.

    Args:
        images: in the training split; the test split has a quarter as many.
        shape: (C, H, W)

    Raises:
        ValueError: an argument is not of positive integers, ``seed`` is negative, or the training images or the
            classes' come to more than 2^30 numbers.
    """
    seed = check_integer("seed", seed, 0)
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise ValueError(f"shape: expected (C, H, W), got {described(shape)}")
    shape = (
        check_integer("shape", shape[0], 1),
        check_integer("shape", shape[1], 1),
        check_integer("shape", shape[2], 1),
    )
    if (values := math.prod(shape)) > MOST_VALUES:
        raise ValueError(f"shape: expected at most {MOST_VALUES:,} numbers an image, got {described(values)}")
    images = check_integer("images", images, 1, MOST_VALUES // values)
    classes = check_integer("classes", classes, 1, MOST_VALUES // values)
    rng = stream(seed, "synthetic")
    prototypes = rng.integers(64, 192, (classes, *shape))

    def split(count: int) -> InMemory:
        labels = np.arange(count) % classes
        noisy = prototypes[labels] + rng.normal(0, 32, (count, *shape))
        return InMemory(torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))

    return Data("synthetic", split(images), split(max(1, images // 4)), tuple(map(str, range(classes))))
