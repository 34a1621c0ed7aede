"""Checks of a part's values. Each returns the first problem in words, or an empty string."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pathnet.results.rows import Range, bits

__all__ = ["impossible_measurement", "missing_value", "out_of_range"]


def missing_value(table: pa.Table) -> str:
    """Describe the first null."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        if column.null_count:
            return f"row {column.is_null().to_pylist().index(True)}: {name}: expected a value, got null"
        if pa.types.is_list(column.type) and (items := column.flatten()).null_count:
            row = pc.list_parent_indices(column)[items.is_null().to_pylist().index(True)]
            return f"row {row}: {name}: expected integers, got null among them"
    return ""


def out_of_range(table: pa.Table, ranges: Mapping[str, Range]) -> str:
    """Describe the first number outside the range of its field."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            continue
        rows = None
        if pa.types.is_list(column.type):
            column, rows = column.flatten(), pc.list_parent_indices(column)
        allowed, values = ranges.get(name, Range()), column.to_numpy(zero_copy_only=False)
        most = table[allowed.most].to_numpy() if isinstance(allowed.most, str) else allowed.most
        inside = (values >= allowed.least) & (values <= most) | (allowed.nan & np.isnan(values))
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            row = first if rows is None else rows[first].as_py()
            return f"row {row}: {name}: expected {allowed}, got {values[first]}"
    return ""


def impossible_measurement(table: pa.Table, n: int) -> str:
    """Describe the first value that a path gradient norm in a network of n blocks cannot have."""
    if problem := out_of_range(table, {"length": Range(1, n)}):
        return problem
    size, path = -(-n // 8), table["path"].combine_chunks()
    wrong = np.flatnonzero(pc.binary_length(path).to_numpy(zero_copy_only=False) != size)
    if len(wrong):
        return f"row {wrong[0]}: path: expected {size} bytes for {n} blocks, got {len(path[wrong[0]].as_py())}"
    codes = bits(path, size)
    length = table["length"].to_numpy()
    wrong = np.flatnonzero((codes[:, :n].sum(1) != length) | codes[:, n:].any(1))
    if len(wrong):
        row = wrong[0]
        return f"row {row}: path: expected {length[row]} modules among {n} (its length), got {int(codes[row].sum())}"
    return ""
