"""Images sorted into a folder a class, the layout of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pathnet.data.images import Data, InMemory, OnDisk, decode, existing_folder

__all__ = ["class_folders"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}
IN_MEMORY_BYTES = 1 << 30


def class_folders(folder: str | Path, side: int | None = None) -> Data:
    """Images sorted into ``train/<class>/`` and ``test/<class>/`` (or ``val``), the layout of ImageNet.

    A set larger than 1 GiB when decoded stays on disk and is decoded, by threads, when a batch is taken.

    Args:
        side: images are scaled so that their shorter side is this, and cropped at the centre; the first
            image's shorter side by default.

    Raises:
        ValueError: a folder or class is missing, or an image cannot be read.
    """
    folder = existing_folder(folder)
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        raise ValueError(f"data: {folder} needs the folders train/<class>/ and test/<class>/ (or val/<class>/)")
    classes = tuple(sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir()))
    if not classes:
        raise ValueError(f"data: {folder / 'train'} holds no class folders")
    splits = [_list_classes(folder / name, classes) for name in ("train", held_out)]
    if side is None:
        first = splits[0][0][0]
        side = min(decode(first.read_bytes(), str(first)).shape[:2])
    on_disk = [OnDisk(files, labels, side) for files, labels in splits]
    if sum(map(len, on_disk)) * 3 * side * side > IN_MEMORY_BYTES:
        return Data(folder.name, on_disk[0], on_disk[1], classes)
    train, test = (InMemory(split.take(torch.arange(len(split))), split.labels) for split in on_disk)
    return Data(folder.name, train, test, classes)


def _list_classes(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"data: {folder} has no folder for class {name!r}")
        found = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"data: {folder / name} holds no images")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels)
