"""All rows of one kind in the folder of a run: from its parts, and from the journals of what is in no part yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pathnet.results.journal import journals, read_journal
from pathnet.results.parts import READERS, REMEDY, Kind, read_parts, row_count
from pathnet.results.sorting import repeated_key, sorted_once

__all__ = [
    "PART",
    "counted",
    "free_names",
    "kind_named",
    "measurements_in",
    "parts_of",
    "read_table",
    "rows_in",
    "while_merged",
]

PART = re.compile(r"(?P<stem>.+?)(-\d+)?-\d{6,}\.parquet")
"""Names of parts: the kind of row, the number of the process among several, and that of the part."""
Result = TypeVar("Result")

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


def kind_named(stem: str) -> str:
    """Return the kind of row of a part or journal: its name without the number of a process."""
    return re.sub(r"-\d+$", "", stem)


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

    def read_now() -> pa.Table:
        # Journals first: their rows go into parts meanwhile, and never the other way round.
        waiting = [
            kind.completed(table).select(list(names))
            for file, stem in journals(measurements_in(folder)).items()
            if kind_named(stem) == kind.stem
            for table in read_journal(file)
        ]
        return pa.concat_tables([read_parts(parts_of(folder, kind.stem), kind, names), *waiting])

    return while_merged(read_now)


def while_merged(read_now: Callable[[], Result]) -> Result:
    """Return what is read in a folder whose files another process may merge, which removes some that were listed.

    Args:
        read_now: lists and reads files; is called again if one is gone.

    Raises:
        ValueError: a file is listed, but not there, again and again.
    """
    for tries in count(1):
        try:
            return read_now()
        except FileNotFoundError as error:
            if tries == TRIES:
                raise ValueError(f"run: {error.filename} is listed, but cannot be opened; {REMEDY}") from None
    raise AssertionError  # for type checkers


def counted(folder: Path) -> tuple[list[int | None], int]:
    """Return the number of rows in each part of a run, None where it cannot be read, and that in its journals."""

    def count_now() -> tuple[list[int | None], int]:
        waiting = sum(len(table) for file in journals(measurements_in(folder)) for table in read_journal(file))
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(row_count, parts_of(folder))), waiting

    return while_merged(count_now)
