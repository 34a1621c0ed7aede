"""Summaries in, figures and tables out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from rich.table import Table

from pathnet.experiments.summary import Summary, percent

__all__ = ["figure_6", "table_6"]

DARK, BLUE, LIGHT = "#222222", "#1f5a94", "#c9d9ea"
DOTS_PER_INCH = 200


def figure_6(summary: Summary, title: str, path_stem: str | Path) -> list[Path]:
    """Figure 6 of the paper: (a) how many paths there are of each length, (b) how much gradient one carries, (c)
    the product of the two.

    Args:
        title: data set and network, written above the panels.
        path_stem: where to write, without suffix.

    Returns:
        The files written: PNG and SVG.
    """
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    distribution, magnitude, product = figure.subplots(1, 3)
    _draw_distribution(distribution, summary)
    _draw_magnitude(magnitude, summary)
    _draw_product(product, summary)
    for axes in (distribution, magnitude, product):
        axes.set_xlabel("path length (modules)", fontsize=9)
        axes.yaxis.label.set_fontsize(9)
        axes.set_xlim(0, summary.n + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle(
        f"{title}: {summary.measurements:,} path gradients on {summary.batches:,} batches", fontsize=10, color=DARK
    )
    files = [Path(f"{path_stem}.{suffix}") for suffix in ("png", "svg")]
    figure.savefig(files[0], dpi=DOTS_PER_INCH)
    figure.savefig(files[1], metadata={"Date": None})
    return files


def _lengths(summary: Summary) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(1, summary.n + 1)


def _draw_distribution(axes: Axes, summary: Summary) -> None:
    lengths, central = _lengths(summary), summary.central
    inside = (lengths >= central.first) & (lengths <= central.last)
    axes.bar(lengths, summary.share, 0.8, color=np.where(inside, BLUE, LIGHT).tolist())
    _title(axes, "(a) distribution of path length")
    axes.set_ylabel("share of all paths")
    _in_percent(axes)
    _label(axes, f"lengths {central.first} to {central.last}\n(dark) hold {percent(central.paths)}\nof all paths")


def _draw_magnitude(axes: Axes, summary: Summary) -> None:
    lengths = _lengths(summary)
    shown = summary.mean > 0
    floor = summary.quantile_05[summary.quantile_05 > 0].min(initial=summary.mean[shown].min())
    axes.set_yscale("log")
    axes.fill_between(
        lengths,
        np.maximum(summary.quantile_05, floor),
        np.maximum(summary.quantile_95, floor),
        color=LIGHT,
        linewidth=0,
        label="5 to 95 % of the paths",
    )
    zeros = f" ({summary.zeros} norms are 0: below the axis)" if summary.zeros else ""
    axes.plot(lengths[shown], summary.mean[shown], "o", color=BLUE, markersize=3, label=f"mean{zeros}")
    rate, low, high = summary.decay
    if np.isfinite(rate):
        interval = f" ({low:.3g} to {high:.3g})" if np.isfinite(low) else ""
        line = np.exp(summary.log_intercept + np.log(rate) * lengths)
        axes.plot(
            lengths,
            line,
            "--",
            color=DARK,
            linewidth=1,
            label=f"fit: \N{MULTIPLICATION SIGN} {rate:.3g} a module{interval}",
        )
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    _title(axes, "(b) gradient magnitude by path length")
    axes.set_ylabel("norm of the path gradient")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_product(axes: Axes, summary: Summary) -> None:
    effective = summary.effective
    axes.axvspan(effective.first - 0.5, effective.last + 0.5, color=LIGHT, linewidth=0)
    axes.bar(_lengths(summary), summary.product, 0.8, color=BLUE)
    _title(axes, "(c) total gradient magnitude: (a) \N{MULTIPLICATION SIGN} (b)")
    axes.set_ylabel("share of the total")
    _in_percent(axes)
    _label(
        axes,
        f"effective paths:\nlengths {effective.first} to {effective.last}\n"
        f"hold {percent(effective.gradient)} of it,\nand {percent(effective.paths)}\nof all paths",
    )


def _in_percent(axes: Axes) -> None:
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", pad=8)


def _label(axes: Axes, text: str) -> None:
    axes.text(0.98, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=8)


def table_6(summary: Summary, title: str) -> Table:
    """The numbers of Figure 6, one row a length, the effective paths in bold; 80 columns wide."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("length", "count", "paths", "mean norm", "95 % interval", "std", "product"):
        table.add_column(heading, justify="right")
    for k in np.flatnonzero(summary.count):
        low, high = summary.low[k], summary.high[k]
        table.add_row(
            str(k + 1),
            str(summary.count[k]),
            percent(summary.share[k]),
            f"{summary.mean[k]:.3e}",
            f"{low:.2e} to {high:.2e}" if np.isfinite(low) else "-",
            f"{summary.std[k]:.2e}" if np.isfinite(summary.std[k]) else "-",
            percent(summary.product[k]),
            style="bold" if summary.effective.first <= k + 1 <= summary.effective.last else "",
        )
    return table
