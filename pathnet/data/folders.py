"""Images in one folder per class, the layout of ImageNet."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pathnet.checks import check_flag, check_integer
from pathnet.data.decoding import MOST_SIDE, BrokenImage, decode, read_image, regular
from pathnet.data.images import Data
from pathnet.data.layouts import contents, enumerated, existing_folder, warn_of_skipped
from pathnet.data.splits import InMemory, OnDisk, in_threads

__all__ = ["class_folders"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}
IN_MEMORY_BYTES = 1 << 30


def class_folders(folder: str | Path, side: int | None = None, skip_broken: bool = False) -> Data:
    """Return images from ``train/<class>/`` and ``test/<class>/`` (or ``val/<class>/``), the layout of ImageNet.

    A data set larger than 1 GiB when decoded stays on disk, and threads decode each batch on demand. If both ``test``
    and ``val`` exist, ``test`` is used.

    Images may be PNG, JPEG, BMP, WebP or PPM, and become RGB, uint8 [3, side, side]: scaled, then cropped at the
    centre. Their pixels are as stored: an orientation in the EXIF data is not applied, and transparency is dropped.

    Args:
        folder: the folder with the splits.
        side: length to scale the shorter side of images to, before cropping at the centre; by default the shorter
            side of the first image.
        skip_broken: leave out images that cannot be read, warn about them, and list their names in ``skipped``. Every
            image is decoded once to find them.

    Raises:
        ValueError: a folder or a class is missing in a split, or an image cannot be read.
        ModuleNotFoundError: pillow is not installed.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> import pathnet
        >>> for split in ("train", "test"):
        ...     for kind, colour in (("cat", "grey"), ("dog", "brown")):
        ...         folder = Path("pets", split, kind)
        ...         folder.mkdir(parents=True)
        ...         Image.new("RGB", (20, 16), colour).save(folder / "0.png")
        >>> pathnet.data.class_folders("pets", side=12)
        Data('pets': 2 training and 2 test images of 3x12x12, 2 classes, in memory)
    """
    folder = existing_folder(folder)
    side = side if side is None else check_integer("side", side, 1, MOST_SIDE)
    check_flag("skip_broken", skip_broken)
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        raise ValueError(
            f"data: {folder} needs the folders train/<class>/ and test/<class>/ (or val/<class>/), "
            f"got {contents(folder)}"
        )
    classes = _folders_in(folder / "train")
    if not classes:
        raise ValueError(f"data: {folder / 'train'} contains no class folders, got {contents(folder / 'train')}")
    if unknown := [name for name in _folders_in(folder / held_out) if name not in classes]:
        raise ValueError(
            f"data: {folder / held_out} contains folders that are not classes of {folder / 'train'}: "
            f"{enumerated(unknown)}"
        )
    splits = [_list_classes(folder / name, classes, skip_broken) for name in ("train", held_out)]
    _warn_of_ignored(folder, [entry for split in splits for entry in split.ignored])
    if side is None:
        side = _shorter_side(splits[0].files, skip_broken)
    listed = sum(len(split.files) + len(split.broken) for split in splits)
    if skip_broken:
        for name, split in zip(("train", held_out), splits, strict=True):
            split.drop_broken(side)
            if absent := [kind for label, kind in enumerate(classes) if label not in split.labels]:
                raise ValueError(f"data: {folder / name / absent[0]} contains no readable images")
    broken = {str(file.relative_to(folder)): problem for split in splits for file, problem in split.broken.items()}
    skipped = warn_of_skipped(broken, listed)
    on_disk = [OnDisk(split.files, torch.tensor(split.labels), side) for split in splits]
    if sum(map(len, on_disk)) * 3 * side * side > IN_MEMORY_BYTES:
        return Data(folder.name, on_disk[0], on_disk[1], classes, skipped=skipped)
    train, test = (InMemory(split.take(torch.arange(len(split))), split.labels) for split in on_disk)
    return Data(folder.name, train, test, classes, skipped=skipped)


@dataclass
class _Split:
    """The images of one split.

    Attributes:
        files, labels: the images to use.
        broken: why each other image is left out.
        ignored: entries of the folders that are not images.
    """

    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)

    def drop_broken(self, side: int) -> None:
        """Decode every image, and leave out those that cannot be decoded."""
        problems = list(in_threads(functools.partial(_problem, side=side), self.files))
        self.broken |= {file: problem for file, problem in zip(self.files, problems, strict=True) if problem}
        self.labels = [label for label, problem in zip(self.labels, problems, strict=True) if not problem]
        self.files = [file for file, problem in zip(self.files, problems, strict=True) if not problem]


def _folders_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def _list_classes(folder: Path, classes: Sequence[str], skip_broken: bool) -> _Split:
    split = _Split(ignored=[entry for entry in folder.iterdir() if not entry.is_dir()])
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"data: {folder} has no folder for class {name!r}")
        entries = sorted((folder / name).iterdir())
        images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
        split.ignored += [entry for entry in entries if entry.suffix.lower() not in IMAGE_SUFFIXES]
        if not images:
            expected = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(
                f"data: {folder / name} contains no images: expected files that end in one of {expected}, "
                f"got {contents(folder / name)}"
            )
        for file in images:
            if not (problem := regular(file)):
                split.files.append(file)
                split.labels.append(label)
            elif skip_broken:
                split.broken[file] = problem
            else:
                raise BrokenImage(str(file), problem)
    return split


def _warn_of_ignored(folder: Path, entries: Sequence[Path]) -> None:
    names = [str(entry.relative_to(folder)) for entry in entries if not entry.name.startswith(".")]
    if names:
        warnings.warn(
            f"data: ignored {len(names):,} entries of {folder} that are not images of a class: {enumerated(names)}",
            RuntimeWarning,
            stacklevel=3,
        )


def _shorter_side(files: Sequence[Path], skip_broken: bool) -> int:
    """Return the shorter side of the first image, or of the first readable one with ``skip_broken``."""
    for file in files:
        try:
            height, width, _ = decode(read_image(file), str(file)).shape
            return int(min(height, width))
        except BrokenImage:
            if not skip_broken:
                raise
    raise ValueError(f"data: expected readable images in the training split, got none among {len(files):,}")


def _problem(file: Path, side: int) -> str:
    """Return why an image cannot be read, or "" if it can."""
    try:
        decode(read_image(file), str(file), side)
    except BrokenImage as broken:
        return broken.problem
    return ""
