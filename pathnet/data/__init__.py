"""Images and labels: digits, CIFAR-10 in two layouts, folders of classes, synthetic; and batches of them."""

from __future__ import annotations

from pathlib import Path

from pathnet.checks import check_flag, described
from pathnet.data.built_in import digits, synthetic
from pathnet.data.cifar import cifar10
from pathnet.data.folders import class_folders
from pathnet.data.images import Data, Images, InMemory, OnDisk

__all__ = ["Data", "Images", "InMemory", "OnDisk", "cifar10", "class_folders", "digits", "load", "synthetic"]


def load(name: str | Path, skip_broken: bool = False) -> Data:
    """Return ``digits``, ``synthetic``, or what a folder holds: CIFAR-10 in either layout, or folders of classes.

    Args:
        skip_broken: leave out images of a folder that cannot be read, see `class_folders` and `cifar10`.

    Raises:
        ValueError: neither a known name nor a folder of images.
    """
    check_flag("skip_broken", skip_broken)
    if not isinstance(name, str | Path):
        raise ValueError(f"data: expected digits, synthetic or the path of a folder, got {described(name)}")
    if name in ("digits", "synthetic"):
        return digits() if name == "digits" else synthetic()
    if not Path(name).is_dir():
        raise ValueError(f"data: expected digits, synthetic or an existing folder, got {str(name)!r}")
    if (Path(name) / "train").is_dir():
        return class_folders(name, skip_broken=skip_broken)
    return cifar10(name, skip_broken)
