"""Pages with tables: which there are, and their text with every table written anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, ROOT, read_object
from benchmarks.tables import accuracy, models, paper, paths, processors, runs, training, trainings

__all__ = ["TABLES", "pages", "rewritten"]

TABLES: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    **processors.TABLES,
    **training.TABLES,
    **models.TABLES,
    **paper.TABLES,
    **paths.TABLES,
    **runs.TABLES,
    **trainings.TABLES,
    **accuracy.TABLES,
}
"""Functions that write a table from results by their file's name, by the name of the table."""

TABLE = re.compile(r"^<!-- table: (?P<name>\S+)(?P<files>[^>]*?) -->\n(?P<text>.*?)^<!-- end -->$", re.M | re.S)
START, END = re.compile(r"<!-- table: [^>]+ -->"), "<!-- end -->"
REMARK = re.compile(r"<!-- (?:not run|file): [^>]+ -->")
"""Comments above blocks of code; pages hold no others, so a misspelt marker does not go unnoticed."""


def pages() -> list[Path]:
    """Return the README and the Markdown pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(page: Path) -> str:
    """Return the text of a page with its tables written from their files.

    Raises:
        ValueError: a table or a file is unknown, a marker is misspelt, or a table has no end or an end no table.
    """
    text = page.read_text()
    _check_markers(page, text)
    return TABLE.sub(lambda match: _written(page, match), text)


def _check_markers(page: Path, text: str) -> None:
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        if "<!--" not in line or REMARK.fullmatch(line):
            continue
        if START.fullmatch(line) and not start:
            start = number
        elif line == END and start:
            start = 0
        else:
            expected = f"`{END}` for the table of line {start}" if start else "`<!-- table: NAME FILE... -->`"
            raise ValueError(f"{page}: line {number}: expected {expected} or a remark, got {line}")
    if start:
        raise ValueError(f"{page}: expected `{END}` below the table of line {start}")


def _written(page: Path, match: re.Match[str]) -> str:
    name, files = match["name"], match["files"].split()
    if name not in TABLES:
        raise ValueError(f"{page}: expected a table among {', '.join(TABLES)}, got {name}")
    try:
        text = TABLES[name]({file: read_object(FOLDER / file) for file in files})
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{page}: {', '.join(files)} lack what table {name} shows ({error!r})") from error
    return f"<!-- table: {' '.join([name, *files])} -->\n\n{text}\n\n<!-- end -->"
