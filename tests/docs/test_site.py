"""The documentation site: what its pages list, and the check that ``make docs`` runs over the built pages.

The whole site takes ten seconds to build, which `make docs` does; here the check itself is checked, on small sites.
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers import ROOT
from helpers.command_line import pathnet_
from helpers.public_names import NAMES, PUBLIC

from pathnet.commands.app import app

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import check  # noqa: E402

NAVIGATION = '<div class="sidebar-tree"><div><a href="a.html">A</a></div></div>'


def site(folder: Path, **pages: str) -> check.Site:
    """Write a site of two pages that are in order, or of others."""
    (folder / "figures").mkdir()
    (folder / "figures" / "b.png").touch()
    (folder / "style.css").write_text("h1 { color: red }")
    pages = {"index": f'{NAVIGATION}<p id="top">', "a": '<h2 id="b"></h2><a href="index.html#top">up</a>', **pages}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    return check.Site(folder)


def inventory(folder: Path, *names: str) -> check.Site:
    lines = "".join(f"{name} py:class 1 reference.html#$ -\n" for name in names)
    (folder / "objects.inv").write_bytes(b"#\n#\n#\n#\n" + zlib.compress(lines.encode()))
    return check.Site(folder)


@pytest.mark.parametrize(
    "text",
    [
        "<a href='#here'></a><p id='here'>",
        "<a href='a.html#b'></a>",
        "<a href='https://example.org/x'></a>",
        "<a href='mailto:someone@example.org'></a>",
        "<img src='figures/b.png'>",
        "<link rel='stylesheet' href='style.css?v=1'>",
        "<style>p { background: url(data:image/png;base64,AA) }</style>",
    ],
)
def test_a_site_in_order_passes(tmp_path: Path, text: str) -> None:
    whole = site(tmp_path, a=f"<h2 id='b'></h2>{text}")
    assert [*check.broken_links(whole), *check.unlisted_pages(whole)] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<a href='nowhere.html'></a>", "a: expected a file of the site, got nowhere.html"),
        ("<a href='#nowhere'></a>", "a: expected an element of a.html, got #nowhere"),
        ("<a href='index.html#nowhere'></a>", "a: expected an element of index.html, got #nowhere"),
        ("<a href='../outside.html'></a>", "a: expected a file of the site, got ../outside.html"),
        ("<a href='figures'></a>", "a: expected a file of the site, got figures"),
        ("<a href='ftp://example.org'></a>", "a: expected a link of http, https or mailto, got ftp://example.org"),
        ("<a href='https://exa mple'></a>", "a: expected a link of http, https or mailto, got https://exa mple"),
        ("<a href='//example.org/x'></a>", "a: expected a link of http, https or mailto, got //example.org/x"),
        ("<img src='c.png'>", "a: expected a file of the site, got c.png"),
        ("<img srcset='figures/b.png 1x, c.png 2x'>", "a: expected a file of the site, got c.png"),
        ("<img src='https://example.org/b.png'>", "a: expected nothing from outside the site, got https://"),
        ("<script src='//example.org/b.js'></script>", "a: expected nothing from outside the site, got //example"),
        ("<link href='https://example.org/f.css'>", "a: expected nothing from outside the site, got https://"),
        ("<iframe src='https://example.org'></iframe>", "a: expected nothing from outside the site, got https://"),
        ("<p style='background: url(https://example.org/b.png)'>", "a: expected nothing from outside the site, got"),
        ("<style>@import 'https://example.org/f.css'</style>", "a: expected nothing from outside the site, got"),
    ],
)
def test_a_dead_end_and_a_fetch_from_outside_are_reported(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path.parent / "outside.html").touch()
    (reported,) = check.broken_links(site(tmp_path, a=text))
    assert reported.startswith(problem)


def test_a_style_that_fetches_from_outside_is_reported(tmp_path: Path) -> None:
    whole = site(tmp_path)
    (tmp_path / "style.css").write_text("@font-face { src: url('https://example.org/font.woff') }")
    assert list(check.broken_links(whole)) == [
        "style.css: expected nothing from outside the site, got https://example.org/font.woff"
    ]


def test_a_page_in_no_table_of_contents_is_reported(tmp_path: Path) -> None:
    # A link outside the navigation does not count.
    whole = site(tmp_path, index=f"{NAVIGATION}<a href='c.html'></a>", c="")
    assert list(check.unlisted_pages(whole)) == ["c: expected to be in a table of contents, got none that lists it"]


def test_a_public_name_without_an_entry_is_reported(tmp_path: Path) -> None:
    names = list(check.public_names())
    assert list(check.missing_names(inventory(tmp_path, *names))) == []
    for lacking in (
        "pathnet.record",
        "pathnet.Tape.gradient",
        "pathnet.lesion.Errors.bn",
        "pathnet.Recorder.__call__",
    ):
        (reported,) = check.missing_names(inventory(tmp_path, *(set(names) - {lacking})))
        assert reported == f"reference: expected an entry of {lacking}, got none"


def test_the_check_looks_for_every_public_name() -> None:
    assert {f"{module}.{name}" for module, name in NAMES} <= set(check.public_names())


LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
"""A link of a Markdown file to another file, or to a heading."""


def headings(file: Path) -> set[str]:
    """Return the anchors of a Markdown file's headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_links_of_a_file_outside_the_site_lead_somewhere(name: str) -> None:
    dead = []
    for target, anchor in LINK.findall((ROOT / name).read_text()):
        file = ROOT / target if target else ROOT / name
        if not file.exists() or (anchor and anchor not in headings(file)):
            dead.append(f"{target}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("module", PUBLIC)
def test_the_page_of_a_public_module_describes_all_its_names(module: str) -> None:
    page = (DOCS / "reference" / f"{module.removeprefix('pathnet.')}.md").read_text()
    described = re.findall(r"^(?:\.\. \w+:(?:\w*:)* |```\{alias\} (?:\S+ )?pathnet\.\S*\.)(\w+)$", page, re.MULTILINE)
    modules = {name for name in PUBLIC[module] if f"{module}.{name}" in PUBLIC}
    assert set(PUBLIC[module]) - modules <= set(described)


def commands() -> list[str]:
    program: Any = typer.main.get_command(app)
    return ["", *program.list_commands(typer.Context(program))]


GROUPS = ("Commands", "Experiments of the paper")
"""Headings of the help that list commands, each of which has a section of its own."""


def flat(text: str) -> str:
    """Return a text without Markdown's marks and line ends."""
    return " ".join(re.sub(r"[`\\]", "", text).split())


@pytest.mark.parametrize("command", commands())
def test_the_reference_of_a_command_says_what_its_help_says(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed (the extra docs)")
    from extensions import commands as reference

    monkeypatch.setenv("COLUMNS", "400")
    shown = pathnet_(*command.split(), "--help").out
    described = dict(reference.commands_of(app, "pathnet"))
    page = reference.described(f"pathnet {command}".strip(), described[f"pathnet {command}".strip()])
    options = re.findall(r"^│ [* ]*(--[\w-]+)\s+(?:(--[\w-]+)\s+)?([A-Z]+ )?\s*(.*?)\s*│$", shown, re.MULTILINE)
    assert [name for name, *_ in options] == re.findall(r"\{option\} (--[\w-]+)", page)
    for name, opposite, value, text in options:
        spelling = " ".join(filter(None, (name, opposite and f"/ {opposite}", value.strip())))
        (entry,) = re.findall(rf"\{{option\}} {re.escape(spelling)}\n(.*?)\n````", page, re.DOTALL)
        assert flat(entry.replace("*Required.*", "[required]")) == flat(text)
    panels = re.findall(r"╭─ (\w[\w ]*?) ─", shown)
    assert re.findall(r"^### (.*)$", page, re.MULTILINE) == [panel for panel in panels if panel not in GROUPS]
