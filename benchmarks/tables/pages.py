"""Pages with tables: which there are, and their text with every table written anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, ROOT, read_object
from benchmarks.tables import models, paper, paths, processors

__all__ = ["TABLES", "pages", "rewritten"]

TABLES: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    **processors.TABLES,
    **models.TABLES,
    **paper.TABLES,
    **paths.TABLES,
}
"""Functions that write a table from results by their file's name, by the name of the table."""

TABLE = re.compile(r"^<!-- table: (?P<name>\S+)(?P<files>[^>]*?) -->\n(?P<text>.*?)^<!-- end -->$", re.M | re.S)


def pages() -> list[Path]:
    """Return the README and the Markdown pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(page: Path) -> str:
    """Return the text of a page with its tables written from their files.

    Raises:
        ValueError: a table or a file is unknown, or a table has no end.
    """
    text = page.read_text()
    if text.count("<!-- table: ") != len(TABLE.findall(text)):
        raise ValueError(f"{page}: expected `<!-- end -->` below each `<!-- table: NAME FILE... -->`")
    return TABLE.sub(lambda match: _written(page, match), text)


def _written(page: Path, match: re.Match[str]) -> str:
    name, files = match["name"], match["files"].split()
    if name not in TABLES:
        raise ValueError(f"{page}: expected a table among {', '.join(TABLES)}, got {name}")
    try:
        text = TABLES[name]({file: read_object(FOLDER / file) for file in files})
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{page}: {', '.join(files)} lack what table {name} shows ({error!r})") from error
    return f"<!-- table: {' '.join([name, *files])} -->\n\n{text}\n\n<!-- end -->"
