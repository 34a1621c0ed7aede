"""Parts of a run's measurements: Parquet files that are written whole and carry a digest of each column.

Format 2 has a SHA-256 for each column, so columns that are read alone are verified too, and the meaning of each
column as its metadata. Parts of format 1 have one digest of all columns, or none.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pathnet.files import creating, replacing
from pathnet.results.facts import DIGEST
from pathnet.results.problems import missing_value

__all__ = [
    "READERS",
    "REMEDY",
    "Kind",
    "is_part_of",
    "read_part",
    "read_parts",
    "replace_part",
    "row_count",
    "stored_schema",
    "write_part",
]

FORMAT = "pathnet.format"
ROWS_IN_GROUP = 1 << 17
"""Number of rows in a row group of a file, which readers take or skip as a whole."""
REMEDY = "move it away to measure its batches again"
READERS = 2
"""Threads that read parts; more take turns at Python's lock."""
SMALL = 1 << 20
"""Size of a file in bytes up to which it is read at once, rather than the columns that are wanted."""


@dataclass(frozen=True)
class Kind:
    """The content of the parts of one kind of row.

    Attributes:
        stem: beginning of the names of its files.
        schema: its columns.
        keys: names of the columns that identify a row.
        problem: describes what is wrong with the values of a table, or returns an empty string.
        older: columns of format 1, if they differ.
        upgrade: turns a table with the columns of format 1 into one of today's; raises ValueError if it cannot.
        optional: names of the text columns that files of earlier versions may lack, and that are empty then.
    """

    stem: str
    schema: pa.Schema
    keys: Sequence[str]
    problem: Callable[[pa.Table], str]
    older: pa.Schema | None = None
    upgrade: Callable[[pa.Table], pa.Table] | None = None
    optional: frozenset[str] = frozenset()

    def fits(self, stored: pa.Schema) -> bool:
        """Return whether a file has today's columns, apart from optional ones."""
        lacking = self.optional - set(stored.names)
        return bool(stored.equals(pa.schema([field for field in self.schema if field.name not in lacking])))

    def completed(self, table: pa.Table) -> pa.Table:
        """Return a table with empty texts in the optional columns that it lacks."""
        for name in sorted(self.optional - set(table.column_names)):
            table = table.append_column(self.schema.field(name), pa.array([""] * len(table)))
        return table


def read_parts(files: Sequence[Path], kind: Kind, names: Sequence[str]) -> pa.Table:
    """Read parts, verify columns, digests and values, and return them as one table, in the order of the files.

    Args:
        files: the parts.
        kind: what they hold.
        names: names of the columns to read.

    Raises:
        ValueError: a file cannot be read, has other columns, is damaged, or holds impossible values.
        FileNotFoundError: a file is gone.
    """
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(lambda file: read_part(file, kind, names), files))
    whole = pa.concat_tables([pa.schema([kind.schema.field(name) for name in names]).empty_table(), *tables])
    # All values are checked at once, which is quick; only if something is wrong is the file looked for.
    if kind.problem(whole):
        for file, table in zip(files, tables, strict=True):
            if problem := kind.problem(table):
                raise ValueError(f"run: {file}: {problem}; {REMEDY}")
    return whole


def read_part(file: Path, kind: Kind, names: Sequence[str]) -> pa.Table:
    """Read columns of a part, and verify them by their digests; values are not checked.

    Raises:
        ValueError: the file cannot be read, has other columns, or is damaged.
        FileNotFoundError: the file is gone.
    """
    try:
        # ParquetFile, since read_table would take columns from folder names such as seed=1; opened here, since it
        # takes no name that is not UTF-8.
        with file.open("rb") as handle:
            source = _opened(handle)
            stored = source.schema_arrow
            old = kind.older is not None and stored.equals(kind.older)
            if not old and not kind.fits(stored):
                raise _OtherColumns(f"expected {kind.schema.names}, got {stored.names}")
            digests = stored.metadata or {}
            # One digest of all columns can be compared with all of them alone.
            whole = old or DIGEST.encode() in digests
            wanted = [name for name in names if name in stored.names]
            table = source.read(None if whole else wanted, use_threads=False)
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except _OtherColumns as error:
        raise ValueError(f"run: {file} has other columns: {error}") from None
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None
    # Nulls come first, since digests are not defined for them.
    if problem := missing_value(table):
        raise ValueError(f"run: {file}: {problem}; {REMEDY}")
    damaged = _damaged(table, digests)
    if damaged:
        raise ValueError(f"run: {file} is damaged (its {damaged} does not match its content); {REMEDY}")
    if old and kind.upgrade is not None:
        try:
            table = kind.upgrade(table)
        except ValueError as error:
            raise ValueError(f"run: {file}: {error}; {REMEDY}") from None
    return kind.completed(table).select(list(names))


