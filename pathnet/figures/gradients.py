"""Figure 6 and its table: path lengths, the gradient by length, and their product."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.markup import escape
from rich.table import Table

from pathnet import paths
from pathnet.experiments.comparison import Comparison, Signed
from pathnet.experiments.summary import MOST, Summary, central_run, percent
from pathnet.figures.sources import Source, comparison_of, heading_of, opened
from pathnet.figures.style import (
    BLUE,
    DARK,
    LIGHT,
    MIDDLE,
    MULTIPLIED,
    check_result,
    headed,
    in_percent,
    labelled,
    over_lengths,
    panels,
    saved,
)
from pathnet.intervals import no_interval
from pathnet.results import Measurements

__all__ = ["figure_6", "measured", "plot_signed", "table_6"]


@overload
def figure_6(
    results: Source | Comparison | Summary | Measurements, title: str | None = None, path_stem: None = None
) -> Figure: ...
@overload
def figure_6(
    results: Source | Comparison | Summary | Measurements, title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_6(
    results: Source | Comparison | Summary | Measurements,
    title: str | None = None,
    path_stem: str | Path | None = None,
) -> Figure | list[Path]:
    """Draw Figure 6 of the paper (section 5).

    The panels are (a) the number of paths of each length, (b) the gradient that one path carries, and (c) the product
    of the two. If signed draws and exact sums were measured, (c) shows what they give instead.

    Args:
        results: a run that holds sampled paths or signed draws, its folder, or its `Comparison` or `Summary`; or
            arrays by name: the ``length`` and the ``norm`` of each path gradient, and ``batch``, the number of its
            batch (by default one batch for all). Others are the number of ``blocks`` (by default the greatest
            length), ``exact`` sums (a `pathnet.LengthSums` for each batch, or the columns of a run's exact sums), and
            ``signed`` draws (the columns of a run's).
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> plan = pathnet.experiments.PathGradients(batches=12, batch_size=16)
        >>> run = pathnet.measure(net, data, plan, "run")
        >>> files = pathnet.figures.figure_6(run, path_stem="figure-6")
        >>> [file.name for file in files]
        ['figure-6.png', 'figure-6.svg']

        Norms that you measured yourself:

        >>> tape = pathnet.record(net, *data.random_batch(16, seed=0, batch=0))
        >>> b = pathnet.paths.enumerate_all(net.n)[1:]  # all but the one of length 0
        >>> norms = tape.path_gradient_norms(b)
        >>> figure = pathnet.figures.figure_6({"length": b.sum(1), "norm": norms})
        >>> figure.get_suptitle()
        '7 path gradients on 1 batch'
    """
    source = opened(results)
    comparison = comparison_of(source)
    if comparison.sampled is None and comparison.signed is None:
        raise ValueError("results: expected sampled paths or signed draws, got exact sums alone; see figure_sums")
    named = heading_of(source, title)
    figure, (distribution, magnitude, product) = panels(": ".join(filter(None, [named, measured(comparison)])), 3)
    _draw_distribution(distribution, comparison.n)
    headed(magnitude, "(b) gradient magnitude by path length")
    magnitude.set_ylabel("norm of the path gradient")
    magnitude.set_yscale("log")
    if comparison.sampled is not None:
        _draw_magnitude(magnitude, comparison.sampled)
    if comparison.signed is not None:
        plot_signed(magnitude, comparison.signed, comparison.signed.rms[1:], "root mean square, signed")
    magnitude.yaxis.set_major_locator(LogLocator(numticks=8))
    bottom, top = magnitude.get_ylim()
    magnitude.set_ylim(bottom, top * (top / bottom) ** 0.3)
    magnitude.legend(fontsize=8, frameon=False, loc="upper right")
    _draw_product(product, comparison)
    for axes in (distribution, magnitude, product):
        over_lengths(axes, comparison.n)
    return saved(figure, path_stem)


def measured(comparison: Comparison) -> str:
    """Return the number of measurements in words."""
    amounts = []
    if (sampled := comparison.sampled) is not None:
        amounts.append(f"{sampled.measurements:,} path gradients on {sampled.batches:,} {_batches(sampled.batches)}")
    if (signed := comparison.signed) is not None:
        amounts.append(f"{signed.judgement.draws:,} signed draws on {signed.batches:,}")
    if (exact := comparison.exact) is not None:
        amounts.append(f"exact sums on {exact.batches:,}")
    if comparison.sampled is None:
        amounts[0] += f" {_batches(first.batches)}" if (first := comparison.signed or comparison.exact) else ""
    return ", ".join(amounts)


def _batches(count: int) -> str:
    return "batch" if count == 1 else "batches"


def _draw_distribution(axes: Axes, n: int) -> None:
    lengths, share = np.arange(1, n + 1), paths.length_distribution(n).numpy()
    first, last = central_run(share, MOST)
    inside = (lengths >= first) & (lengths <= last)
    axes.bar(lengths, share[1:], 0.8, color=np.where(inside, BLUE, LIGHT).tolist())
    headed(axes, "(a) distribution of path length")
    axes.set_ylabel("share of all paths")
    in_percent(axes)
    held = percent(float(share[first : last + 1].sum()))
    labelled(axes, f"lengths {first} to {last}\n(dark) hold {held}\nof all paths")


def plot_signed(axes: Axes, signed: Signed, values: np.ndarray[Any, np.dtype[np.float64]], label: str) -> None:
    """Plot values for the lengths 1 to n: filled squares where signed draws can be trusted, empty ones elsewhere."""
    lengths, trusted = np.arange(1, len(values) + 1), signed.judgement.trusted[1:]
    shown = values > 0
    axes.plot(lengths[shown], values[shown], "--", color=MIDDLE, linewidth=1)
    for mask, face, name in ((trusted, MIDDLE, label), (~trusted, "white", "not to be trusted")):
        marked = mask & shown
        if marked.any():
            axes.plot(
                lengths[marked], values[marked], "s", color=MIDDLE, markerfacecolor=face, markersize=3.5, label=name
            )


def _draw_magnitude(axes: Axes, summary: Summary) -> None:
    lengths = np.arange(1, summary.n + 1)
    shown = summary.mean > 0
    floor = summary.quantile_05[summary.quantile_05 > 0].min(initial=summary.mean[shown].min())
    axes.fill_between(
        lengths,
        np.maximum(summary.quantile_05, floor),
        np.maximum(summary.quantile_95, floor),
        color=LIGHT,
        linewidth=0,
        label="5th to 95th percentile",
    )
    zeros = f" ({summary.zeros} norms are 0: below the axis)" if summary.zeros else ""
    axes.plot(lengths[shown], summary.mean[shown], "o", color=BLUE, markersize=3, label=f"mean{zeros}")
    rate, low, high = summary.decay
    if np.isfinite(rate):
        interval = f"{low:.3g} to {high:.3g}" if np.isfinite(low) else no_interval(summary.batches, "batch")
        line = np.exp(summary.log_intercept + np.log(rate) * lengths)
        axes.plot(
            lengths,
            line,
            "--",
            color=DARK,
            linewidth=1,
            label=f"fit: {MULTIPLIED} {rate:.3g} per module ({interval})",
        )


def _draw_product(axes: Axes, comparison: Comparison) -> None:
    headed(axes, f"(c) total gradient magnitude: (a) {MULTIPLIED} (b)")
    axes.set_ylabel("share of the total")
    lengths = np.arange(1, comparison.n + 1)
    alone = comparison.signed is None and comparison.exact is None
    if (sampled := comparison.sampled) is not None:
        effective = sampled.effective
        axes.axvspan(effective.first - 0.5, effective.last + 0.5, color=LIGHT, linewidth=0)
        axes.bar(lengths, sampled.product, 0.8, color=BLUE, label=f"paths {MULTIPLIED} mean norm")
        labelled(
            axes,
            f"effective paths:\nlengths {effective.first} to {effective.last}\n"
            f"hold {percent(effective.gradient)} of the total\nand {percent(effective.paths)}\nof all paths",
            top=0.97 if alone else 0.66,
        )
    if comparison.signed is not None:
        plot_signed(axes, comparison.signed, comparison.signed.product, f"paths {MULTIPLIED} root mean square")
    if comparison.exact is not None:
        axes.plot(
            lengths, comparison.exact.product, "^:", color=DARK, markersize=4, linewidth=1, label="norm of exact sum"
        )
    in_percent(axes)
    if not alone:
        axes.set_ylim(0, 1.5 * axes.get_ylim()[1])
        axes.legend(fontsize=8, frameon=False, loc="upper right")


def table_6(summary: Summary, title: str) -> Table:
    """Return the numbers of Figure 6 as a table 80 columns wide, one row per length, effective paths in bold.

    The columns are the number of measurements; the share of the length in all paths; the mean norm of a path
    gradient, its interval and the standard deviation of the norms; and the share of the length in the total, paths
    times mean norm.

    Args:
        summary: the sampled paths of a run (``compare(run).sampled``).
        title: line above the table.

    Raises:
        ValueError: ``summary`` is something else, such as None of a run without sampled paths.

    Example:
        >>> import pathnet
        >>> from pathnet.experiments import PathGradients, path_gradients
        >>> from pathnet.experiments.comparison import compare
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> plan = PathGradients(batches=12, batch_size=16)
        >>> run = path_gradients.measure(net, data, plan, "run")
        >>> table = pathnet.figures.table_6(compare(run).sampled, "Path gradients")
        >>> [column.header for column in table.columns]
        ['length', 'count', 'paths', 'mean norm', '95 % interval', 'std', 'product']
        >>> table.row_count
        3
    """
    check_result("summary", summary, Summary)
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
