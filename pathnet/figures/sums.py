"""Figure and tables of all 2^n paths by length: cancellation in their sums, and the sums' shares of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator
from rich.markup import escape
from rich.table import Table

from pathnet.experiments.comparison import Comparison, Exact, Means, Signed, path_counts
from pathnet.experiments.findings import cancelled
from pathnet.experiments.summary import percent
from pathnet.figures.gradients import measured, plot_signed
from pathnet.figures.sources import Source, comparison_of, heading_of, opened
from pathnet.figures.style import (
    BLUE,
    DARK,
    GREY,
    LIGHT,
    MULTIPLIED,
    STYLES,
    check_result,
    headed,
    labelled,
    over_lengths,
    panels,
    saved,
    up_to_one,
)
from pathnet.gradients import LengthSums
from pathnet.intervals import no_interval

__all__ = ["figure_sums", "table_exact", "table_signed"]


@overload
def figure_sums(
    results: Source | Comparison | Sequence[LengthSums], title: str | None = None, path_stem: None = None
) -> Figure: ...
@overload
def figure_sums(
    results: Source | Comparison | Sequence[LengthSums], title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_sums(
    results: Source | Comparison | Sequence[LengthSums], title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw the exact sums by length.

    The panels are (a) norms of the sums, compared with sums of norms, (b) cosines between the sums and with the
    gradient, and (c) the share of the gradient that the lengths up to k explain. In networks with gates, the gradient
    is the one with frozen gates.

    Args:
        results: a run that holds exact sums, its folder, or its `Comparison`; or a `pathnet.LengthSums` for each
            batch; or arrays by name, as `figure_6` takes them, with ``exact`` among them.
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
        >>> batches = [data.random_batch(16, seed=0, batch=batch) for batch in range(12)]
        >>> sums = [pathnet.record(net, *batch).compare_lengths() for batch in batches]
        >>> figure = pathnet.figures.figure_sums(sums, "synthetic")
        >>> for panel in figure.axes:
        ...     print(panel.get_title(loc="left"))
        (a) cancellation among all paths of a length
        (b) directions of the sums
        (c) gradient by lengths up to k
    """
    source = opened(results)
    comparison = comparison_of(source)
    exact = comparison.exact
    if exact is None:
        raise ValueError("results: expected exact sums, got none")
    named = heading_of(source, title)
    figure, (sums, cosines, explained) = panels(": ".join(filter(None, [named, measured(comparison)])), 3)
    _draw_sums(sums, comparison, exact)
    _draw_cosines(cosines, comparison, exact)
    _draw_explained(explained, comparison, exact)
    for axes in (sums, cosines, explained):
        over_lengths(axes, comparison.n)
    return saved(figure, path_stem)


