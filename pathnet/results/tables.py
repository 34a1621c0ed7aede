"""All rows of one kind in the folder of a run: from its parts, and from the journals of what is in no part yet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pyarrow as pa

from pathnet.results.journal import journals, read_journal
from pathnet.results.parts import READERS, Kind, read_parts, row_count
from pathnet.results.sorting import repeated_key, sorted_once

__all__ = ["PART", "counted", "free_names", "measurements_in", "parts_of", "read_table", "rows_in"]

PART = re.compile(r"(?P<stem>.+?)(-\d+)?-\d{6,}\.parquet")
"""Names of parts: the kind of row, the number of the process among several, and that of the part."""
TRIES = 10
"""Number of times that a folder is read while another process merges its parts."""


def measurements_in(folder: Path) -> Path:
    """Return the folder of a run's parts and journals."""
    return folder / "measurements"


def parts_of(folder: Path, stem: str | None = None) -> list[Path]:
    """Return the parts of a run, sorted by name.

    Args:
        folder: folder of the run.
        stem: the kind of row, such as ``part``, or that of one process, such as ``part-1``; all by default.
    """
    name = PART if stem is None else re.compile(rf"{re.escape(stem)}(-\d+)?-\d{{6,}}\.parquet")
    return [file for file in sorted(measurements_in(folder).glob("*.parquet")) if name.fullmatch(file.name)]


def free_names(folder: Path, stem: str) -> Iterator[Path]:
    """Yield names for parts of a run, beginning with those that are likely to be free."""
    for number in count(len(parts_of(folder, stem))):
        yield measurements_in(folder) / f"{stem}-{number:06d}.parquet"


def read_table(folder: Path, kind: Kind, names: Sequence[str]) -> pa.Table:
    """Return columns of all rows of one kind, sorted by their columns from left to right, equal rows once.

    Args:
        folder: folder of the run.
        kind: the kind of row.
        names: names of the columns, among them those that identify a row.

    Raises:
        ValueError: a part cannot be read, holds impossible values, or contradicts another part.
    """
    table = sorted_once(rows_in(folder, kind, names))
    if (repeated := repeated_key(table, kind.keys)) is not None:
        keys = ", ".join(f"{name} {value}" for name, value in repeated.items())
        raise ValueError(
            f"run: the parts in {measurements_in(folder)} hold {keys} twice and differently; expected every "
            "measurement once"
        )
    return table


def rows_in(folder: Path, kind: Kind, names: Sequence[str]) -> pa.Table:
    """Return columns of all rows of one kind, in no order; rows may occur twice.

    Raises:
        ValueError: a part cannot be read, or holds impossible values.
    """
    for tries in count(1):
        try:
            # Journals first: their rows go into parts meanwhile, and never the other way round.
            waiting = [
                table.select(list(names))
                for file, stem in journals(measurements_in(folder)).items()
                if re.fullmatch(rf"{re.escape(kind.stem)}(-\d+)?", stem)
                for table in read_journal(file)
            ]
            parts = read_parts(parts_of(folder, kind.stem), kind, names)
        except FileNotFoundError:
            if tries == TRIES:
                raise
            continue
        return pa.concat_tables([parts, *waiting])
    raise AssertionError  # for type checkers


def counted(folder: Path) -> tuple[list[int | None], int]:
    """Return the number of rows in each part of a run, None where it cannot be read, and that in its journals."""
    with ThreadPoolExecutor(READERS) as pool:
        counts = list(pool.map(row_count, parts_of(folder)))
    waiting = sum(len(table) for file in journals(measurements_in(folder)) for table in read_journal(file))
    return counts, waiting
