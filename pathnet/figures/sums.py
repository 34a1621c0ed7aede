"""All 2^n paths by their lengths: what cancels in their sums, and what the sums have of the gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator
from rich.markup import escape
from rich.table import Table

from pathnet.experiments.comparison import Exact, Found, Means, Signed, path_counts
from pathnet.experiments.findings import cancelled
from pathnet.experiments.summary import percent
from pathnet.figures.gradients import measured, plot_signed
from pathnet.figures.style import (
    BLUE,
    DARK,
    GREY,
    LIGHT,
    MULTIPLIED,
    STYLES,
    headed,
    labelled,
    over_lengths,
    panels,
    saved,
    up_to_one,
)
from pathnet.intervals import no_interval

__all__ = ["figure_sums", "table_exact", "table_signed"]


def figure_sums(result: Found, exact: Exact, title: str, path_stem: str | Path) -> list[Path]:
    """(a) Norms of the exact sums by length beside the sums of norms, (b) cosines between the sums, and with the
    gradient, (c) how much of the gradient the lengths up to k explain; the gradient with frozen gates, where there
    are some.

    Returns:
        The files written: PNG and SVG.
    """
    figure, (sums, cosines, explained) = panels(f"{title}: {measured(result)}", 3)
    _draw_sums(sums, result, exact)
    _draw_cosines(cosines, result, exact)
    _draw_explained(explained, result, exact)
    for axes in (sums, cosines, explained):
        over_lengths(axes, result.n)
    return saved(figure, path_stem)


def _draw_sums(axes: Axes, result: Found, exact: Exact) -> None:
    headed(axes, "(a) all paths of a length: what cancels")
    axes.set_ylabel("norm")
    axes.set_yscale("log")
    lengths, counts = np.arange(result.n + 1), path_counts(result.n)
    if (sampled := result.sampled) is not None:
        shown = sampled.mean > 0
        total = counts[1:] * sampled.mean
        axes.plot(
            lengths[1:][shown],
            total[shown],
            "o-",
            color=BLUE,
            markersize=3.5,
            linewidth=1,
            label="sum of norms, sampled",
        )
    if result.signed is not None:
        plot_signed(axes, result.signed, result.signed.total[1:], f"paths {MULTIPLIED} root mean square")
        random = np.sqrt(counts) * result.signed.rms
        shown = random > 0
        axes.plot(lengths[shown], random[shown], "-.", color=GREY, linewidth=1, label="sum, were directions random")
    shown = exact.norm.mean > 0
    axes.plot(
        lengths[shown],
        exact.norm.mean[shown],
        "^:",
        color=DARK,
        markersize=4,
        linewidth=1,
        label="norm of the sum, exact",
    )
    axes.axhline(exact.full_norm, color=DARK, linewidth=0.8, label=f"norm of {result.gradient}")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    if (among := cancelled(result)) is not None:
        labelled(
            axes,
            f"lengths {among.first} to {among.last}: norms add up to\n"
            f"{among.least:.3g} to {among.most:.3g} times the norm of the sum",
        )
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.15)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def _draw_cosines(axes: Axes, result: Found, exact: Exact) -> None:
    headed(axes, "(b) directions of the sums")
    lengths = np.arange(len(exact.norm.mean))
    series = (
        (lengths[:-1] + 0.5, exact.next_cosine, "between neighbouring lengths"),
        (lengths, exact.full_cosine, f"with {result.gradient}"),
    )
    for (where, means, label), (colour, line, marker) in zip(series, STYLES, strict=False):
        _band(axes, where, means)
        axes.plot(where, means.mean, marker + line, color=colour, markersize=3.5, linewidth=1, label=label)
    axes.axhline(0, color=DARK, linewidth=0.8)
    drawn = np.isfinite([exact.next_cosine.low[0], *exact.full_cosine.low]).any()
    axes.set_ylabel(f"cosine ({'shaded: 95 % interval' if drawn else no_interval(exact.batches, 'batch')})")
    axes.set_ylim(min(-0.1, axes.get_ylim()[0]), 1.35)
    axes.yaxis.set_major_locator(FixedLocator([tenth / 10 for tenth in range(-10, 11, 2)]))
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_explained(axes: Axes, result: Found, exact: Exact) -> None:
    headed(axes, f"(c) {result.gradient.removeprefix('the ')} by lengths up to k")
    n = len(exact.norm.mean) - 1
    lengths = np.arange(n + 1)
    series = (
        (exact.explained, "share explained"),
        (exact.left, "share of the norm left"),
    )
    for (means, label), (colour, line, marker) in zip(series, STYLES, strict=False):
        _band(axes, lengths, means)
        axes.plot(lengths, means.mean, marker + line, color=colour, markersize=3.5, linewidth=1, label=label)
    held = np.cumsum(path_counts(n)) / 2**n
    axes.plot(lengths, held, ":", color=DARK, linewidth=1.2, label="share of all paths")
    up_to_one(axes, 1.4)
    low, high = (float(np.concatenate([own.mean for own, _ in series]).take(0)), exact.explained.mean.max())
    axes.set_ylim(min(0.0, low, exact.explained.mean.min()), max(1.4, 1.3 * high))
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _band(axes: Axes, where: np.ndarray, means: Means) -> None:
    if np.isfinite(means.low).any():
        axes.fill_between(where, means.low, means.high, color=LIGHT, linewidth=0)


def table_exact(result: Found, exact: Exact, title: str) -> Table:
    """The exact sums, one row a length; 80 columns wide.

    After the norm of a sum its share of the sum of the norms of its paths; the cosines with the next sum and with all
    of them together (`Found.gradient`); the share of those that it explains, and those up to it; and what is left of
    their norm.
    """
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for heading in ("length", "norm", "of norms", "cos next", "cos full", "share", "up to it", "left"):
        table.add_column(heading, justify="right")
    for k in range(result.n + 1):
        ratio = result.cancelling.mean[k - 1] if result.cancelling is not None and k else np.nan
        after = exact.next_cosine.mean[k] if k < result.n else np.nan
        table.add_row(
            str(k),
            f"{exact.norm.mean[k]:.2e}",
            "-" if np.isnan(ratio) else percent(ratio),
            _number(after, ".2f"),
            _number(exact.full_cosine.mean[k], ".2f"),
            _signed_percent(exact.share.mean[k]),
            _signed_percent(exact.explained.mean[k]),
            _signed_percent(exact.left.mean[k]),
        )
    return table


def table_signed(result: Found, signed: Signed, title: str) -> Table:
    """The signed draws, one row a length; 80 columns wide.

    After the root of the mean square the relative standard error of the mean square, what tells whether it can be
    trusted, and the relative standard deviations of the square of a single sampled path's norm, and of a draw.
    """
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for heading in (
        "length",
        "rms norm",
        "error",
        "k-hat",
        "aligned",
        "trusted",
        "path varies",
        "draw varies",
    ):
        table.add_column(heading, justify="right")
    judgement = signed.judgement
    for k in range(result.n + 1):
        paths, draws = (
            (result.cost.sampled[k - 1], result.cost.signed[k - 1]) if result.cost is not None and k else [np.nan] * 2
        )
        table.add_row(
            str(k),
            f"{signed.rms[k]:.2e}",
            _number(judgement.error[k], ".2g"),
            _number(judgement.tail[k], ".2f"),
            _number(judgement.aligned[k], ".2g"),
            "yes" if judgement.trusted[k] else "no",
            _number(paths, ".2g"),
            _number(draws, ".2g"),
            style="" if judgement.trusted[k] else "dim",
        )
    return table


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else f"{value:{form}}".replace("inf", "\N{INFINITY}")


def _signed_percent(share: float) -> str:
    return f"{100 * share:.1f} %"
