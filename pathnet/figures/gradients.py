"""Figure 6: path lengths, the gradient by length, and their product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from rich.markup import escape
from rich.table import Table

from pathnet.experiments.summary import Summary, percent
from pathnet.figures.style import BLUE, DARK, LIGHT, headed, in_percent, labelled, over_lengths, panels, saved

__all__ = ["figure_6", "table_6"]


def figure_6(summary: Summary, title: str, path_stem: str | Path) -> list[Path]:
    """Figure 6 of the paper: (a) how many paths there are of each length, (b) how much gradient one carries, (c)
    the product of the two.

    Args:
        title: data set and network, written above the panels.
        path_stem: where to write, without suffix.

    Returns:
        The files written: PNG and SVG.
    """
    heading = f"{title}: {summary.measurements:,} path gradients on {summary.batches:,} batches"
    figure, (distribution, magnitude, product) = panels(heading, 3)
    _draw_distribution(distribution, summary)
    _draw_magnitude(magnitude, summary)
    _draw_product(product, summary)
    for axes in (distribution, magnitude, product):
        over_lengths(axes, summary.n)
    return saved(figure, path_stem)


def _lengths(summary: Summary) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(1, summary.n + 1)


def _draw_distribution(axes: Axes, summary: Summary) -> None:
    lengths, central = _lengths(summary), summary.central
    inside = (lengths >= central.first) & (lengths <= central.last)
    axes.bar(lengths, summary.share, 0.8, color=np.where(inside, BLUE, LIGHT).tolist())
    headed(axes, "(a) distribution of path length")
    axes.set_ylabel("share of all paths")
    in_percent(axes)
    labelled(axes, f"lengths {central.first} to {central.last}\n(dark) hold {percent(central.paths)}\nof all paths")


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
    headed(axes, "(b) gradient magnitude by path length")
    axes.set_ylabel("norm of the path gradient")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_product(axes: Axes, summary: Summary) -> None:
    effective = summary.effective
    axes.axvspan(effective.first - 0.5, effective.last + 0.5, color=LIGHT, linewidth=0)
    axes.bar(_lengths(summary), summary.product, 0.8, color=BLUE)
    headed(axes, "(c) total gradient magnitude: (a) \N{MULTIPLICATION SIGN} (b)")
    axes.set_ylabel("share of the total")
    in_percent(axes)
    labelled(
        axes,
        f"effective paths:\nlengths {effective.first} to {effective.last}\n"
        f"hold {percent(effective.gradient)} of it,\nand {percent(effective.paths)}\nof all paths",
    )


def table_6(summary: Summary, title: str) -> Table:
    """The numbers of Figure 6, one row a length, the effective paths in bold; 80 columns wide."""
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
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
