"""Path gradient norms as columns: format 2, whose paths are text, and format 1, whose paths are packed bits."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathnet.results.rows import Measurements, described_field

__all__ = ["FORMAT_1", "SCHEMA", "STEM", "codes_of", "measurements_of", "table_of", "upgraded"]

STEM = "part"

SCHEMA = pa.schema(
    [
        described_field("batch", pa.int32(), "number of the batch, from 0"),
        described_field("length", pa.int16(), "number of residual modules on the path, from 1", "residual modules"),
        described_field(
            "path",
            pa.string(),
            "the path: character i, from 0, is 1 if the path enters the residual module of block i, and 0 if it "
            "takes the skip connection; block 0 is the first after the stem",
        ),
        described_field(
            "norm",
            pa.float64(),
            "L2 norm, over the whole batch, of the gradient of the loss along the path",
            "loss per unit of the tensor at which the gradient is taken",
        ),
        described_field("engine", pa.string(), "name of the engine that computed the norm"),
    ]
)
"""Columns of a part of path gradient norms."""

FORMAT_1 = SCHEMA.set(SCHEMA.get_field_index("path"), pa.field("path", pa.binary()))
"""Columns of older parts: bit i % 8 of byte i // 8, lowest first, is 1 if the path enters the module of block i."""


def table_of(measurements: Measurements) -> pa.Table:
    """Return path gradient norms as a table with the columns of `SCHEMA`."""
    m, columns = measurements, dict[str, pa.Array]()
    for name, values in (("batch", m.batch), ("length", m.length), ("norm", m.norm), ("engine", m.engine)):
        columns[name] = pa.array(values, SCHEMA.field(name).type)
    columns["path"] = _texts(m.path)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def measurements_of(table: pa.Table, n: int) -> Measurements:
    """Return a table with the columns of `SCHEMA` as path gradient norms in a network of n blocks."""
    batch, length, norm = (table[name].to_numpy() for name in ("batch", "length", "norm"))
    return Measurements(batch, length, codes_of(table["path"], n), norm, table["engine"].to_pylist())


def codes_of(path: pa.ChunkedArray, n: int) -> NDArray[np.uint8]:
    """Return M paths, each a text of n characters, as uint8 [M, n]: 0 or 1, or more where a character is neither."""
    characters = np.concatenate([np.empty(0, np.uint8), *map(_characters, path.chunks)])
    return characters.reshape(-1, n) - np.uint8(ord("0"))


def upgraded(table: pa.Table, n: int) -> pa.Table:
    """Return a table with the columns of `FORMAT_1`, which `impossible_path` has checked, with those of `SCHEMA`.

    Raises:
        ValueError: a path is not as long as n blocks need.
    """
    size, packed = -(-n // 8), list(chain.from_iterable(chunk.to_pylist() for chunk in table["path"].chunks))
    for row, path in enumerate(packed):
        if len(path) != size:
            raise ValueError(f"row {row}: path: expected {size} bytes for {n} blocks, got {len(path)}")
    bits = np.unpackbits(np.frombuffer(b"".join(packed), np.uint8).reshape(-1, size), axis=1, bitorder="little")
    wrong = np.flatnonzero(bits[:, n:].any(1))
    if len(wrong):
        raise ValueError(f"row {wrong[0]}: path: expected no modules beyond those of {n} blocks, got some")
    return table.set_column(SCHEMA.get_field_index("path"), SCHEMA.field("path"), _texts(bits[:, :n])).cast(SCHEMA)


def _texts(codes: NDArray[np.uint8]) -> pa.StringArray:
    """Return codes, uint8 [M, n], as M texts of zeros and ones."""
    characters = np.ascontiguousarray(codes + np.uint8(ord("0")))
    count, n = characters.shape
    offsets = np.arange(count + 1, dtype=np.int32) * n
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(characters))


def _characters(texts: pa.StringArray) -> NDArray[np.uint8]:
    """Return the bytes of all texts, one after another."""
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    if texts.buffers()[2] is None or not len(texts):
        return np.empty(0, np.uint8)
    return np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
