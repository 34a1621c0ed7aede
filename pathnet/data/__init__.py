"""Images and labels: digits, CIFAR-10 in two layouts, folders of classes, synthetic; and batches of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pathnet.data.built_in import digits, synthetic
from pathnet.data.cifar import cifar10
from pathnet.data.folders import class_folders
from pathnet.data.images import Data, Images, InMemory, OnDisk

__all__ = ["Data", "Images", "InMemory", "OnDisk", "cifar10", "class_folders", "digits", "load", "synthetic"]


def load(name: str) -> Data:
    """``digits``, ``synthetic``, or the path of a folder: CIFAR-10 in either layout, or folders of classes.

    Raises:
        ValueError: neither a known name nor a folder of images.
    """
    named: dict[str, Callable[[], Data]] = {"digits": digits, "synthetic": synthetic}
    if name in named:
        return named[name]()
    if not Path(name).is_dir():
        raise ValueError(f"data: expected digits, synthetic or an existing folder, got {name!r}")
    return class_folders(name) if (Path(name) / "train").is_dir() else cifar10(name)
