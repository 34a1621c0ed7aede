"""Files on disk: replaced whole or not at all, and locked while a process works on them.

Everything that this library writes goes through `replacing`. So after a kill, a full disk or a write by a second
process, there is either the previous file or the new one, never a part of one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["creating", "locked", "remove_leftovers", "replacing", "shared_by_others", "telling", "unfinished"]

TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{12}\.pathnet-temporary")
"""Names of unfinished files, which no other program is likely to use."""
PAUSE = 0.05
"""Seconds between two tries to get a lock."""


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
    with telling(path, what, consequence), _written(temporary) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def creating(paths: Iterator[Path], what: str, consequence: str = "") -> Iterator[IO[bytes]]:
    """Open a binary file that takes the first of several names that is free, when it is complete and on the disk.

    No file is ever replaced, not even one that another process creates at the same moment. The folder must exist, and
    is the same for all names. If anything fails, nothing is left behind.

    Args:
        paths: names to try, without an end.
        what, consequence: see `telling`.

    Raises:
        OSError: the file cannot be written.
    """
    path = next(paths)
    temporary = unfinished(path)
    with telling(path, what, consequence), _written(temporary) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        while not _named(temporary, path):
            path = next(paths)


@contextmanager
def _written(temporary: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets another name within the context; afterwards that name is on the disk too."""
    try:
        with temporary.open("xb") as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)
    # Without this, a crash of the machine may undo the rename.
    folder = os.open(temporary.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _named(temporary: Path, path: Path) -> bool:
    """Give a file a name if that is free, and return whether it was."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # Some file systems have no hard links. Names of parts hold the number of their process, so nobody else
        # creates this one.
        if path.exists():
            return False
        temporary.replace(path)
    return True


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
def locked(
    path: Path, what: str, busy: str, keep: bool = True, shared: bool = False, patience: float = 0.0
) -> Iterator[int]:
    """Hold a lock, which the system releases if the process dies, and yield the descriptor of its file.

    Args:
        path: the lock file. It is never written to, and never followed if it is a link.
        what: see `telling`.
        busy: what another process that holds the lock is doing, for the error message.
        keep: whether the file stays. If not, its name must be one that only this library uses.
        shared: whether others may hold the lock too, who share it likewise.
        patience: seconds to wait for another process that holds the lock.

    Raises:
        ValueError: another process holds the lock, or ``path`` is not a regular file.
        OSError: the file cannot be created or locked.
    """
    until = time.monotonic() + patience
    while True:
        try:
            descriptor = _lock(path, what, busy, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except ValueError:
            if time.monotonic() >= until:
                raise
            time.sleep(PAUSE)
            continue
        if descriptor is not None:
            break
    try:
        yield descriptor
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def shared_by_others(descriptor: int) -> None:
    """Let other processes share a lock that this one holds, and that nobody holds alone then."""
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _lock(path: Path, what: str, busy: str, kind: int) -> int | None:
    """Return the descriptor of the locked file, or None if its holder removed it before it was locked here."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{what}: expected a lock file at {path}, got a link, a folder or a device; move it away")
    with telling(path, what):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
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
