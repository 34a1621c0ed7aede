"""Images and labels: digits, CIFAR-10 in two layouts, folders of classes, synthetic; and batches of them."""

from __future__ import annotations

from pathlib import Path

from pathnet.checks import check_flag
from pathnet.data.built_in import digits, synthetic
from pathnet.data.cifar import cifar10
from pathnet.data.folders import class_folders
from pathnet.data.images import Data, Images, InMemory, OnDisk
from pathnet.data.layouts import existing_folder

__all__ = ["Data", "Images", "InMemory", "OnDisk", "cifar10", "class_folders", "digits", "load", "synthetic"]


def load(name: str | Path, skip_broken: bool = False) -> Data:
    """Return ``digits``, ``synthetic``, or what a folder holds: CIFAR-10 in either layout, or folders of classes.

    Args:
        skip_broken: leave out images of a folder that cannot be read, see `class_folders` and `cifar10`.

    Raises:
        ValueError: neither a known name nor a folder of images.
    """
    check_flag("skip_broken", skip_broken)
    if isinstance(name, str) and name in ("digits", "synthetic"):
        return digits() if name == "digits" else synthetic()
    folder = existing_folder(name, "digits, synthetic or an existing folder")
    if (folder / "train").is_dir():
        return class_folders(folder, skip_broken=skip_broken)
    return cifar10(folder, skip_broken)
