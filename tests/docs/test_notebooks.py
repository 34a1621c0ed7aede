"""Notebooks of the documentation: their stored outputs are true, and tell nothing of the machine they ran on."""

from __future__ import annotations

import copy
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
pytest.importorskip("nbclient")

import nbformat
from helpers.notebooks import FILES, cleaned, differences, executed, stored, traces, written
from nbclient.exceptions import CellExecutionError
from PIL import Image

LINES = 15
"""Lines of a cell that a reader takes in at once."""
MOST_BYTES = 500_000

named = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@named
def test_a_notebook_shows_what_it_shows_when_it_is_run(file: Path, tmp_path: Path) -> None:
    fresh = copy.deepcopy(before := stored(file))
    executed(fresh, tmp_path)
    assert not differences(before, fresh), "\n".join(differences(before, fresh))
    assert not traces(fresh), "\n".join(traces(fresh))


@named
def test_a_stored_notebook_is_clean(file: Path) -> None:
    notebook = stored(file)
    assert file.read_text() == written(cleaned(notebook, file.stem)), "store it by `make notebooks`"
    assert traces(notebook) == [] and file.stat().st_size < MOST_BYTES
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom"


@named
def test_a_notebook_tells_a_story(file: Path) -> None:
    notebook = stored(file)
    assert notebook.cells[0].source.startswith("# ") and notebook.cells[-1].cell_type == "markdown"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(cell.source.splitlines()) for cell in code) <= LINES
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(": False" in output.get("text", "") for output in outputs), "the text claims otherwise"
    assert any("<progress" in output.get("data", {}).get("text/html", "") for output in outputs)


def test_there_are_three_notebooks() -> None:
    assert {file.stem for file in FILES} == {"figure-6-in-five-minutes", "lesions", "whose-gradient-is-it"}


# The judgement of outputs


def shown(text: str = "", error: str = "", png: str = "", html: str = "", plain: str = "") -> Any:
    """Return a notebook of one cell with these outputs."""
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    outputs += [nbformat.v4.new_output("stream", name="stderr", text=error)] if error else []
    data = {"image/png": png, "text/html": html, "text/plain": plain}
    data = {form: value for form, value in data.items() if value}
    outputs += [nbformat.v4.new_output("display_data", data)] if data else []
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])


BAR = "<div>job <progress value='3' max='3'></progress></div>"


def figure(width: int = 800, data: tuple[int, int, int, int] | None = (100, 50, 300, 100)) -> str:
    """Return a PNG with grey axes and a blue box (left, top, right, bottom) for its data."""
    image = Image.new("RGB", (width, 150), "white")
    image.paste((90, 90, 90), (20, 140, width - 20, 142))
    if data:
        image.paste((31, 119, 180), data)
    image.save(file := BytesIO(), "PNG")
    return b64encode(file.getvalue()).decode()


FIGURE = figure()


def test_outputs_that_agree() -> None:
    assert differences(shown("loss 0.25\n"), shown("loss 0.2501\n")) == []
    assert differences(shown(png=FIGURE, plain="<Figure 1>"), shown(png=FIGURE, plain="<Figure 2>")) == []
    assert differences(shown(png=FIGURE), shown(png=figure(810, (130, 45, 350, 100)))) == []
    assert differences(shown(html=BAR, plain="job: 3/3 loss 1"), shown(html=BAR, plain="job: 3/3 loss 2")) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"text": "it holds: True"}, {"text": "it holds: False"}),
        ({"text": "1"}, {}),
        ({}, {"text": "1"}),
        ({"text": "1"}, {"text": "1", "error": "a warning"}),
        ({"png": FIGURE}, {"png": figure(width=900)}),
        ({"png": FIGURE}, {"png": figure(data=None)}),
        ({"png": FIGURE}, {"png": figure(data=(100, 50, 200, 100))}),
        ({"png": FIGURE}, {"png": figure(data=(100, 80, 300, 130))}),
        ({"png": FIGURE}, {"png": figure(data=(300, 50, 500, 100))}),
        ({"png": FIGURE}, {"plain": "<Figure>"}),
        ({"plain": "job: 3/3 loss 1"}, {"plain": "job: 3/3 loss 2"}),
        ({"html": BAR, "plain": "job: 3/3"}, {"html": BAR, "plain": "job: 2/3"}),
        ({"html": BAR, "plain": "job: 3/3"}, {}),
    ],
)
def test_outputs_that_differ(before: dict[str, str], after: dict[str, str]) -> None:
    assert differences(shown(**before), shown(**after))


@pytest.mark.parametrize(
    "seen", [{"text": "in /tmp/tmpa1/run"}, {"plain": "PosixPath('/home/me/a')"}, {"error": "a warning"}]
)
def test_traces_of_a_machine_are_seen(seen: dict[str, str]) -> None:
    assert traces(shown(**seen)) and not traces(shown("and/or, 3/3, https://arxiv.org/abs/1605.06431"))


def test_a_notebook_that_fails_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        executed(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path)
