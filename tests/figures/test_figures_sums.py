"""Figures and tables of exact sums and signed draws: what they say, where things stand, and what is not trusted."""

from __future__ import annotations

import html
import re
from math import comb
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import gradient_run
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from pathnet import results
from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.comparison import Comparison, compare
from pathnet.experiments.findings import findings_of
from pathnet.figures import figure_sums, style, table_exact, table_signed
from pathnet.figures.gradients import plot_signed
from pathnet.paper import draw
from pathnet.report import write

N = 12
RATE = 0.25
BATCHES = 40


def rows(batches: int = BATCHES) -> tuple[list[ExactSum], list[SignedDraw]]:
    """Return sums a third as long as the sums of norms, and draws with heavy tails at even lengths from 4."""
    rng = np.random.default_rng(0)
    exact, signed = [], []
    counts = np.array([comb(N, k) for k in range(N + 1)])
    share = counts * RATE ** np.arange(N + 1) / (1 + RATE) ** N
    for batch in range(batches):
        size = 1 + 0.2 * (-1) ** batch
        for k in range(N + 1):
            norm = size / 3 * counts[k] * RATE**k
            after = 0.9 - 0.01 * k if k < N else np.nan
            exact.append(ExactSum(batch, k, norm, after, 0.5, share[k], 1 - share[: k + 1].sum(), 3.0, "cpu"))
            spread = rng.pareto(0.3) if k >= 4 and k % 2 == 0 else rng.uniform(0.9, 1.1)
            signed.append(SignedDraw(batch, 0, k, size**2 * counts[k] * RATE ** (2 * k) * spread, "cpu"))
    return exact, signed


def norms() -> NDArray[np.float64]:
    return np.tile(RATE ** np.arange(1.0, N + 1), (BATCHES, 1))


def run_of(folder: Path, sampled: bool, exact: bool, signed: bool) -> results.Run:
    run = gradient_run(folder, norms() if sampled else np.empty((0, N)), "a $data$ set")
    for of_method, wanted in zip(rows(), (exact, signed), strict=True):
        run.add_rows(of_method if wanted else [])
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    return run_of(tmp_path_factory.mktemp("run"), True, True, True)


@pytest.fixture(scope="module")
def result(run: results.Run) -> Comparison:
    return compare(run)


def words(svg: Path) -> str:
    return " ".join(html.unescape("\n".join(re.findall(r"<!-- (.*?) -->", svg.read_text(), re.S))).split())


@pytest.mark.parametrize("parts", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_every_mixture_of_methods_is_drawn(parts: tuple[int, int, int], tmp_path: Path) -> None:
    sampled, exact, signed = map(bool, parts)
    files = draw(run_of(tmp_path, sampled, exact, signed))
    names = (["figure-6"] if sampled or signed else []) + (["exact-sums"] if exact else [])
    assert [file.name for file in files] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    for png, svg in zip(files[::2], files[1::2], strict=True):
        with Image.open(png) as image:
            assert image.size == (2200, 740)
        text = words(svg)
        assert ("480 path gradients on 40 batches" in text) == sampled and "40 batches" in text
        assert ("signed draws" in text) == signed and ("exact sums on 40" in text) == exact
        if svg.stem == "figure-6":
            assert ("norm of exact sum" in text) == exact and ("root mean square, signed" in text) == signed
            assert ("effective paths" in text) == sampled


def test_intervals_lie_within_what_was_measured(run: results.Run, result: Comparison) -> None:
    assert result.exact is not None and result.exact.batches == 40
    rows = run.rows(ExactSum)
    for k in range(result.n + 1):
        norms, means = [row.norm for row in rows if row.length == k], result.exact.norm
        assert min(norms) < means.low[k] < means.mean[k] < means.high[k] < max(norms)


def test_what_is_not_to_be_trusted_is_marked(result: Comparison) -> None:
    assert result.signed is not None
    trusted = result.signed.judgement.trusted[1:]
    assert trusted[[0, 2, 4, 6, 8, 10]].all() and not trusted[[3, 5, 7, 9, 11]].any()
    _, (axes,) = style.panels("", 1)
    plot_signed(axes, result.signed, result.signed.rms[1:], "trusted")
    line, full, empty = axes.get_lines()
    for marks, mask in ((full, trusted), (empty, ~trusted)):
        np.testing.assert_array_equal(marks.get_xdata(), np.flatnonzero(mask) + 1)
        np.testing.assert_array_equal(marks.get_ydata(), result.signed.rms[1:][mask])
    assert (full.get_markerfacecolor(), empty.get_markerfacecolor()) == (style.MIDDLE, "white")
    assert empty.get_label() == "not to be trusted" and len(line.get_xdata()) == N


def test_the_panels_show_what_was_measured(
    result: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pathnet.figures.sums as sums

    kept = []
    monkeypatch.setattr(sums, "saved", lambda figure, stem: kept.append(figure) or [])
    exact = result.exact
    assert exact is not None and result.sampled is not None and result.signed is not None
    figure_sums(result, "title", tmp_path / "figure")
    sizes, cosines, explained = (
        {line.get_label(): line.get_xydata().T for line in axes.get_lines()} for axes in kept[0].axes
    )
    lengths, counts = np.arange(N + 1), np.array([float(comb(N, k)) for k in range(N + 1)])
    expected = {
        "sum of norms, sampled": (lengths[1:], counts[1:] * result.sampled.mean),
        "sum if directions were random": (lengths, np.sqrt(counts) * result.signed.rms),
        "norm of the sum, exact": (lengths, exact.norm.mean),
        "between neighbouring lengths": (lengths[:-1] + 0.5, exact.next_cosine.mean),
        "with the gradient": (lengths, exact.full_cosine.mean),
        "share explained": (lengths, exact.share.mean.cumsum()),
        "share of the norm left": (lengths, exact.left.mean),
        "share of all paths": (lengths, counts.cumsum() / 2**N),
    }
    drawn = {**sizes, **cosines, **explained}
    for label, data in expected.items():
        np.testing.assert_allclose(drawn[label], data, err_msg=label)
    assert set(drawn["norm of the gradient"][1]) == {exact.full_norm}
    (annotation,) = (text.get_text() for text in kept[0].axes[0].texts)
    effective = result.sampled.effective
    assert annotation == (
        f"lengths {effective.first} to {effective.last}: norms add up to\n3 to 3 times the norm of the sum"
    )
    for axes in kept[0].axes:
        bottom, top = axes.get_ylim()
        for line in axes.get_lines():
            assert (line.get_ydata() >= bottom).all() and (line.get_ydata() <= top).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 60])