def _draw_sums(axes: Axes, comparison: Comparison, exact: Exact) -> None:
    headed(axes, "(a) cancellation among all paths of a length")
    axes.set_ylabel("norm")
    axes.set_yscale("log")
    lengths, counts = np.arange(comparison.n + 1), path_counts(comparison.n)
    if (sampled := comparison.sampled) is not None:
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
    if comparison.signed is not None:
        plot_signed(axes, comparison.signed, comparison.signed.total[1:], f"paths {MULTIPLIED} root mean square")
        random = np.sqrt(counts) * comparison.signed.rms
        shown = random > 0
        axes.plot(lengths[shown], random[shown], "-.", color=GREY, linewidth=1, label="sum if directions were random")
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
    axes.axhline(exact.full_norm, color=DARK, linewidth=0.8, label=f"norm of {comparison.gradient}")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    if (ratios := cancelled(comparison)) is not None:
        labelled(
            axes,
            f"lengths {ratios.first} to {ratios.last}: norms add up to\n"
            f"{ratios.least:.3g} to {ratios.most:.3g} times the norm of the sum",
        )
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.15)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def _draw_cosines(axes: Axes, comparison: Comparison, exact: Exact) -> None:
    headed(axes, "(b) directions of the sums")
    lengths = np.arange(len(exact.norm.mean))
    series = (
        (lengths[:-1] + 0.5, exact.next_cosine, "between neighbouring lengths"),
        (lengths, exact.full_cosine, f"with {comparison.gradient}"),
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


def _draw_explained(axes: Axes, comparison: Comparison, exact: Exact) -> None:
    headed(axes, f"(c) {comparison.gradient.removeprefix('the ')} by lengths up to k")
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
    shares = exact.explained.mean
    axes.set_ylim(min(0.0, shares.min()), max(1.4, 1.3 * shares.max()))
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _band(axes: Axes, where: np.ndarray, means: Means) -> None:
    if np.isfinite(means.low).any():
        axes.fill_between(where, means.low, means.high, color=LIGHT, linewidth=0)


def table_exact(comparison: Comparison, exact: Exact, title: str) -> Table:
    """Return the exact sums as a table 80 columns wide, one row per length.

    The columns are the norm of the sum; its share of the sum of the norms of the path gradients; its cosines with the
    next sum and with the gradient (`Comparison.gradient`); the shares of the gradient that the length explains and
    that all lengths up to it explain; and the relative norm of the remainder.

    Args:
        comparison: results of the run.
        exact: its exact sums.
        title: line above the table.

    Raises:
        ValueError: an argument is of another kind, such as None of a run without exact sums.

    Example:
        >>> import pathnet
        >>> from pathnet.experiments import PathGradients, path_gradients
        >>> from pathnet.experiments.comparison import compare
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> plan = PathGradients(method="exact", batches=12, batch_size=16)
        >>> run = path_gradients.measure(net, data, plan, "run")
        >>> result = compare(run)
        >>> table = pathnet.figures.table_exact(result, result.exact, "Exact sums")
        >>> table.row_count  # lengths 0 to 3
        4
        >>> list(table.columns[6].cells)[-1]  # all lengths together explain the gradient
        '100.0 %'
    """
    check_result("comparison", comparison, Comparison)
    check_result("exact", exact, Exact)
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for heading in ("length", "norm", "of norms", "cos next", "cos full", "share", "up to it", "left"):
        table.add_column(heading, justify="right")
    for k in range(comparison.n + 1):
        ratio = comparison.cancelling.mean[k - 1] if comparison.cancelling is not None and k else np.nan
        after = exact.next_cosine.mean[k] if k < comparison.n else np.nan
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


def table_signed(comparison: Comparison, signed: Signed, title: str) -> Table:
    """Return the signed draws as a table 80 columns wide, one row per length.

    The columns are the root mean square of the norm; the relative standard error of the mean square; k-hat, alignment
    and the verdict whether it can be trusted; and the relative standard deviations of the squared norm of one sampled
    path gradient and of one draw.

    Args:
        comparison: results of the run.
        signed: its signed draws.
        title: line above the table.

    Raises:
        ValueError: an argument is of another kind, such as None of a run without signed draws.

    Example:
        >>> import pathnet
        >>> from pathnet.experiments import PathGradients, path_gradients
        >>> from pathnet.experiments.comparison import compare
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> plan = PathGradients(method="signed", batches=12, batch_size=16)
        >>> run = path_gradients.measure(net, data, plan, "run")
        >>> result = compare(run)
        >>> table = pathnet.figures.table_signed(result, result.signed, "Signed draws")
        >>> [column.header for column in table.columns][:5]
        ['length', 'rms norm', 'error', 'k-hat', 'aligned']
    """
    check_result("comparison", comparison, Comparison)
    check_result("signed", signed, Signed)
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
    for k in range(comparison.n + 1):
        paths = draws = np.nan
        if (cost := comparison.cost) is not None and k:
            paths, draws = cost.sampled[k - 1], cost.signed[k - 1]
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
