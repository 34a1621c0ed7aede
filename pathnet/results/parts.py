"""One part of a run's measurements: a Parquet file that is written whole and carries a digest of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pathnet.files import replacing
from pathnet.results.facts import DIGEST
from pathnet.results.problems import missing_value

__all__ = ["Check", "read_part", "row_count", "write_part"]

Check = Callable[[pa.Table], str]
"""Describes what is wrong with the values of a part; an empty string for nothing."""


def read_part(file: Path, schema: pa.Schema, check: Check) -> pa.Table:
    """Read a part and verify its columns, digest and values.

    Raises:
        ValueError: the file cannot be read, has other columns, is damaged, or holds values that ``check`` rejects.
    """
    remedy = "move it away to measure its batches again"
    try:
        # ParquetFile, since read_table would take columns from folder names such as seed=1; opened here, since it
        # takes no name that is not UTF-8.
        with file.open("rb") as handle:
            table = pq.ParquetFile(handle, page_checksum_verification=True).read()
        table.validate(full=True)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"run: {file} is not a readable part ({reason}); {remedy}") from None
    if not table.schema.equals(schema):
        raise ValueError(f"run: {file} has other columns: expected {schema.names}, got {table.schema.names}")
    # Nulls come first, since the digest is not defined for them.
    if problem := missing_value(table):
        raise ValueError(f"run: {file}: {problem}; {remedy}")
    metadata = table.schema.metadata
    if metadata is not None and metadata != {DIGEST.encode(): _digest(table).encode()}:
        raise ValueError(f"run: {file} is damaged (its {DIGEST} does not match its content); {remedy}")
    if problem := check(table):
        raise ValueError(f"run: {file}: {problem}; {remedy}")
    return table.replace_schema_metadata(None)


def write_part(file: Path, table: pa.Table) -> None:
    """Write a part with its digest, durably.

    Raises:
        OSError: the file cannot be written.
    """
    lost = (
        f"its {len(table)} measurements are lost, the parts on the disk are intact, and the same command resumes "
        "from them"
    )
    with replacing(file, "run", lost) as handle:
        signed = table.replace_schema_metadata({DIGEST: _digest(table)})
        pq.write_table(signed, handle, compression="zstd", write_page_checksum=True)


def row_count(file: Path) -> int | None:
    """Return the number of rows that a part states in its footer, or None if the footer cannot be read."""
    try:
        with file.open("rb") as handle:
            return int(pq.ParquetFile(handle).metadata.num_rows)
    except (OSError, ValueError, MemoryError, pa.ArrowException):
        return None


def _digest(table: pa.Table) -> str:
    """Return the SHA-256 of the names, types and values of all columns, whatever their encoding and compression."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        listed = pa.types.is_list(column.type)
        # Parquet keeps the type of a list's items, but not their name.
        kind = f"list of {column.type.value_type}" if listed else str(column.type)
        digest.update(f"{name} {kind} {len(column)}\n".encode())
        if listed:
            digest.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            column = column.flatten()
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            digest.update(pc.binary_length(column).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(b"".join(column.cast(pa.binary()).to_pylist()))
        else:
            values = column.to_numpy(zero_copy_only=False)
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
