"""Facts of the code that pages state outside of code blocks: files, engines, the order of imports, tolerances."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, tolerances
from test_imports import ORDER

from pathnet.engines import ENGINES

PAGES = sorted([*(ROOT / "docs" / "how").glob("*.md"), *(ROOT / "docs" / "extending").glob("*.md")])
FOLDERS = ("benchmarks", "csrc", "docs", "pathnet", "tests")
SUFFIXES = "cpp|cu|cuh|h|md|py|txt"


def code_of(text: str) -> list[str]:
    """Return what stands in backticks outside of blocks of code."""
    return re.findall(r"(?<!`)`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def files_named(text: str) -> set[str]:
    """Return the files and folders of the repository that a page names; those of a `<name>` are examples."""
    path, name = rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", rf"[\w/]+\.(?:{SUFFIXES})"
    return {code for code in code_of(text) if re.fullmatch(rf"{path}|{name}", code)}


def exists(name: str) -> bool:
    if name.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
        return (ROOT / name).exists()
    return (ROOT / name).exists() or any(any((ROOT / folder).rglob(name)) for folder in FOLDERS)


def rows(page: str, heading: str) -> list[Sequence[str]]:
    """Return the cells of the table under a heading, without its own."""
    text = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert table is not None
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    assert [name for name in sorted(files_named(page.read_text())) if not exists(name)] == []


def test_files_are_named() -> None:
    names = files_named((ROOT / "docs" / "extending" / "index.md").read_text())
    assert {"csrc/cpu/walk/block_backward_batch.h", "planner.cpp", "engines/__init__.py", "csrc/cuda/"} <= names
    assert not exists("csrc/cuda/gone.cu") and not exists("gone.py")


def test_the_engines_are_those_of_the_registry_in_its_order() -> None:
    assert [row[0].strip("`") for row in rows("how/engines.md", "What each engine serves")] == [
        engine.name for engine in ENGINES
    ]


def test_all_parts_stand_in_the_order_of_imports() -> None:
    first, *following = rows("extending/index.md", "The parts, in the order of imports")
    parts = [name.strip("/") for row in following for name in code_of(row[0])]
    examples = ORDER[: ORDER.index(parts[0])]
    assert parts == ORDER[len(examples) : -1] and ORDER[-1] == "__main__"
    assert set(code_of(first[0])) < set(examples) and first[0].endswith("...") and len(examples) < 12


def test_the_paper_is_cited_as_in_the_citation_file() -> None:
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    (entry,) = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.M))
    authors = [f"{author['family-names']}, {author['given-names'].split()[0]}" for author in paper["authors"]]
    assert fields == {
        "title": paper["title"],
        "author": " and ".join(authors),
        "booktitle": paper["collection-title"],
        "volume": paper["volume"],
        "year": str(paper["year"]),
    }


def test_the_tolerances_are_those_of_the_tests() -> None:
    names = (
        *("EXACT_WALK", "FLOAT32_BATCH_NORM", "FLOAT32_SAMPLE_NORM", "BFLOAT16_BATCH_NORM", "BFLOAT16_SAMPLE_NORM"),
        *("BFLOAT16_GRADIENT", "FORWARD"),
    )
    stated = [float(row[1]) for row in rows("how/correctness.md", "Tolerances")]
    assert stated == [getattr(tolerances, name) for name in names]
