"""Files on disk: replaced whole or not at all, and locked while a process works on them.

Everything that this library writes goes through `replacing`. So after a kill, a full disk or a write by a second
process, there is either the previous file or the new one, never a part of one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["locked", "remove_leftovers", "replacing", "telling", "unfinished"]

TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{12}\.pathnet-temporary")
"""Names of unfinished files, which no other program is likely to use."""


def unfinished(path: Path) -> Path:
    """Return a new name for the unfinished file that will become ``path``, in the same folder; see `TEMPORARY`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.pathnet-temporary")


@contextmanager
def telling(path: Path, what: str, consequence: str = "") -> Iterator[None]:
    """Turn an OSError into one whose single line says what could not be written, where, and why.

    Args:
        path: the file or folder.
        what: the thing that the file belongs to, such as ``run`` or ``weights``.
        consequence: what is lost and what is not, as the end of a sentence.

    Raises:
        OSError: with the same ``errno``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        failure = OSError(f"{what}: {path} cannot be written ({reason}){'; ' if consequence else ''}{consequence}")
        failure.errno = error.errno
        raise failure from None


@contextmanager
def replacing(path: Path, what: str, consequence: str = "") -> Iterator[IO[bytes]]:
    """Open a binary file that takes the name ``path`` only when it is complete and on the disk.

    The folder must exist. If anything fails, the previous file stays, and nothing else is left behind.

    Args:
        path: the file.
        what, consequence: see `telling`.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = unfinished(path)
    with telling(path, what, consequence):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # Without this, a crash of the machine may undo the rename.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path, target: str) -> None:
    """Remove the unfinished files that killed processes left.

    Args:
        folder: the folder of the files.
        target: regular expression of the names that the finished files would have had. No process may be writing
            any of them.
    """
    for file in folder.iterdir():
        name = TEMPORARY.fullmatch(file.name)
        if name is not None and re.fullmatch(target, name["target"]):
            file.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, what: str, busy: str, keep: bool = True) -> Iterator[None]:
    """Hold an exclusive lock, which the system releases if the process dies.

    Args:
        path: the lock file. It is never written to, and never followed if it is a link.
        what: see `telling`.
        busy: what another process that holds the lock is doing, for the error message.
        keep: whether the file stays. If not, its name must be one that only this library uses.

    Raises:
        ValueError: another process holds the lock, or ``path`` is not a regular file.
        OSError: the file cannot be created or locked.
    """
    while (descriptor := _lock(path, what, busy)) is None:
        pass
    try:
        yield
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, what: str, busy: str) -> int | None:
    """Return the descriptor of the locked file, or None if its holder removed it before it was locked here."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{what}: expected a lock file at {path}, got a link, a folder or a device; move it away")
    with telling(path, what):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"{what}: another process is {busy}") from None
        except OSError:
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None
