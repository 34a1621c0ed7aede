"""The report of a study: self-contained, every claim with its verdict, and safe whatever names it shows."""

from __future__ import annotations

import base64
import errno
import os
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.runs import deletions, one_of_each, write_run

from pathnet import report, results
from pathnet.experiments.claims import in_words
from pathnet.paper import claims, draw

HOSTILE = "<script>alert('x')</script> & \"quoted\" --> </table>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A page as a browser reads it: tags that nest, attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[results.Run]:
    return one_of_each(tmp_path_factory.mktemp("study"), HOSTILE)


@pytest.fixture(scope="module")
def text(runs: list[results.Run]) -> str:
    folder = runs[0].folder.parent
    file = report.write(runs, f"All of {HOSTILE}", folder / "report.html")
    assert file == folder / "report.html" and not list(folder.glob(".*"))
    return file.read_text(encoding="utf-8")


def test_the_page_is_complete_by_itself(text: str) -> None:
    page = Page(text)
    assert page.open == [] and text.startswith("<!doctype html>")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name == "href":
                assert value is not None and value.startswith("#") and value[1:] in ids
            elif name == "src":
                assert value is not None and value.startswith("data:image/svg+xml;base64,")
            else:
                assert name in ("lang", "charset", "name", "content", "class", "id", "alt"), name
    assert len(ids) == len(set(ids)) == 9
    outside = text
    for image in page.all("img"):
        outside = outside.replace(str(image["src"]), "")
    assert "http" not in outside and "file:" not in outside and "url(" not in outside and "@import" not in outside


def test_every_figure_is_shown_and_refers_to_nothing(text: str, runs: list[results.Run]) -> None:
    images = Page(text).all("img")
    assert [image["alt"] for image in images] == [
        "figure-1",
        "figure-2",
        "figure-3",
        "figure-5a",
        "figure-5b",
        "figure-6",
        "effective-training",
        "figure-7",
        "figure-8",
        "highway",
    ]
    drawn = {file.stem: file.read_bytes() for run in runs for file in (run.folder / "figures").glob("*.svg")}
    for image in images:
        svg = base64.b64decode(str(image["src"]).partition(",")[2])
        assert svg == drawn[str(image["alt"])]
        for element in ElementTree.fromstring(svg).iter():
            assert not element.tag.endswith("script")
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)


def test_every_claim_stands_beside_what_was_measured_and_its_verdict(text: str, runs: list[results.Run]) -> None:
    page, tested = Page(text), [claim for run in runs for claim in claims(run)]
    assert {claim.verdict for claim in tested} == {"held", "did not hold", "open"}
    rows = [row for row in page.rows if row[0] not in ("paper", "the paper's claim")]
    assert rows[: len(tested)] == [[claim.where, claim.paper, claim.verdict] for claim in tested]
    assert rows[len(tested) :] == [[claim.paper, claim.measured, claim.bound, claim.verdict] for claim in tested]
    classes = [cell["class"] for cell in page.all("td") if "class" in cell]
    short = {"held": "held", "did not hold": "not", "open": "open"}
    assert classes == 2 * [short[claim.verdict] for claim in tested]
    assert f"Of {len(tested)} claims, {in_words(tested)}." in " ".join("".join(page.words).split())


def test_names_are_shown_as_they_are(text: str) -> None:
    words = "".join(Page(text).words)
    assert words.count(f"All of {HOSTILE}") == 2
    assert f"{HOSTILE}; residual, depth 14, width 4, 6 blocks" in words
    assert "<script" not in text and "alert('x')</script>" not in text


def test_a_folder_of_any_name_has_its_own_anchor(tmp_path: Path) -> None:
    name = 'a "b" <c>'
    run = write_run(tmp_path / name, "lesion-single", {"residual": (3, ())}, deletions(0.1, [0.1] * 3))
    page = Page(report.write([run], "title", tmp_path / "report.html").read_text())
    (heading,), (link,) = page.all("h2"), page.all("a")
    assert heading["id"] == f"lesion-single-{name}" and link["href"] == f"#{heading['id']}"


def test_a_page_is_written_whole_or_not_at_all(
    runs: list[results.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.html"
    file.write_text("the one before")
    unfinished = write_run(tmp_path / "run", "lesion-many", {"residual": (3, ())}, [])
    with pytest.raises(ValueError, match="is not complete"):
        report.write([runs[0], unfinished], "title", file)
    assert file.read_text() == "the one before"

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    figures = [path for run in runs[:1] for path in draw(run)]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="^report: .*report.html cannot be .*No space"):
        patch.setattr(report, "draw", lambda run: figures)
        patch.setattr(Path, "replace", full)
        report.write(runs[:1], "title", file)
    assert file.read_text() == "the one before"
    assert "Of 2 claims, 2 held, 0 did not hold and 0 are open." in report.write(runs[:1], "title", file).read_text()
