"""Figures of every experiment: what they say, where things stand, and files that are written whole."""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from helpers.full_disk import largest_file
from helpers.runs import one_of_each, write_run
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from pathnet.experiments import by_size, highway, lesion_single
from pathnet.experiments.comparison import Comparison
from pathnet.experiments.summary import Summary, summarise
from pathnet.figures import (
    figure_6,
    figure_depth,
    figure_sums,
    gates,
    lesions,
    style,
    table_6,
    table_exact,
    table_signed,
)
from pathnet.paper import EXPERIMENTS, draw
from pathnet.results import Measurements, Run


def summary_of(norms: NDArray[np.float64]) -> Summary:
    """Return the summary of norms [batches, n]."""
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
    """Return the text of the SVG, which matplotlib leaves in comments beside the glyphs."""
    svg = figure_6(Comparison(summary.n, summary), "a data set, a network", folder / "figure")[1].read_text()
    return "\n".join(line.strip() for line in svg.splitlines() if "<!--" in line)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda result: figure_6(7, "t"), "results: expected a run of path-gradients, .*, got 7"),
        (lambda result: figure_6("run", "t"), "run: expected the folder of a run, got run, .*"),
        (lambda result: figure_6(result, 7), "title: expected a string, got 7"),
        (lambda result: figure_sums(result, "t"), "results: expected exact sums, got none"),
        (lambda result: figure_6(Comparison(54), "t"), "results: expected sampled paths or signed draws, got .*"),
        (lambda result: table_6(result, "t"), "summary: expected Summary, .*, got a Comparison"),
        (lambda result: table_exact(result, result.exact, "t"), "exact: expected Exact, .*, got None"),
        (lambda result: table_signed(result, result.signed, "t"), "signed: expected Signed, .*, got None"),
        (lambda result: figure_depth(7, "t"), "results: expected a list of Depths, .*, got 7"),
        (lambda result: figure_depth([], "t"), "results: expected a measured depth, got none"),
    ],
)
def test_a_result_of_another_kind_is_named(call: Callable[[Comparison], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        call(Comparison(54, exponential()))


def test_it_draws_a_png_and_an_svg(tmp_path: Path) -> None:
    png, svg = figure_6(Comparison(54, exponential()), "a data set, a network", tmp_path / "figure.6")
    assert (png.name, svg.name) == ("figure.6.png", "figure.6.svg")
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and struct.unpack(">II", header[16:24]) == (2200, 740)
    assert "</svg>" in svg.read_text()


def test_it_says_what_it_shows(tmp_path: Path) -> None:
    summary = exponential()
    text = text_of(summary, tmp_path)
    assert "a data set, a network: 540 path gradients on 10 batches" in text
    assert f"{summary.decay[0]:.3g} per module" in text and "5th to 95th percentile" in text
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
    figure_6(Comparison(54, exponential()), "title", tmp_path / "figure")
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


# Figures of every experiment

WORDS = {
    "unraveled": ["a residual network of three blocks, and its unraveled view", "half of the paths remain"],
    "lesion-single": [
        "deleted block (vgg: layer)",
        "test error",
        "residual",
        "vgg: layer 0 cannot be deleted",
        "chance",
    ],
    "lesion-many": [
        "deleted modules",
        "valid paths",
        "no lesion",
        "chance",
        ": 2 draws per size",
        "no interval: 2 values",
    ],
    "lesion-reorder": ["Kendall's tau with the order of training", "test error", ": 4 draws per size, 1 to 3 swaps"],
    "path-gradients": ["path length (modules)", ": 30 path gradients on 5 batches", "0.3 per module"],
    "effective-training": ["2 of 4,", "scaled by k/n", "recalibrated", "3 networks each", "drawn, 2000 steps"],
    "remaining-paths": ["54 blocks", "1 deleted (equation 8)", "20 deleted (equation 8)", "drawn at random"],
    "lesion-stochastic-depth": ["stochastic depth", "deleted block", "(b) paths trained by stochastic depth"],
    "highway": ["openness t (1: only the module)", "module, t f", "(d) along paths with frozen gates"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {run.experiment: run for run in one_of_each(tmp_path_factory.mktemp("study"), HOSTILE)}


HOSTILE = r"one $\foo$ <b> & -- two"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_drawn_as_png_and_svg(runs: dict[str, Run], name: str) -> None:
    files = draw(runs[name])
    assert [file.suffix for file in files] == [".png", ".svg"] * (2 if name == "unraveled" else 1)
    assert all(file.parent == runs[name].folder / "figures" for file in files)
    text = ""
    for png, svg in zip(files[::2], files[1::2], strict=True):
        with Image.open(png) as image:
            width, height = image.size
            pixels = np.asarray(image.convert("L"))
        assert 1000 <= width <= 2500 and 700 <= height <= 1600
        ink = (pixels < 250).mean(axis=1), (pixels < 250).mean(axis=0)
        assert 0.005 < (pixels < 250).mean() < 0.5
        assert all((half > 0).any() for share in ink for half in np.array_split(share, [len(share) // 2]))
        ElementTree.parse(svg)
        text += html.unescape("\n".join([*re.findall(r"<!-- (.*?) -->", svg.read_text(), re.S), ""]))
    text = " ".join(text.split())
    for word in WORDS[name]:
        assert word in text, word
    if runs[name].identity.get("networks") or name == "path-gradients":
        assert HOSTILE.replace("--", "- -") in text, "the data set is named"
        assert "blocks" in text


def test_a_figure_drawn_twice_is_the_same_file(runs: dict[str, Run]) -> None:
    first = [file.read_bytes() for file in draw(runs["lesion-single"])]
    assert [file.read_bytes() for file in draw(runs["lesion-single"])] == first


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure_that_a_full_disk_does_not_take_leaves_the_one_of_before(tmp_path: Path, suffix: str) -> None:
    files = style.saved(Figure(), tmp_path / "figure")
    before = [file.read_bytes() for file in files]
    sizes = [len(content) for content in before]
    figure = Figure()
    figure.text(0.1, 0.5, "words" * 20)
    size = 1000 if suffix == "png" else max(30_000, sizes[0])
    if suffix == "svg":
        for number in range(300):
            figure.text(0.1, 0.5, f"{number}" * 20)
    with largest_file(size), pytest.raises(OSError) as failure:
        style.saved(figure, tmp_path / "figure")
    assert str(failure.value) == (
        f"figure: {tmp_path / 'figure'}.{suffix} cannot be written (File too large); the measurements are on the "
        "disk, and the figure can be drawn again"
    )
    assert sorted(tmp_path.iterdir()) == files
    position = ["png", "svg"].index(suffix)
    assert files[position].read_bytes() == before[position]


def test_a_run_of_no_known_experiment_or_without_measurements_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is of 'alchemy'; expected one of unraveled, lesion-single"):
        draw(write_run(tmp_path / "a", "alchemy", {}, []))
    with pytest.raises(ValueError, match="is not complete"):
        draw(write_run(tmp_path / "b", "lesion-many", {"residual": (3, ())}, []))


def luminance(colour: str) -> float:
    """Return the luminance in [0, 1] that a grey printer shows (Rec. 601)."""
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_what_is_compared_is_told_apart_without_colour() -> None:
    colours, lines, markers = zip(*style.STYLES, strict=True)
    assert len(set(lines)) == len(set(markers)) == len(style.STYLES)
    greys = sorted(luminance(colour) for colour in (*colours[:3], style.LIGHT))
    assert min(np.diff([0.0, *greys, 1.0])[1:-1]) > 0.15 and greys[-1] < 0.9
    assert set(colours[:3]) == {style.BLUE, style.MIDDLE, style.DARK}
    assert all(luminance(colour) < 0.6 for colour in colours), "seen on white"


# What is where


def test_single_deletions_are_drawn_at_their_blocks(runs: dict[str, Run]) -> None:
    deletions = lesion_single.summarise(runs["lesion-single"])
    _, (axes,) = style.panels("", 1)
    lesions.draw_single(axes, deletions)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn["residual"] == [[i, rate] for i, rate in enumerate([0.12, 0.21, 0.5, 0.11, 0.4, 0.1])]
    assert drawn["vgg"] == [[i + 1, rate] for i, rate in enumerate([0.9, 0.85, 0.9, 0.91])]
    assert drawn["downsampling (or pooling) block"] == [[2, 0.5], [4, 0.4]] and drawn["_"] == [[2, 0.85]]
    assert {y for _, y in drawn["chance"]} == {0.9}
    bars = [segment for bar in axes.collections for segment in bar.get_segments()]
    assert [bar[0][0] for bar in bars] == [*range(6), *range(1, 5)]
    assert all(
        low[1] < rate < high[1]
        for (low, high), (_, rate) in zip(bars, [*drawn["residual"], *drawn["vgg"]], strict=True)
    )
    assert axes.get_xlim()[1] > 5 and axes.get_ylim()[0] == 0


def test_boxes_stand_at_what_they_are_of(
    runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(lesions, "saved", lambda figure, stem: kept.append(figure) or [])
    many = by_size.summarise(runs["lesion-many"])
    lesions.figure_5a(many, "", tmp_path)
    deleted, valid = kept[0].axes
    medians = sorted(tuple(map(float, line.get_xydata().mean(0))) for line in deleted.get_lines() if is_median(line))
    assert medians == [pytest.approx(point) for point in [(1, 0.13), (2, 0.21), (3, 0.29), (4, 0.39)]]
    mean = next(line for line in valid.get_lines() if line.get_label() == "mean error").get_xydata()
    assert mean[:, 0].tolist() == [5, 4, 3, 2] and mean[:, 1].tolist() == pytest.approx(
        [error.mean for error in many.means]
    )
    intact = next(line for line in valid.get_lines() if line.get_label() == "no block deleted").get_xydata()
    assert intact.tolist() == [[6, 0.1]] and valid.xaxis_inverted()
    reordered = by_size.summarise(runs["lesion-reorder"])
    lesions.figure_5b(reordered, "", tmp_path)
    (axes,) = kept[1].axes
    medians = [tuple(map(float, line.get_xydata().mean(0))) for line in axes.get_lines() if is_median(line)]
    groups = by_size.by_tau(reordered)
    expected = [(tau.mean(), float(np.median(rates))) for tau, rates in zip(groups.tau, groups.rates, strict=True)]
    assert medians == [pytest.approx(point) for point in expected] and axes.xaxis_inverted()


def is_median(line: Line2D) -> bool:
    return line.get_color() == style.DARK and len(line.get_xdata()) == 2 and line.get_label() != "no lesion"


def test_the_parts_of_the_gradient_fill_a_bar(runs: dict[str, Run]) -> None:
    summary = highway.summarise(runs["highway"])
    _, (axes,) = style.panels("", 1)
    gates._draw_parts(axes, summary)
    tops = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    np.testing.assert_allclose(tops, np.repeat([(0, 0.5), (0.5, 0.8), (0.8, 1)], 3, axis=0))
