"""Splits of a data set: labels in memory, and images in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pathnet.checks import check_integer, check_tensor, described
from pathnet.data.decoding import MOST_SIDE, BrokenImage, decode, read_image, regular

__all__ = ["Images", "InMemory", "OnDisk", "check_split", "in_threads"]

IN_FLIGHT = 1024
"""Number of items that threads process ahead of their consumer."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Images(Protocol):
    """A split of a data set, with labels in memory and images by index.

    `InMemory` and `OnDisk` are such splits; any object with these members is one, so a `Data` can read images from
    another source.

    Example:
        >>> import torch
        >>> from pathnet import data
        >>> split = data.InMemory(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> isinstance(split, data.Images), split.take(torch.tensor([4, 0])).shape
        (True, torch.Size([2, 3, 8, 8]))
    """

    @property
    def labels(self) -> Tensor:
        """Labels, int64 [N]."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """Return images by their indices.

        Args:
            indices: int64 [K]

        Returns:
            uint8 [K, C, H, W]
        """
        ...

    def identity(self) -> bytes:
        """Return a digest of the types, shapes and values of images and labels."""
        ...

    def legacy_identity(self) -> bytes:
        """Return the bytes that fingerprints without a version cover."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A split whose images are in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        origin: the place of the images, in words.

    Raises:
        ValueError: a tensor has another type or shape.

    Example:
        >>> import torch
        >>> from pathnet import data
        >>> images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
        >>> train = data.InMemory(images, torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> train
        InMemory(6 images of 3x8x8)
        >>> data.Data("noise", train, train, ("cat", "dog"))
        Data('noise': 6 training and 6 test images of 3x8x8, 2 classes, in memory)
    """

    images: Tensor
    labels: Tensor
    origin: ClassVar[str] = "in memory"

    def __post_init__(self) -> None:
        if check_tensor("images", self.images).dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images: expected uint8 [N, C, H, W], got {described(self.images)}")
        _check_labels("labels", self.labels, len(self.images))

    def __repr__(self) -> str:
        return f"InMemory({len(self):,} images of {'x'.join(map(str, self.images.shape[1:]))})"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Tensor:
        """Return images by their indices.

        Args:
            indices: int64 [K]

        Returns:
            uint8 [K, C, H, W]

        Raises:
            ValueError: an index is no integer, or not that of an image.
        """
        return self.images[_check_indices(indices, len(self))]

    def identity(self) -> bytes:
        """Return a digest of the types, shapes and values of images and labels."""
        header = f"{self.images.dtype} {list(self.images.shape)} {self.labels.dtype}".encode()
        return b" ".join([b"in memory", header, _digest(self.images), _digest(self.labels)])

    def legacy_identity(self) -> bytes:
        """Return the bytes that fingerprints without a version cover: images and labels, without shapes."""
        return _bytes(self.images) + _bytes(self.labels)


@dataclass(frozen=True)
class OnDisk:
    """A split whose image files are decoded on demand, then scaled and cropped to ``side``.

    Attributes:
        files: paths of the N files.
        labels: int64 [N].
        side: side of every image in pixels.

    Raises:
        ValueError: an attribute has another type or shape.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> import torch
        >>> from pathnet import data
        >>> files = [Path("0.png"), Path("1.png")]
        >>> for file in files:
        ...     Image.new("RGB", (20, 16), "grey").save(file)
        >>> split = data.OnDisk(files, torch.tensor([0, 1]), side=8)
        >>> split.take(torch.tensor([1])).shape
        torch.Size([1, 3, 8, 8])
    """

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

    def __repr__(self) -> str:
        return f"OnDisk({len(self):,} images of 3x{self.side}x{self.side}, {self.origin})"

    @property
    def origin(self) -> str:
        """Folder of the split, in words: two levels above an image, which is in the folder of its class."""
        return f"in {self.files[0].parent.parent}" if self.files else "no files"

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> Tensor:
        """Return images by their indices.

        Args:
            indices: int64 [K]

        Returns:
            uint8 [K, 3, side, side]

        Raises:
            ValueError: an index is no integer, or not that of an image; or a file cannot be read.
        """
        decoded = self._pool.map(self._decoded, _check_indices(indices, len(self)).tolist())
        images = np.array(list(decoded), np.uint8).reshape(-1, self.side, self.side, 3)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def identity(self) -> bytes:
        """Return a digest of the side, the labels and the content of every file.

        Threads read all files, once per process, at the speed of the disk or of SHA-256: seconds for a gigabyte,
        minutes for the 150 GB of ImageNet.
        """
        return b" ".join([b"on disk", str(self.side).encode(), self._content, _digest(self.labels)])

    @cached_property
    def _content(self) -> bytes:
        digest = hashlib.sha256()
        for content in in_threads(_file_digest, self.files):
            digest.update(content)
        return digest.digest()

    def legacy_identity(self) -> bytes:
        """Return the bytes that fingerprints without a version cover: names and sizes of the files."""
        sizes = "".join(f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for file in self.files)
        return sizes.encode(errors="surrogateescape") + str(self.side).encode()

    def _decoded(self, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        file = self.files[index]
        return decode(read_image(file), str(file), self.side)


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the result of a function for each item, in order; threads work up to `IN_FLIGHT` items ahead."""
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
        raise ValueError(f"indices: expected integers, the positions of images, got {described(numbers)}")
    numbers = numbers.long()
    if outside := numbers[(numbers < 0) | (numbers >= images)].tolist():
        raise ValueError(f"indices: expected numbers from 0 to {images - 1}, got {outside[0]}")
    return numbers


def check_split(name: str, split: object, classes: int) -> None:
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
