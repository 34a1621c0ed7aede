"""Rows in one order, each once: whatever wrote them, and in which parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["repeated_key", "sorted_once"]


def sorted_once(table: pa.Table) -> pa.Table:
    """Return the rows sorted by their columns from left to right, equal rows once. NaN equals NaN, and comes last."""
    codes = np.zeros(len(table), np.int64)
    for name in table.column_names:
        codes = _finer(codes, table[name])
        # As soon as a column tells all rows apart, the others cannot change the order.
        if len(table) == 0 or codes.max() + 1 == len(table):
            break
    _, first = np.unique(codes, return_index=True)
    if len(first) == len(table) and (np.diff(first) == 1).all():
        return table
    return table.take(pa.array(first)).combine_chunks()


def repeated_key(table: pa.Table, keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the keys that two rows of a table share, or None."""
    codes = np.zeros(len(table), np.int64)
    for name in keys:
        codes = _finer(codes, table[name])
    rows, count = np.unique(codes, return_index=True, return_counts=True)[1:]
    if not (count > 1).any():
        return None
    row = int(rows[np.flatnonzero(count > 1)[0]])
    return {name: table[name][row].as_py() for name in keys}


def _finer(codes: NDArray[np.int64], column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return ranks of rows by their codes and, among equal codes, by a column."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        ranks = np.unique(column.to_numpy(), return_inverse=True)[1]
    else:
        values = [tuple(value) if isinstance(value, list) else value for value in column.to_pylist()]
        place = {value: rank for rank, value in enumerate(sorted(set(values)))}
        ranks = np.array([place[value] for value in values], np.int64)
    if not len(ranks):
        return codes
    return np.asarray(np.unique(codes * (int(ranks.max()) + 1) + ranks, return_inverse=True)[1])