def test_awkward_runs_are_drawn_and_tabled(n: int, tmp_path: Path) -> None:
    """One batch, one block; sums from 1 down to 1e-240; a length that vanishes; shares that exceed one."""
    run = gradient_run(tmp_path, 10.0 ** (-4 * np.arange(1.0, n + 1))[None])
    norm = [10.0 ** (-4 * k) if k != 1 else 0.0 for k in range(n + 1)]
    share = [1.4, 0.0, *[-0.4 / max(n - 1, 1)] * (n - 1)]
    run.add_rows([ExactSum(0, k, length, np.nan, np.nan, share[k], 0.4, 1.0, "cpu") for k, length in enumerate(norm)])
    run.add_rows([SignedDraw(0, 0, k, length**2, "cpu") for k, length in enumerate(norm)])
    draw(run)
    for line in (*tabled(compare(run)), *findings_of(compare(run))):
        assert "nan" not in line


def tabled(result: Comparison, width: int = 120) -> list[str]:
    assert result.exact is not None and result.signed is not None
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table_exact(result, result.exact, "exact"))
        console.print(table_signed(result, result.signed, "signed"))
    return captured.get().splitlines()


def test_the_tables_have_a_row_a_length_and_fit_a_terminal(result: Comparison) -> None:
    exact, signed, cost = result.exact, result.signed, result.cost
    assert exact is not None and signed is not None and cost is not None and result.cancelling is not None
    lines = tabled(result, width=80)
    assert len(lines) == 2 * (N + 3) and max(map(len, lines)) <= 80
    row = lines[2 + 5].split()
    row = [word for word in row if word != "%"]
    assert row[0] == "5" and float(row[1]) == pytest.approx(exact.norm.mean[5], rel=1e-2)
    assert (
        float(row[2]) == pytest.approx(100 * result.cancelling.mean[4], rel=1e-2)
        and row[3] == f"{exact.next_cosine.mean[5]:.2f}"
    )
    row, heavy = lines[N + 3 + 2 + 5].split(), lines[N + 3 + 2 + 6].split()
    assert float(row[1]) == pytest.approx(signed.rms[5], rel=1e-2) and row[5] == "yes" and heavy[5] == "no"
    assert float(row[3]) == pytest.approx(signed.judgement.tail[5], abs=0.01)
    assert [float(word) for word in row[6:]] == pytest.approx([cost.sampled[4], cost.signed[4]], rel=0.05)


def test_the_page_shows_the_figure_and_the_claim(run: results.Run, tmp_path: Path) -> None:
    page = write([run], "title", tmp_path / "report.html").read_text()
    assert 'alt="figure-6"' in page and 'alt="exact-sums"' in page
    assert page.count("Almost all of the gradient comes from short paths.") == 2
