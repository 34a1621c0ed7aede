"""Tables on pages equal what the script writes from results files, and say what the files say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from benchmarks import results
from benchmarks.tables import __main__ as script
from benchmarks.tables import markdown, models, pages, processors, training
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

NAMES = re.compile(r"^<!-- table: (\S+)", re.M)
AWAITED = {"times"}
"""Tables whose numbers no results file in the repository has yet."""


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_what_the_script_writes(page: Path) -> None:
    assert pages.rewritten(page) == page.read_text(), "run: python -m benchmarks.tables"


def test_every_table_is_on_some_page() -> None:
    shown = {name for page in pages.pages() for name in NAMES.findall(page.read_text())}
    assert shown.isdisjoint(AWAITED) and shown | AWAITED == pages.TABLES.keys()


def test_the_readme_shows_speed_and_claims() -> None:
    assert NAMES.findall((ROOT / "README.md").read_text()) == ["speed", "claims"]


def test_a_digit_changed_on_a_page_is_written_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = pages.rewritten(ROOT / "docs" / "performance.md")
    number = re.compile(r"(?<=\| the loop, float32 \| )\d+")
    assert number.search(text)
    page = tmp_path / "page.md"
    page.write_text(number.sub("99", text))
    monkeypatch.setattr(script, "pages", lambda: [page])
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.main(["--check"]) == 1 and page.read_text() != text
    assert script.main([]) == 0 and page.read_text() == text
    assert script.main(["--check"]) == 0
    assert capsys.readouterr().out == "page.md\npage.md\n"
    assert script.main(["--chek"]) == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- table: speeed -->\n<!-- end -->\n", "expected a table among .*, got speeed"),
        ("<!-- table: speed -->\n", "expected `<!-- end -->` below the table of line 1"),
        ("<!-- table: speed -->\n\n<!-- table: speed -->\n<!-- end -->\n", "line 3: expected `<!-- end -->` for"),
        ("1\n<!-- end -->\n", "line 2: expected `<!-- table: NAME FILE... -->`"),
        ("<!-- Table: speed -->\n| 1 |\n", "line 1: expected .*, got <!-- Table: speed -->"),
        ("<!-- table : speed -->\n| 1 |\n", "line 1: expected .*, got <!-- table : speed -->"),
        ("<!--table: speed -->\n| 1 |\n", "line 1: expected .*, got <!--table: speed -->"),
        ("<!-- tabel: speed -->\n| 1 |\n<!-- end -->\n", "line 1: expected .*, got <!-- tabel: speed -->"),
        (" <!-- table: speed -->\n| 1 |\n", "line 1: expected .*, got  <!-- table: speed -->"),
        ("<!-- table: speed -->\n| 1 |\n<!-- End -->\n", "line 3: expected `<!-- end -->` for the table of line 1"),
        ("<!-- table: sums cpu/none.json -->\n<!-- end -->\n", "none.json cannot be read"),
        ("<!-- table: sums paper/digits.json -->\n<!-- end -->\n", "digits.json lack what table sums shows"),
    ],
)
def test_a_table_that_cannot_be_written_is_an_error(tmp_path: Path, text: str, error: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=error):
        pages.rewritten(page)


def test_numbers_as_text() -> None:
    texts = [markdown.number(value) for value in (12.345, 0.98765, 1234567.0, 3e-7, None)]
    assert texts == ["12.3", "0.988", "1,230,000", "3e-07", ""]
    assert markdown.spread(0.12345, 0.1, None) == "12.3 %"
    assert markdown.spread(0.12345, 0.1, 0.2) == "12.3 % (10 to 20)"
    assert [markdown.listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]
    with pytest.raises(ValueError, match="cells: expected 2"):
        markdown.table(["a", "b"], [["1 | 2", "3"]])


def timed(**findings: Any) -> dict[str, Any]:
    """Return a file of a processor with made-up figures."""
    facts = {"processor": "A CPU", "threads": 2, "instruction_set": "base", "torch": "2.13.0+cpu"}
    figures = [
        {"figure": f"times faster than the {', '.join(rival)}{call}", "walks": i + 0.25, "counted": i + 0.5}
        for i, rival in enumerate(processors.TITLES)
        for call in ("", ", one call")
    ]
    return {"facts": facts, "date": "2026-01-01", "figures": figures, "found": findings}


def test_a_ratio_stands_in_its_row_and_column() -> None:
    text = processors.ratios({"cpu/a.json": timed(lengths={"blocks": 3, "batch": 4})})
    assert "| the composition, mode `batch`, bfloat16 | 5.25 | 5.5 | 5.25 | 5.5 |" in text
    assert "2 cores of an A CPU (base), torch 2.13.0, 2026-01-01, 3 blocks, batch 4" in text


def test_speed_on_models_stands_below_the_same_processor() -> None:
    figure = {"figure": "100 paths", "sense": "at least", "goal": 9.0, "wall": 1.0, "processor": 2.0, "met": False}
    first = {**figure, "figure": models.FIRST, "goal": None, "processor": 0.75, "met": None}
    on_models = timed(models={"figures": [{"model": "GPT", **figure}, {"model": "GPT", **first}]})
    on_models["facts"]["threads"] = 1
    elsewhere = timed(lengths={})
    elsewhere["facts"]["processor"] = "B CPU"
    text = models.speed({"cpu/a.json": timed(lengths={}), "cpu/b.json": elsewhere, "cpu/c.json": on_models})
    assert (
        "| GPT, 100 random paths a call, float32 | fifteen lines | 2, **not** met (one core) | not measured |" in text
    )
    assert "| ResNet-110, one path a call, float32 | the loop | 0.5 | 0.5 |" in text
    assert "| ResNet-110, one path a call, bfloat16 | the loop in float32 | 1.5 | 1.5 |" in text
    assert "| ResNet-110, one path a call, bfloat16 | the composition | 3.5 | 3.5 |" in text
    assert "On one core of an A CPU (base), the rows of GPT time" in text
    assert "new network, the same 100 paths are 0.75 times as fast as the fifteen lines." in text
    assert "`benchmarks/results/cpu/c.json`" in text


def test_the_files_of_the_speed_table_are_the_newest_of_each_processor() -> None:
    files = {
        f"cpu/{path.name}": results.read_object(path) for path in sorted((results.FOLDER / "cpu").glob("*.json"))
    }
    newest: dict[tuple[str, str], str] = {}
    for name, file in sorted(files.items(), key=lambda entry: entry[1]["began"]):
        measured_here = {"lengths", "models"} & file["found"].keys()
        for measured in measured_here | ({"training"} if training.times_training(file) else set()):
            newest[measured, file["facts"]["processor"]] = name
    for page in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        (marker,) = re.findall(r"<!-- table: speed (.*) -->", page.read_text())
        assert sorted(marker.split()) == sorted(newest.values())


def test_the_modules_left_by_sharing_stand_below_their_model() -> None:
    figure = {"figure": "100 paths", "sense": "at least", "goal": 9.0, "wall": 1.0, "processor": 2.0, "met": True}
    visits = [{"paths": 100, "modules": 1500, "shared": 1000}]
    on_models = {"figures": [{"model": "GPT", **figure}], "models": {"GPT": {"visits": visits}}}
    text = models.models({"cpu/a.json": timed(models=on_models)})
    assert text.endswith(
        "| modules on 100 paths, over those left if equal tails are shared |  | 1,500 / 1,000 = 1.5 |"
    )


def test_each_number_of_a_processor_stands_in_its_column() -> None:
    def row(bn: str, precision: str, batch: int, share: float) -> dict[str, Any]:
        timings = {"sums": {"median_s": 7 * share}, "one by one": {"median_s": 99.0}}
        return {"bn": bn, "precision": precision, "batch": batch, "share": share, "timings": timings}

    file = timed(
        sums={"rows": [row("running", "float32", 32, 0.5), row("batch", "bfloat16", 8, 0.25)]},
        deletions={"deletions": 3, "eager_forward_passes": 4, "share_of_eager": {"float32": 0.125, "bfloat16": 9}},
        training={"share": 0.75, "drawn": 2, "modules": 6},
        peak_share={"share_of_peak": {"float32": 1.25, "bfloat16": 9}},
        fits={
            varied: {"line": {"slope": slope, "r_squared": 0.98765}} for varied, slope in (("paths", 2), ("batch", 3))
        },
        memory={"batch": 16, "5": {"paths": 5, "growth_bytes": 6_500_000}},
        checks={
            "float64": {
                f"pathnet, running, {name}": {"norm": e} for name, e in (("float32", 1e-7), ("bfloat16", 2e-3))
            }
        },
    )
    files = {
        "cpu/a-cpu-base-2026-01-01-0123456789.json": file,
        "cpu/b-2026-01-01-9876543210.json": {**file, "found": {**file["found"], "training": {}}},
    }
    place = "2 cores of an A CPU (base), `...2026-01-01-0123456789`"
    sums = processors.sums(files).splitlines()
    assert sums[0] == "| measured on | `running`, float32, 32 images | `batch`, bfloat16, 8 images |"
    assert sums[2] == f"| {place} | 3.5 s (0.5) | 1.75 s (0.25) |"
    lesions = processors.lesions(files).splitlines()
    assert lesions[2] == f"| {place} | 0.125 | 0.75 (2 of 6) |" and lesions[3].endswith("| 0.125 | not measured |")
    limits = "125 % | 2,000 ms (R² 0.9877) | 3,000 ms (R² 0.9877) | 6.5 MB (5 paths) | 1e-07; 0.002"
    assert processors.limits(files).splitlines()[2] == f"| {place} | {limits} |"
