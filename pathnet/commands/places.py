"""Checks of the files and folders of a command, before it starts anything that takes long."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

from pathnet.files import unfinished

__all__ = [
    "check_existing_folder",
    "check_existing_run",
    "check_file_to_read",
    "check_file_to_write",
    "check_folder_to_write",
    "check_utf_8",
    "what_is",
]

FILE, FOLDER, NOTHING = "a file", "a folder", "which does not exist"
LONGEST = 120
"""Largest number of characters of a name that an error message quotes."""
LONGEST_SUFFIX = ".checkpoint.safetensors"
"""Longest suffix that files next to a file add to its name."""


def check_existing_folder(name: str, folder: Path, expected: str) -> None:
    """Raise ValueError unless ``folder`` is one.

    Args:
        name: name of the argument in the error.
        expected: description of the expected folder in the error.
    """
    if (actual := what_is(folder)) != FOLDER:
        raise ValueError(f"{name}: expected {expected}, got {_named(folder)!r}, {actual}")


def check_existing_run(name: str, folder: Path) -> None:
    """Raise ValueError unless ``folder`` is one; whether it holds a run shows when that is read."""
    check_existing_folder(name, folder, "the folder of a run")


def check_folder_to_write(name: str, folder: Path) -> None:
    """Raise ValueError unless files can be written to the folder, which need not exist."""
    expected = "a folder to write to"
    if (actual := what_is(folder)) not in (FOLDER, NOTHING):
        raise ValueError(f"{name}: expected {expected}, got {_named(folder)!r}, {actual}")
    _check_writable(name, folder, expected)


def check_file_to_write(name: str, file: Path) -> None:
    """Raise ValueError unless the file, which need not exist, and the files next to it can be written."""
    expected = "a file to write"
    if (actual := what_is(file)) not in (FILE, NOTHING):
        raise ValueError(f"{name}: expected {expected}, got {_named(file)!r}, {actual}")
    beside = what_is(unfinished(file.with_name(file.name + LONGEST_SUFFIX)))
    if beside not in (FILE, NOTHING):
        raise ValueError(
            f"{name}: expected {expected}, got {_named(file)!r}, to whose name no suffix can be added: {beside}"
        )
    _check_writable(name, file.parent, expected, file)


def check_file_to_read(name: str, file: Path, expected: str) -> None:
    """Raise ValueError if there is something other than a file; reading a missing file reports it later."""
    if (actual := what_is(file)) not in (FILE, NOTHING):
        raise ValueError(f"{name}: expected {expected}, got {_named(file)!r}, {actual}")


def check_utf_8(name: str, path: Path) -> None:
    """Raise ValueError unless the name is UTF-8: safetensors neither writes nor reads other names."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected a name in UTF-8 for what holds weights, got {str(path)!r}") from None


def what_is(path: Path) -> str:
    """Return what is at a path, in words for an error message."""
    if str(path) == "-":
        return "which means standard input or output (write ./- for a file of that name)"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else NOTHING
    except NotADirectoryError:
        through = next(parent for parent in reversed(path.parents) if not parent.is_dir())
        return f"a path through {through}, {what_is(through)}"
    except OSError as error:
        return f"of which the system says: {error.strerror}"
    if stat.S_ISDIR(mode):
        return FOLDER
    return FILE if stat.S_ISREG(mode) else "a device, pipe or socket"


def _named(path: Path) -> str:
    name = str(path)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}..."


def _check_writable(name: str, folder: Path, expected: str, file: Path | None = None) -> None:
    nearest = next(place for place in (folder, *folder.absolute().parents) if what_is(place) != NOTHING)
    reason: str | None = what_is(nearest)
    if reason == FOLDER:
        reason = _refusal(nearest)
    if reason is not None:
        raise ValueError(
            f"{name}: expected {expected}, got {_named(file or folder)!r}: nothing can go into {nearest} ({reason})"
        )


def _refusal(folder: Path) -> str | None:
    """Return why no file can be written to a folder, or None; it tries, since root may do more than modes say."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror
