"""Check the built site: ``python docs/check.py build/docs`` lists what is wrong with it, and fails if anything is.

- Every public name of every public module is in the index of the reference, and every public member of a class.
- Every command and every option is on the page of commands.
- Every page is in the navigation of the front page.
- Every link, image, script and style within the site leads to a file of it, and every anchor to an element.
- Nothing is fetched from outside: other sites are for readers to go to, by links of http, https or mailto.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["Page", "Site", "broken_links", "missing_names", "missing_options", "problems", "unlisted_pages"]

FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
"""Attributes by which a browser fetches something without being asked, by element."""
EXTERNAL = re.compile(r"(https?://[\w.-]+\.[a-z]+(:\d+)?(/\S*)?|mailto:[\w.+-]+@[\w.-]+)")
STYLE_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")
UNLISTED = {"index", "genindex", "py-modindex", "search"}
"""Pages that Sphinx writes, or that the navigation hangs below."""


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it fetches.

    Attributes:
        anchors: the ids of its elements.
        links: targets of links that a reader may follow.
        navigation: those among them in the sidebar.
        fetched: targets that a browser fetches by itself.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.navigation: list[str] = []
        self.fetched: list[str] = []
        self._in_style = False
        self._sidebar = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect an element's id and targets."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self._in_style = tag == "style"
        if tag == "div" and (self._sidebar or "sidebar-tree" in values.get("class", "").split()):
            self._sidebar += 1
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
            if self._sidebar:
                self.navigation.append(values["href"])
        elif tag in FETCHED and FETCHED[tag] in values:
            self.fetched.append(values[FETCHED[tag]])
        self.fetched += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.fetched += _style_targets(values.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        """Note where the sidebar ends."""
        if tag == "div" and self._sidebar:
            self._sidebar -= 1

    def handle_data(self, data: str) -> None:
        """Collect the targets of a style."""
        if self._in_style:
            self.fetched += _style_targets(data)


def _style_targets(style: str) -> list[str]:
    return [first or second for first, second in STYLE_URL.findall(style)]


@dataclass(frozen=True)
class Site:
    """A built site.

    Attributes:
        folder: the folder that Sphinx wrote.
    """

    folder: Path
    _pages: dict[Path, Page] = field(default_factory=dict)

    @cached_property
    def files(self) -> list[Path]:
        """The pages, sorted."""
        return sorted(self.folder.rglob("*.html"))

    def page(self, file: Path) -> Page:
        """Return a page, parsed."""
        if file not in self._pages:
            self._pages[file] = Page(file.read_text())
        return self._pages[file]

    @cached_property
    def entries(self) -> set[str]:
        """The names in ``objects.inv``, such as pathnet.Tape.gradient and pathnet-train.--data."""
        packed = (self.folder / "objects.inv").read_bytes().split(b"\n", 4)[4]
        return {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}

    def name(self, file: Path) -> str:
        """Return a page's name, without the ending."""
        return file.relative_to(self.folder).with_suffix("").as_posix()


def public_names() -> Iterator[str]:
    """Yield the public names of the package and of its public modules, and the public members of the classes."""
    import pathnet

    yield from (f"pathnet.{name}" for name in dir(pathnet))
    modules = {name: getattr(pathnet, name) for name in dir(pathnet) if inspect.ismodule(getattr(pathnet, name))}
    described = set()
    for module, value in modules.items():
        for name in import_module(value.__name__).__all__:
            yield f"pathnet.{module}.{name}"
            yield from _members(f"pathnet.{module}.{name}", getattr(value, name))
            described.add(id(getattr(value, name)))
    for name in sorted(set(dir(pathnet)) - set(modules)):
        if id(getattr(pathnet, name)) not in described:
            yield from _members(f"pathnet.{name}", getattr(pathnet, name))


def _members(name: str, value: object) -> Iterator[str]:
    """Yield the fields of a class, and the methods and properties that it defines with a docstring."""
    if not inspect.isclass(value):
        return
    fields = [entry.name for entry in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    for member in {**dict.fromkeys(fields), **vars(value)}:
        defined = vars(value).get(member)
        function = getattr(defined, "fget", getattr(defined, "__func__", defined))
        is_described = inspect.isfunction(function) and function.__doc__
        if (not member.startswith("_") or member == "__call__") and (member in fields or is_described):
            yield f"{name}.{member}"


def missing_names(site: Site) -> Iterator[str]:
    """Yield the public names that the reference has no entry of."""
    for name in public_names():
        if name not in site.entries:
            yield f"reference: expected an entry of {name}, got none"


def missing_options(site: Site) -> Iterator[str]:
    """Yield the options that the page of commands has no entry of."""
    import typer

    from pathnet.commands.app import app

    program: Any = typer.main.get_command(app)
    context = typer.Context(program, info_name="pathnet")
    commands = [program, *(program.get_command(context, name) for name in program.list_commands(context))]
    for command in commands:
        words = "pathnet" if command is program else f"pathnet-{command.name}"
        for parameter in command.get_params(context):
            spelling = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
            if not parameter.hidden and f"{words}.{spelling}" not in site.entries:
                yield f"commands: expected an entry of {words}.{spelling}, got none"


def unlisted_pages(site: Site) -> Iterator[str]:
    """Yield the pages that the navigation does not lead to."""
    front = site.folder / "index.html"
    listed = {_target(front, link)[0] for link in site.page(front).navigation}
    for file in site.files:
        name = site.name(file)
        if file.resolve() not in listed and name not in UNLISTED and not name.startswith("_modules/"):
            yield f"{name}: expected to be in a table of contents, got none that lists it"


def _target(file: Path, link: str) -> tuple[Path, str]:
    """Return the file and the anchor that a link within the site leads to."""
    parts = urlsplit(link)
    path = unquote(parts.path)
    return ((file.parent / path) if path else file).resolve(), unquote(parts.fragment)


def broken_links(site: Site) -> Iterator[str]:
    """Yield the links that lead nowhere, and whatever comes from outside the site."""
    for file in site.files:
        page = site.page(file)
        for link in dict.fromkeys(page.links):
            if urlsplit(link).scheme or link.startswith("//"):
                if not EXTERNAL.fullmatch(link):
                    yield f"{site.name(file)}: expected a link of http, https or mailto, got {link}"
            elif problem := _dead_end(site, file, link):
                yield problem
        for link in dict.fromkeys(page.fetched):
            if urlsplit(link).scheme not in ("", "data") or link.startswith("//"):
                yield f"{site.name(file)}: expected nothing from outside the site, got {link}"
            elif not link.startswith("data:") and (problem := _dead_end(site, file, link)):
                yield problem
    for style in sorted(site.folder.rglob("*.css")):
        for link in _style_targets(style.read_text()):
            if urlsplit(link).scheme not in ("", "data") or link.startswith("//"):
                yield f"{style.name}: expected nothing from outside the site, got {link}"


def _dead_end(site: Site, file: Path, link: str) -> str | None:
    target, anchor = _target(file, link)
    if not (target.is_file() and target.is_relative_to(site.folder)):
        return f"{site.name(file)}: expected a file of the site, got {link}"
    if anchor and target.suffix == ".html" and anchor not in site.page(target).anchors:
        return f"{site.name(file)}: expected an element of {target.name}, got #{anchor}"
    return None


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a built site, a line for each."""
    site = Site(folder.resolve())
    checks = (missing_names, missing_options, unlisted_pages, broken_links)
    return [problem for check in checks for problem in check(site)]


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "the site is complete, and every link within it leads somewhere")
    sys.exit(bool(wrong))
