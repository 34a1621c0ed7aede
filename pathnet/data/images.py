"""Images and labels, in memory or on disk; a data set of two splits; batches of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pathnet.checks import described
from pathnet.streams import stream

__all__ = ["Data", "Images", "InMemory", "OnDisk", "check_data_set", "decode", "existing_folder"]

STATISTICS_SAMPLE = 10_000


class Images(Protocol):
    """A split of a data set: labels at hand, images by index."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]"""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """uint8 [len(indices), C, H, W]"""
        ...

    def identity(self) -> bytes:
        """What the data hash is taken over."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A split whose images, uint8 [N, C, H, W], live in memory."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images: expected uint8 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels: expected int64 [{len(self.images)}], got {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def identity(self) -> bytes:
        return self.images.contiguous().numpy().tobytes() + self.labels.numpy().tobytes()


@dataclass(frozen=True)
class OnDisk:
    """A split whose image files are decoded when they are taken, resized and cropped to ``side``."""

    files: Sequence[Path]
    labels: Tensor
    side: int
    _pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> Tensor:
        decoded = self._pool.map(lambda i: decode(self.files[i].read_bytes(), str(self.files[i]), self.side), indices)
        return torch.from_numpy(np.stack(list(decoded))).permute(0, 3, 1, 2).contiguous()

    def identity(self) -> bytes:
        sizes = "".join(f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for file in self.files)
        return sizes.encode() + str(self.side).encode()


@dataclass(frozen=True)
class Data:
    """A data set with its normalisation and its standard augmentation.

    Attributes:
        name: for figures and run records.
        train, test: the two splits.
        classes: the names of the labels 0, 1, ...
        crop_padding: zero pixels on each side before the random crop of the augmentation.
        flip: whether the augmentation mirrors half of the images.
        mean, std: float32 [C], of the pixels (0..255) of up to 10,000 training images.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    crop_padding: int = 4
    flip: bool = True
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Spread over the split, which a folder of classes holds in the order of its classes.
        spread = torch.arange(0, len(self.train), max(1, len(self.train) // STATISTICS_SAMPLE))
        few = self.train.take(spread[:STATISTICS_SAMPLE]).double()
        object.__setattr__(self, "mean", few.mean((0, 2, 3)).float())
        object.__setattr__(self, "std", few.std((0, 2, 3)).clamp_min(1e-6).float())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train.take(torch.zeros(1, dtype=torch.int64)).shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """SHA-256 over both splits: the data hash of a run."""
        digest = hashlib.sha256(self.train.identity())
        digest.update(self.test.identity())
        return digest.hexdigest()

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 of mean 0 and standard deviation 1 a channel."""
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]

    def augment(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Zero padding, a random crop back to the same side, and a random flip; of normalised images."""
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
        """Batch number ``batch`` of the plan of ``seed``: distinct training images, drawn uniformly.

        Returns:
            images, float32 [size, C, H, W], normalised, not augmented; labels, int64 [size].

        Raises:
            ValueError: the training split has fewer than ``size`` images.
        """
        if not 1 <= size <= len(self.train):
            raise ValueError(f"batch_size: expected 1 to {len(self.train)} (the training images), got {size}")
        chosen = stream(seed, "batch", batch).choice(len(self.train), size, replace=False, shuffle=False)
        indices = torch.from_numpy(chosen)
        return self.normalise(self.train.take(indices)), self.train.labels[indices]

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test split in order, normalised, in batches of at most ``size``."""
        for indices in torch.arange(len(self.test)).split(size):  # type: ignore[no-untyped-call]
            yield self.normalise(self.test.take(indices)), self.test.labels[indices]


def check_data_set(name: str, value: object) -> Data:
    """Return ``value``, a `Data`; raise ValueError where it is none."""
    if not isinstance(value, Data):
        raise ValueError(f"{name}: expected a pathnet Data (two splits of images), got {described(value)}")
    return value


def existing_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is not a folder")
    return folder


def decode(encoded: bytes, origin: str, side: int | None = None) -> np.ndarray[Any, Any]:
    """uint8 [H, W, 3]; scaled and cropped to [side, side, 3] where a side is given."""
    try:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"data: {origin} is not a readable image ({error})") from None
    if side is not None and image.size != (side, side):
        scale = side / min(image.size)
        image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image)