def _opened(handle: IO[bytes]) -> pq.ParquetFile:
    """Return a part for reading."""
    small = os.fstat(handle.fileno()).st_size <= SMALL
    # Readers of a file take Python's lock for every piece; those of bytes never do.
    source = pa.BufferReader(handle.read()) if small else handle
    return pq.ParquetFile(source, page_checksum_verification=True)


class _OtherColumns(Exception):
    """A part of another kind of row."""


def _damaged(table: pa.Table, digests: dict[bytes, bytes]) -> str:
    """Return the name of the digest that a table contradicts, or an empty string."""
    if not digests:
        return ""
    if set(digests) == {DIGEST.encode()}:
        expected = hashlib.sha256()
        for name in table.column_names:
            for piece in _content(name, table[name]):
                expected.update(piece)
        return "" if digests[DIGEST.encode()] == expected.hexdigest().encode() else DIGEST
    if digests.get(FORMAT.encode()) != b"2":
        return FORMAT
    for name in table.column_names:
        if digests.get(f"{DIGEST}.{name}".encode()) != _digest(name, table[name]).encode():
            return f"{DIGEST}.{name}"
    return ""


def _encoded(table: pa.Table) -> pa.Table:
    """Return a table with the metadata of format 2: a digest of each column."""
    digests = {f"{DIGEST}.{name}": _digest(name, table[name]) for name in table.column_names}
    return table.replace_schema_metadata({FORMAT: "2", **digests})


def write_part(files: Iterator[Path], table: pa.Table, lost: str) -> None:
    """Write a part durably under the first of several names that is free.

    Args:
        files: names to try.
        table: the rows.
        lost: what is lost and what is not if it cannot be written, as the end of a sentence.

    Raises:
        OSError: the file cannot be written.
    """
    with creating(files, "run", lost) as handle:
        _write(table, handle)


def replace_part(file: Path, table: pa.Table, kept: str) -> None:
    """Write a part durably, read it back, and only then let it take the place of another.

    Raises:
        OSError: the file cannot be written, or is read as something else; the other is as it was.
    """
    with replacing(file, "run", kept) as handle:
        _write(table, handle)
        handle.flush()
        back = pq.ParquetFile(handle.name, page_checksum_verification=True).read()
        if _damaged(back, _encoded(table).schema.metadata):
            raise OSError(errno.EIO, "it was not read back as it was written")


def is_part_of(file: Path, table: pa.Table) -> bool:
    """Return whether a file is what `replace_part` would write."""
    with file.open("rb") as handle:
        stored = pq.ParquetFile(handle)
        return bool(stored.schema_arrow.equals(_encoded(table).schema, check_metadata=True))


def _write(table: pa.Table, handle: IO[bytes]) -> None:
    # Borders between chunks would move those of pages: the same rows make the same file.
    table = _encoded(table.combine_chunks())
    pq.write_table(table, handle, compression="zstd", write_page_checksum=True, row_group_size=ROWS_IN_GROUP)


def stored_schema(file: Path) -> pa.Schema:
    """Return the columns that a part says it has.

    Raises:
        ValueError: the file cannot be read.
        FileNotFoundError: the file is gone.
    """
    try:
        with file.open("rb") as handle:
            return pq.ParquetFile(handle).schema_arrow
    except FileNotFoundError:
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"run: {file} is not a readable part ({reason}); {REMEDY}")


def row_count(file: Path) -> int | None:
    """Return the number of rows that a part states in its footer, or None if the footer cannot be read.

    Raises:
        FileNotFoundError: the file is gone.
    """
    try:
        with file.open("rb") as handle:
            return int(_opened(handle).metadata.num_rows)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException):
        return None


def _digest(name: str, column: pa.ChunkedArray) -> str:
    """Return the SHA-256 of name, type and values of a column, whatever their encoding and compression."""
    digest = hashlib.sha256()
    for piece in _content(name, column):
        digest.update(piece)
    return digest.hexdigest()


def _content(name: str, column: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """Yield name, type and values of a column as bytes: lengths first, if they vary."""
    if column.num_chunks == 1:
        values = column.chunk(0)
    else:
        values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    listed = pa.types.is_list(values.type)
    # Parquet keeps the type of a list's items, but not their name.
    kind = f"list of {values.type.value_type}" if listed else str(values.type)
    yield f"{name} {kind} {len(values)}\n".encode()
    if listed:
        yield pc.list_value_length(values).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        values = values.flatten()
    if pa.types.is_string(values.type) or pa.types.is_binary(values.type):
        offsets = np.frombuffer(values.buffers()[1] or b"\0\0\0\0", np.int32)[values.offset :][: len(values) + 1]
        yield np.diff(offsets).astype("<i8").tobytes()
        if len(values) and values.buffers()[2] is not None:
            yield memoryview(values.buffers()[2])[offsets[0] : offsets[-1]]
    else:
        numbers = values.to_numpy(zero_copy_only=False)
        yield numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
