"""``python -m benchmarks.tables [--check]``: write the tables of all pages, or name the pages that differ."""

from __future__ import annotations

import sys

from benchmarks.results import ROOT
from benchmarks.tables.pages import pages, rewritten

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python -m benchmarks.tables [--check]", file=sys.stderr)
        return 2
    outdated = {page: text for page in pages() if (text := rewritten(page)) != page.read_text()}
    for page, text in outdated.items():
        print(page.relative_to(ROOT))
        if not arguments:
            page.write_text(text)
    return int(bool(arguments and outdated))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
