"""Bars and figures in the cells of a notebook, seen through a real kernel."""

from __future__ import annotations

import re
import struct
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
pytest.importorskip("nbclient")

import nbformat
from helpers.notebooks import executed
from nbclient import NotebookClient


class Watching(NotebookClient):
    """A client that keeps every update of an output."""

    def process_message(self, message: Any, cell: Any, cell_index: int) -> Any:
        if message["header"]["msg_type"] == "update_display_data":
            self.updates = [*getattr(self, "updates", []), message["content"]["data"]["text/plain"]]
        return super().process_message(message, cell, cell_index)


CELLS = """
import time
from pathnet.progress import reporter

with reporter("slow & <b>bold</b>") as progress:
    for done in range(1, 5):
        time.sleep(0.12)
        progress(done, 4, f"loss {done}")
---
with reporter("quick") as progress:
    for done in range(10_000):
        progress(done + 1, 10_000, "steps")
---
with reporter("nothing to do"):
    pass
---
try:
    with reporter("interrupted") as progress:
        progress(1, 2, "steps")
        progress(1, 0, "of an unknown number")
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
---
import subprocess, sys
code = "from pathnet import progress\\nwith progress.reporter('elsewhere') as show: show(1, 1, 'steps')"
ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
print(ran.stdout + ran.stderr, "rich" in sys.modules)
---
import contextlib, multiprocessing, pathlib

def work(file):
    print("a print of a fork makes it the process of the kernel's session", flush=True)
    with open(file, "w") as lines, contextlib.redirect_stderr(lines), reporter("forked") as show:
        show(1, 1, "steps")

fork = multiprocessing.get_context("fork").Process(target=work, args=("forked.txt",))
fork.start()
fork.join(60)
pathlib.Path("forked.txt").read_text()
---
from pathnet.effective_depth import Depth
from pathnet.figures import figure_depth

rows = [Depth(step, 2.0, 1, 3, 2, 0.5, 0.1) for step in (0, 100)]
figure_depth(rows, "a training")
---
import matplotlib.pyplot as plt

figure_depth(rows, "the same, with pyplot")
---
[file.name for file in figure_depth(rows, "in files", "depth")]
"""
"""Cells between dashes, which run in one kernel."""


@dataclass
class Ran:
    """Outputs of the cells, as a reader sees them.

    Attributes:
        outputs: the outputs of each cell.
        updates: the texts of all updates of outputs.
        folder: the folder that the cells ran in.
    """

    outputs: list[list[Any]]
    updates: list[str]
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("cells")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.strip().split("\n---\n")]
    client = executed(nbformat.v4.new_notebook(cells=cells), folder, Watching)
    return Ran([cell.outputs for cell in client.nb.cells], getattr(client, "updates", []), folder)


def data_of(outputs: list[Any]) -> dict[str, str]:
    (output,) = outputs
    assert output.output_type in ("display_data", "execute_result")
    return dict(output.data)


def test_a_bar_moves_in_the_output_of_its_cell(ran: Ran) -> None:
    data = data_of(ran.outputs[0])
    assert data["text/plain"] == "slow & <b>bold</b>: 4/4 loss 4"
    assert "slow &amp; &lt;b&gt;bold" in data["text/html"] and '<progress value="4" max="4"' in data["text/html"]
    moved = [text for text in ran.updates if text.startswith("slow")]
    assert len(moved) == 5 and moved[0] == "slow & <b>bold</b>: 1/4 loss 1"
    assert re.fullmatch(r"slow & <b>bold</b>: 2/4 loss 2, [\d.]+/s, 0:0\d left", moved[1])


def test_a_quick_job_sends_few_messages_and_shows_its_end(ran: Ran) -> None:
    assert data_of(ran.outputs[1])["text/plain"] == "quick: 10000/10000 steps"
    assert len([text for text in ran.updates if text.startswith("quick")]) < 1000


def test_a_job_that_reports_nothing_leaves_no_moving_bar(ran: Ran) -> None:
    data = data_of(ran.outputs[2])
    assert data["text/plain"] == "nothing to do" and "<progress" not in data["text/html"]


def test_an_interrupted_job_shows_how_far_it_came(ran: Ran) -> None:
    assert data_of(ran.outputs[3])["text/plain"] == "interrupted: 1/0 of an unknown number"


def test_a_process_that_a_notebook_starts_writes_lines(ran: Ran) -> None:
    (printed,) = ran.outputs[4]
    assert printed.text == "elsewhere: 1/1 steps\n False\n"


def test_a_process_that_a_notebook_forks_writes_lines(ran: Ran) -> None:
    (result,) = (output for output in ran.outputs[5] if output.output_type == "execute_result")
    assert result.data["text/plain"] == r"'forked: 1/1 steps\n'"


def test_a_figure_is_shown_with_and_without_pyplot(ran: Ran) -> None:
    alone, with_pyplot, files = ran.outputs[6:]
    for outputs in (alone, with_pyplot):
        width, height = struct.unpack(">II", b64decode(data_of(outputs)["image/png"])[16:24])
        assert width > 2 * height > 0
    assert alone[0].metadata["image/png"] == {"width": 792, "height": 266}
    assert data_of(files)["text/plain"] == "['depth.png', 'depth.svg']"
    assert (ran.folder / "depth.png").exists()
