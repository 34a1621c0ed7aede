"""Data sets by name or by folder."""

from __future__ import annotations

from pathlib import Path

from pathnet.checks import check_flag
from pathnet.data.built_in import digits, synthetic
from pathnet.data.cifar import cifar10
from pathnet.data.folders import class_folders
from pathnet.data.images import Data
from pathnet.data.layouts import existing_folder

__all__ = ["load"]


def load(name: str | Path, skip_broken: bool = False) -> Data:
    """Return the data set of that name, or the one in a folder.

    Args:
        name: ``digits``, ``synthetic``, or a folder with CIFAR-10 in either layout or with a folder per class.
        skip_broken: leave out images of a folder that cannot be read, see `class_folders` and `cifar10`.

    Raises:
        ValueError: neither a known name nor a folder of images; or an image cannot be read.
        ModuleNotFoundError: a package that reads the data set is not installed.

    Example:
        >>> import pathnet
        >>> pathnet.data.load("synthetic")
        Data('synthetic': 512 training and 128 test images of 3x32x32, 10 classes, in memory)
        >>> pathnet.data.load("digit")
        Traceback (most recent call last):
        ValueError: data: expected digits, synthetic or an existing folder, got 'digit', which is not a folder
    """
    check_flag("skip_broken", skip_broken)
    if isinstance(name, str) and name in ("digits", "synthetic"):
        return digits() if name == "digits" else synthetic()
    folder = existing_folder(name, "digits, synthetic or an existing folder")
    if (folder / "train").is_dir():
        return class_folders(folder, skip_broken=skip_broken)
    return cifar10(folder, skip_broken)
