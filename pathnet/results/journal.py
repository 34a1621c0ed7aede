"""A journal: the rows that are not in a part yet, on the disk as soon as they are measured.

A row that is written to a file outlives its process, even one that is killed, so each batch is appended when it is
measured. That takes a fraction of a millisecond; a part takes many, and outlives a crash of the machine as well.
Rows go from the journal into a part, and then the journal is removed: in between they are in both, which reading
merges.

The file is a sequence of records: the length of the content in eight bytes, eight bytes of their SHA-256, the SHA-256
of the content, and the content, a table in Arrow's streaming format. A last record that is cut short, as a kill in
the midst of it leaves it, is left out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import warnings
from pathlib import Path

import pyarrow as pa

from pathnet.files import telling

__all__ = ["Journal", "journals", "read_journal"]

NAME = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]{12}\.pathnet-journal")
LENGTH, CHECK, HEADER = 8, 16, 48
"""Ends of the parts of a record before its content: its length, the check of the length, the content's SHA-256."""


class Journal:
    """The journal of one kind of row in one process.

    Attributes:
        rows: number of rows in it.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._file: Path | None = None
        self._descriptor = -1
        self._size = 0
        self._tables: list[pa.Table] = []
        self.rows = 0

    def append(self, table: pa.Table) -> None:
        """Append rows.

        Raises:
            OSError: they cannot be written, or the folder was removed; the journal is as before.
        """
        record = _record(table)
        kept = (
            f"its {len(table)} measurements are lost, all earlier ones are kept, and the same command resumes from "
            "them"
        )
        with telling(self._folder, "run", "what it held is gone, and the same command measures it again"):
            if self._is_removed():
                raise OSError(errno.ENOENT, "it was removed while measurements were written to it")
        with telling(self._folder, "run", kept):
            if self._file is None:
                self._open()
            try:
                _write_all(self._descriptor, record)
            except BaseException:
                os.ftruncate(self._descriptor, self._size)
                raise
        with telling(self._folder, "run", "all measurements are kept there, and a command resumes from them there"):
            if self._file is not None and not self._file.exists():
                raise OSError(errno.ENOENT, "it was moved while measurements were written to it")
        self._size += len(record)
        self._tables.append(table)
        self.rows += len(table)

    def content(self) -> pa.Table:
        """Return all rows of the journal, of which there must be some."""
        return pa.concat_tables(self._tables)

    def remove(self) -> None:
        """Remove the file, once its rows are in a part; the next row starts another."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self.close()
        self._tables, self.rows = [], 0

    def close(self) -> None:
        """Close the file and leave it where it is."""
        if self._file is not None:
            os.close(self._descriptor)
        self._file = None

    def _is_removed(self) -> bool:
        """Return whether bytes would go into a file that nobody can ever open, or into no file."""
        if self._file is None:
            return not self._folder.exists()
        return os.fstat(self._descriptor).st_nlink == 0

    def _open(self) -> None:
        file = self._folder / f".{self._stem}.{secrets.token_hex(6)}.pathnet-journal"
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._file, self._size = file, 0


def journals(folder: Path) -> dict[Path, str]:
    """Return the journals in a folder, with the beginning of the names of their parts."""
    names = {file: NAME.fullmatch(file.name) for file in sorted(folder.glob(".*.pathnet-journal"))}
    return {file: name["stem"] for file, name in names.items() if name}


def read_journal(file: Path) -> list[pa.Table]:
    """Return the rows of each whole record of a journal, and warn of damaged ones.

    A last record that is cut short is left out without a word: its measurement was never finished.

    Raises:
        FileNotFoundError: the journal is gone.
    """
    content, tables, start, damaged = file.read_bytes(), list[pa.Table](), 0, False
    while len(content) - start >= HEADER:
        header = content[start : start + HEADER]
        length, check, digest = header[:LENGTH], header[LENGTH:CHECK], header[CHECK:]
        if check != _check_of(length):
            # Nobody knows where the next record begins.
            damaged = True
            break
        end = start + HEADER + int.from_bytes(length, "little")
        if end > len(content):
            break
        record = content[start + HEADER : end]
        if hashlib.sha256(record).digest() == digest:
            tables.append(pa.ipc.open_stream(record).read_all())
        else:
            damaged = True
        start = end
    if damaged:
        warnings.warn(
            f"run: {file} is damaged; {len(tables)} of its records are read, the others are left out, and the same "
            "command measures them again",
            RuntimeWarning,
            stacklevel=2,
        )
    return tables


def _record(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    length = len(content).to_bytes(LENGTH, "little")
    return length + _check_of(length) + hashlib.sha256(content).digest() + content


def _check_of(length: bytes) -> bytes:
    return hashlib.sha256(length).digest()[: CHECK - LENGTH]


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
