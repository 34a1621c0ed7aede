"""The accepted layouts of a data set's folder, and what another folder contains, in words."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pathnet.checks import described

__all__ = ["LAYOUTS", "contents", "enumerated", "existing_folder", "warn_of_skipped"]

LAYOUTS = (
    "train/<class>/ and test/<class>/ (or val/<class>/) with images in them, train-*.parquet and test-*.parquet, "
    "or data_batch_1 to data_batch_5 and test_batch"
)
MOST_NAMES = 4


def existing_folder(folder: object, expected: str = "the path of a folder") -> Path:
    """Return the path of a folder that exists.

    Raises:
        ValueError: it is no path, or no folder is there.
    """
    if not isinstance(folder, str | Path):
        raise ValueError(f"data: expected {expected}, got {described(folder)}")
    try:
        exists = Path(folder).is_dir()
    except OSError:
        # The name is too long for a file, or a folder of the path may not be entered.
        exists = False
    if not exists:
        raise ValueError(f"data: expected {expected}, got {described(str(folder))}, which is no folder")
    return Path(folder)


def contents(folder: Path) -> str:
    """Return the contents of a folder in words, such as "12 .png files, the folders cat and dog"."""
    entries = list(folder.iterdir())
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    suffixes = Counter(entry.suffix.lower() for entry in entries if not entry.is_dir())
    parts = [
        f"{count:,} {suffix or 'other'} file{'s' if count > 1 else ''}"
        for suffix, count in suffixes.most_common(MOST_NAMES)
    ]
    if folders:
        parts.append(f"the folder{'s' if len(folders) > 1 else ''} {enumerated(folders)}")
    return ", ".join(parts) or "an empty folder"


def enumerated(names: Sequence[str]) -> str:
    """Return the first names of a list, joined by commas, and the number of further ones."""
    if len(names) > MOST_NAMES:
        return f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES:,} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def warn_of_skipped(skipped: Mapping[str, str], images: int) -> tuple[str, ...]:
    """Warn about images that are left out, and return their names.

    Args:
        skipped: why each image is left out, by name.
        images: total number of images.
    """
    if skipped:
        name, problem = next(iter(skipped.items()))
        warnings.warn(
            f"data: left out {len(skipped):,} of {images:,} images, which cannot be read: "
            f"{enumerated(list(skipped))} ({name} {problem})",
            RuntimeWarning,
            stacklevel=4,
        )
    return tuple(skipped)
