"""Every code block of the README and the documentation runs, and prints what the page shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.pages import blocks_of, documents, imports, problems, run_page
from helpers.triton_kernels import import_kernels

EXTRAS = {"torchvision", "timm", "transformers", "duckdb", "pandas", "polars"}
"""Packages that pages may need and this environment may lack; `make test-interop` has the first three."""

PAGES = [page for page in documents() if blocks_of(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_pages_code_runs_and_prints_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {name for name in imports(blocks_of(page.read_text())) if importlib.util.find_spec(name) is None}
    if lacking & EXTRAS:
        pytest.skip(f"{', '.join(sorted(lacking))} is not installed")
    import_kernels()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    wrong = [problem for block, printed in run_page(page, tmp_path) if (problem := problems(block, printed))]
    assert not wrong, "\n".join(wrong)


def test_there_are_pages() -> None:
    assert PAGES
