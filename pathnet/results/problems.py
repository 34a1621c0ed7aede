"""Checks of the values of a table. Each returns the first problem in words, or an empty string."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pathnet.results.norms import codes_of
from pathnet.results.rows import Range

__all__ = ["impossible_measurement", "missing_value", "out_of_range"]


def missing_value(table: pa.Table) -> str:
    """Describe the first null."""
    for name in table.column_names:
        column = table[name]
        if column.null_count:
            return f"row {column.is_null().to_pylist().index(True)}: {name}: expected a value, got null"
        if pa.types.is_list(column.type):
            column = column.combine_chunks()
            if (items := column.flatten()).null_count:
                row = pc.list_parent_indices(column)[items.is_null().to_pylist().index(True)]
                return f"row {row}: {name}: expected integers, got null among them"
    return ""


def out_of_range(table: pa.Table, ranges: Mapping[str, Range]) -> str:
    """Describe the first number outside the range of its field."""
    for name in table.column_names:
        column = table[name]
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            continue
        rows = None
        if pa.types.is_list(column.type):
            column = column.combine_chunks()
            column, rows = column.flatten(), pc.list_parent_indices(column)
        allowed = ranges.get(name, Range())
        values = column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
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
    if "path" not in table.column_names:
        return ""
    path = table["path"]
    wrong = np.flatnonzero(pc.binary_length(path).to_numpy() != n)
    if len(wrong):
        return f"row {wrong[0]}: path: expected {n} characters (one a block), got {path[int(wrong[0])].as_py()!r}"
    codes = codes_of(path, n)
    wrong = np.flatnonzero((codes > 1).any(1))
    if len(wrong):
        return f"row {wrong[0]}: path: expected zeros and ones, got {path[int(wrong[0])].as_py()!r}"
    if "length" not in table.column_names:
        return ""
    length, modules = table["length"].to_numpy(), codes.sum(1)
    wrong = np.flatnonzero(modules != length)
    if len(wrong):
        row = wrong[0]
        return f"row {row}: path: expected {length[row]} modules (its length), got {int(modules[row])}"
    return ""
