"""Parts as they were written before their columns explained themselves: paths in packed bits, one digest of all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pathnet.results import Measurements

__all__ = ["old_rows", "write_old_norms", "write_old_part"]

NORMS = pa.schema(
    [
        ("batch", pa.int32()),
        ("length", pa.int16()),
        ("path", pa.binary()),
        ("norm", pa.float64()),
        ("engine", pa.string()),
    ]
)


def write_old_norms(file: Path, measurements: Measurements) -> None:
    """Write path gradient norms as an old part."""
    packed = [row.tobytes() for row in np.packbits(measurements.path, axis=1, bitorder="little")]
    columns = (measurements.batch, measurements.length, packed, measurements.norm, measurements.engine)
    write_old_part(file, pa.table(list(map(pa.array, columns, NORMS.types)), schema=NORMS))


def old_rows(rows: list[dict[str, object]], types: dict[str, pa.DataType]) -> pa.Table:
    """Return rows as a table of plain columns."""
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def write_old_part(file: Path, table: pa.Table) -> None:
    """Write a table as an old part."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        listed = pa.types.is_list(column.type)
        kind = f"list of {column.type.value_type}" if listed else str(column.type)
        digest.update(f"{name} {kind} {len(column)}\n".encode())
        if listed:
            digest.update(np.array([len(value) for value in column.to_pylist()], "<i8").tobytes())
            column = column.flatten()
        values = column.to_pylist()
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            texts = [value.encode() if isinstance(value, str) else value for value in values]
            digest.update(np.array(list(map(len, texts)), "<i8").tobytes() + b"".join(texts))
        else:
            numbers = column.to_numpy(zero_copy_only=False)
            digest.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
    signed = table.replace_schema_metadata({"sha256": digest.hexdigest()})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(signed, file, compression="zstd", write_page_checksum=True)
