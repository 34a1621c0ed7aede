from __future__ import annotations

import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from pathnet.experiments.summary import Summary, summarise
from pathnet.figures import figure_6, table_6
from pathnet.results import Measurements


def summary_of(norms: NDArray[np.float64]) -> Summary:
    """Of norms [batches, n]."""
    batches, n = norms.shape
    return summarise(
        Measurements(
            np.repeat(np.arange(batches, dtype=np.int32), n),
            np.tile(np.arange(1, n + 1, dtype=np.int16), batches),
            np.zeros((batches * n, n), np.uint8),
            norms.ravel(),
            ["cpu"] * norms.size,
        ),
        n,
    )


def exponential(n: int = 54, rate: float = 0.3, batches: int = 10) -> Summary:
    spread = np.random.default_rng(0).lognormal(sigma=0.3, size=(batches, n))
    return summary_of(spread * rate ** np.arange(1.0, n + 1))


def text_of(summary: Summary, folder: Path) -> str:
    """The words in the SVG, which matplotlib leaves in comments beside the glyphs."""
    svg = figure_6(summary, "a data set, a network", folder / "figure")[1].read_text()
    return "\n".join(line.strip() for line in svg.splitlines() if "<!--" in line)


def test_it_draws_a_png_and_an_svg(tmp_path: Path) -> None:
    png, svg = figure_6(exponential(), "a data set, a network", tmp_path / "figure.6")
    assert (png.name, svg.name) == ("figure.6.png", "figure.6.svg")
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and struct.unpack(">II", header[16:24]) == (2200, 740)
    assert "</svg>" in svg.read_text()


def test_it_says_what_it_shows(tmp_path: Path) -> None:
    summary = exponential()
    text = text_of(summary, tmp_path)
    assert "a data set, a network: 540 path gradients on 10 batches" in text
    assert f"{summary.decay[0]:.3g} a module" in text and "5 to 95 % of the paths" in text
    assert f"lengths {summary.effective.first} to {summary.effective.last}" in text
    assert "lengths 20 to 34" in text and "(dark) hold 96 %" in text
    assert all(f"({letter}) " in text for letter in "abc")


def test_zero_norms_are_told_in_the_legend(tmp_path: Path) -> None:
    norms = np.tile(0.5 ** np.arange(1.0, 9), (10, 1))
    assert "norms are 0" not in text_of(summary_of(norms), tmp_path)
    norms[:3, 4:] = 0
    assert "mean (12 norms are 0: below the axis)" in text_of(summary_of(norms), tmp_path)
    norms[:, 7] = 0
    assert "mean (19 norms are 0: below the axis)" in text_of(summary_of(norms), tmp_path)


@pytest.mark.parametrize(
    "norms",
    [
        np.ones((1, 1)),
        np.ones((3, 2)),
        10.0 ** -np.arange(1.0, 241)[None],
        np.tile(1e-200 * 0.9 ** np.arange(1.0, 55), (2, 1)),
    ],
    ids=["one block", "two blocks", "down to 1e-240", "all near 1e-200"],
)
@pytest.mark.filterwarnings("error")
def test_awkward_runs_are_drawn_and_tabled(norms: NDArray[np.float64], tmp_path: Path) -> None:
    text_of(summary_of(norms), tmp_path)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table_6(summary_of(norms), "title"))
    assert len(captured.get().splitlines()) == norms.shape[1] + 2 and "nan" not in captured.get()


def test_the_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = matplotlib.get_backend(auto_select=False), matplotlib.rcParams.copy()
    figure_6(exponential(), "title", tmp_path / "figure")
    assert (matplotlib.get_backend(auto_select=False), matplotlib.rcParams.copy()) == before


def test_the_table_has_a_row_a_length_and_fits_a_terminal() -> None:
    summary = exponential()
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table_6(summary, "title"))
    lines = captured.get().splitlines()
    assert len(lines) == 54 + 2 and max(map(len, lines)) <= 80
    row = lines[2 + 16].split()
    assert row[:2] == ["17", "10"] and float(row[4]) == pytest.approx(summary.mean[16], rel=1e-3)
