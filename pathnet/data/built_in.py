"""Data sets that need no files: scikit-learn's digits, and synthetic images."""

from __future__ import annotations

import math

import numpy as np
import torch

from pathnet.checks import check_integer, described
from pathnet.data.images import Data
from pathnet.data.splits import InMemory
from pathnet.extras import require
from pathnet.streams import stream

__all__ = ["digits", "synthetic"]

MOST_BYTES = 1 << 32
"""Maximum number of bytes of a synthetic data set's training images, and of its class means in int64."""
MOST_CLASSES = 1 << 16
CHUNK = 1 << 24
"""Number of float64 noise values drawn at once, which bounds the memory."""


def digits() -> Data:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 with one channel; the last 360 are the test split.

    The last fifth is by other writers than the rest, so this is the harder split. The augmentation shifts images
    by up to one pixel, and does not mirror them, since a mirrored digit is not a digit.

    Returns:
        1,437 training and 360 test images, uint8 [1, 8, 8] with values from 0 to 16, in 10 classes.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.digits()
        >>> data
        Data('digits': 1,437 training and 360 test images of 1x8x8, 10 classes, in memory)
        >>> images, labels = data.random_batch(32, seed=0, batch=0)
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """
    require("sklearn", "pathnet.data.digits takes the digits from scikit-learn")
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
    """Return one random image per class with noise added: a data set that is easy to learn, for tests and timings.

    Args:
        images: number of training images, at most 4 GiB of them; the test split has a quarter as many.
        classes: number of classes, at most 65,536; their mean images have at most 2^29 values together.
        shape: (C, H, W) of an image, at most 2^29 values.
        seed: seed of the random images, at least 0.

    Returns:
        Images, uint8 (C, H, W), in memory; the labels run through the classes in turn.

    Raises:
        ValueError: an argument is not a positive integer, ``seed`` is negative, or a bound is exceeded.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> data
        Data('synthetic': 64 training and 16 test images of 1x8x8, 2 classes, in memory)
        >>> data.train.labels[:6]
        tensor([0, 1, 0, 1, 0, 1])
    """
    seed = check_integer("seed", seed, 0)
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        got = f"{len(shape)} values" if isinstance(shape, tuple | list) else described(shape)
        raise ValueError(f"shape: expected (C, H, W), got {got}")
    shape = (
        check_integer("shape", shape[0], 1),
        check_integer("shape", shape[1], 1),
        check_integer("shape", shape[2], 1),
    )
    pixels, most = math.prod(shape), MOST_BYTES // 8
    if pixels > most:
        raise ValueError(f"shape: expected at most {most:,} values in all channels, got {described(pixels)}")
    images = check_integer("images", images, 1, MOST_BYTES // pixels)
    classes = check_integer("classes", classes, 1, min(MOST_CLASSES, most // pixels))
    rng = stream(seed, "synthetic")
    prototypes = rng.integers(64, 192, (classes, *shape))

    def split(count: int) -> InMemory:
        labels, noisy = np.arange(count) % classes, np.empty((count, *shape), np.uint8)
        step = max(1, CHUNK // pixels)
        for start in range(0, count, step):
            part = labels[start : start + step]
            noise = rng.normal(0, 32, (len(part), *shape))
            noisy[start : start + step] = (prototypes[part] + noise).clip(0, 255).astype(np.uint8)
        return InMemory(torch.from_numpy(noisy), torch.from_numpy(labels))

    return Data("synthetic", split(images), split(max(1, images // 4)), tuple(map(str, range(classes))))
