"""Figures 3, 4 and 8: single deletions; Figure 5: several deletions, and reordered blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pathnet.experiments.by_size import ErrorBySize, by_tau
from pathnet.experiments.errors import Spread
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.experiments.lesion_stochastic_depth import StochasticDepth
from pathnet.figures.paths import draw_drawn
from pathnet.figures.sources import Source, deletions_of, errors_of, heading_of, opened, stochastic_depth_of
from pathnet.figures.style import BLUE, DARK, GREY, LIGHT, STYLES, headed, over_blocks, panels, saved, up_to_one
from pathnet.intervals import no_interval

__all__ = ["band", "draw_single", "figure_3", "figure_5a", "figure_5b", "figure_8"]

Array = NDArray[np.float64]


@overload
def figure_3(results: Source, title: str | None = None, path_stem: None = None) -> Figure: ...
@overload
def figure_3(results: Source, title: str | None = None, path_stem: str | Path = ...) -> list[Path]: ...
def figure_3(results: Source, title: str | None = None, path_stem: str | Path | None = None) -> Figure | list[Path]:
    """Draw Figures 3 and 4 of the paper, the error without each single block by kind of network, in one panel.

    Args:
        results: a run of single deletions, its folder, or its summary; or, by kind of network, the error rates
            without each block, [n] or [seeds, n], or a mapping of arrays: ``rate`` (or the numbers ``wrong`` of
            ``images``), ``intact`` rates [seeds], ``images`` for 95 % intervals (or their ends ``low`` and ``high``),
            ``downsampling`` blocks, and the rate of ``chance``, of which only the first is needed.
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> import pathnet
        >>> from pathnet.lesion import Lesion
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, num_classes=2, in_channels=1)
        >>> deleted = pathnet.lesion.errors(net, data, [Lesion((i,)) for i in range(net.n)])
        >>> intact = pathnet.lesion.errors(net, data, [Lesion()])
        >>> rates = {"rate": deleted.rate, "images": deleted.images, "intact": intact.rate}
        >>> figure = pathnet.figures.figure_3({"my network": rates}, "synthetic")
        >>> figure.axes[0].get_ylabel()
        'test error'
    """
    source = opened(results)
    deletions = deletions_of(source)
    named = heading_of(source, title, "single blocks deleted")
    figure, (axes,) = panels(named, 1, width=8)
    draw_single(axes, deletions)
    return saved(figure, path_stem)


@overload
def figure_8(results: Source | StochasticDepth, title: str | None = None, path_stem: None = None) -> Figure: ...
@overload
def figure_8(
    results: Source | StochasticDepth, title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_8(
    results: Source | StochasticDepth, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw Figure 8 of the paper.

    The panels are (a) single deletions after training with stochastic depth and without, and (b) the lengths of the
    paths that stochastic depth trains.

    Args:
        results: a run of stochastic depth, its folder, or its summary; or arrays by name: ``deletions``, error rates
            without single blocks by kind of network, as `figure_3` takes them; and the ``survival`` probabilities [n]
            of the modules, from which paths are drawn, or the numbers of ``drawn`` paths and the ``expected`` shares
            by length [n + 1].
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> deletions = {"plain": [0.12, 0.31, 0.09], "stochastic depth": [0.1, 0.14, 0.08]}
        >>> figure = figures.figure_8({"deletions": deletions, "survival": [1.0, 0.75, 0.5]})
        >>> [panel.get_title(loc="left") for panel in figure.axes]
        ['(a) single blocks deleted', '(b) paths trained by stochastic depth']
    """
    source = opened(results)
    summary = stochastic_depth_of(source)
    named = heading_of(source, title, "stochastic depth")
    figure, (single, lengths) = panels(named, 2, width=5.5)
    headed(single, "(a) single blocks deleted")
    draw_single(single, summary.deletions)
    headed(lengths, "(b) paths trained by stochastic depth")
    draw_drawn(lengths, summary.trained)
    return saved(figure, path_stem)


def draw_single(axes: Axes, deletions: Mapping[str, SingleDeletions]) -> None:
    """Draw one line per kind of network, the mean over seeds, with bars that span the intervals of all seeds."""
    named = False
    for (kind, nets), (colour, line, marker) in zip(deletions.items(), STYLES, strict=False):
        block = nets.first + np.arange(nets.rate.shape[1])
        mean = nets.rate.mean(0)
        several = f", mean of {len(nets.rate)} seeds" if len(nets.rate) > 1 else ""
        axes.vlines(block, nets.low.min(0), nets.high.max(0), color=colour, linewidth=1, alpha=0.5)
        axes.plot(
            block, mean, line, color=colour, marker=marker, markersize=3.5, linewidth=1, label=f"{kind}{several}"
        )
        if np.isfinite(nets.intact).all():
            axes.axhline(float(nets.intact.mean()), color=colour, linestyle=line, linewidth=0.6, alpha=0.8)
        marked = [i for i in nets.downsampling if i < len(mean)]
        if marked:
            axes.plot(
                block[marked],
                mean[marked],
                "o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=colour,
                label="_" if named else "downsampling (or pooling) block",
            )
            named = True
        if nets.first > 0:
            axes.plot([0], [0.02], "x", color=colour, markersize=6, label=f"{kind}: layer 0 cannot be deleted")
    for chance in dict.fromkeys(nets.chance for nets in deletions.values() if np.isfinite(nets.chance)):
        _draw_chance(axes, chance)
    axes.set_ylabel("test error")
    up_to_one(axes, 1.35)
    label = "deleted block" if all(nets.first == 0 for nets in deletions.values()) else "deleted block (vgg: layer)"
    over_blocks(axes, max(nets.first + nets.rate.shape[1] for nets in deletions.values()), label)
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def band(axes: Axes, where: NDArray[np.int64], means: Sequence[Spread]) -> None:
    """Shade the intervals of means; if there are none, the legend says so."""
    low, high = np.array([(mean.low, mean.high) for mean in means]).T
    drawn = np.isfinite(low).any()
    label = "95 % interval of the mean" if drawn else no_interval(means[0].count)
    axes.fill_between(where, low, high, color=LIGHT if drawn else "none", linewidth=0, label=label)


@overload
def figure_5a(results: Source | ErrorBySize, title: str | None = None, path_stem: None = None) -> Figure: ...
@overload
def figure_5a(results: Source | ErrorBySize, title: str | None = None, path_stem: str | Path = ...) -> list[Path]: ...
def figure_5a(
    results: Source | ErrorBySize, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw Figure 5 (a) of the paper.

    The panels show the error against (a) the number of deleted modules and (b) the number of valid paths.

    Args:
        results: a run of random deletions, its folder, or its summary; or arrays by name: the ``size`` and the error
            ``rate`` of each lesion, and the number of ``blocks``. The rates ``intact`` and ``chance``, and the
            ``seed`` of each lesion's network, are optional.
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> size, rate = [1, 1, 2, 2, 3, 3], [0.08, 0.11, 0.15, 0.12, 0.3, 0.22]
        >>> figure = figures.figure_5a({"size": size, "rate": rate, "blocks": 18, "intact": 0.07})
        >>> figure.get_suptitle()
        '2 draws per size'
    """
    source = opened(results)
    errors = errors_of(source, "5a")
    named = heading_of(source, title)
    figure, (deleted, valid) = panels(_drawn(errors, named), 2, width=5.5)
    headed(deleted, "(a) random blocks deleted")
    _boxes(deleted, errors.rates, np.array(errors.sizes, np.float64), 0.6, errors)
    deleted.set_xlabel("deleted modules")
    deleted.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    headed(valid, "(b) the same, by number of valid paths")
    log_left = np.array([errors.blocks - size for size in errors.sizes])
    mean_error = np.array([mean.mean for mean in errors.means])
    band(valid, log_left, errors.means)
    valid.plot(log_left, mean_error, "o-", color=BLUE, markersize=3.5, linewidth=1, label="mean error")
    if np.isfinite(errors.intact):
        valid.plot([errors.blocks], [errors.intact], "s", color=DARK, markersize=5, label="no block deleted")
    valid.invert_xaxis()
    valid.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    valid.xaxis.set_major_formatter(lambda power, _: f"$2^{{{power:.0f}}}$")
    valid.set_xlabel("valid paths")
    valid.set_ylabel("test error")
    _to_chance(valid, errors)
    valid.legend(fontsize=8, frameon=False, loc="upper left")
    return saved(figure, path_stem)


@overload
def figure_5b(results: Source | ErrorBySize, title: str | None = None, path_stem: None = None) -> Figure: ...
@overload
def figure_5b(results: Source | ErrorBySize, title: str | None = None, path_stem: str | Path = ...) -> list[Path]: ...
def figure_5b(
    results: Source | ErrorBySize, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw Figure 5 (b) of the paper.

    It shows the error against Kendall's tau between the order of the blocks and that of training, with one box for
    each tenth of the draws.

    Args:
        results: a run of reordered blocks, its folder, or its summary; or arrays by name: the error ``rate`` of each
            lesion, and its ``tau`` or the ``order`` of its blocks [lesions, n]. The number ``size`` of swaps and the
            ``seed`` of each lesion's network, and the rates ``intact`` and ``chance``, are optional.
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> order = [[1, 0, 2], [2, 1, 0], [0, 2, 1]]
        >>> figure = figures.figure_5b({"order": order, "rate": [0.1, 0.24, 0.12]})
        >>> figure.get_suptitle()
        '3 draws'
    """
    source = opened(results)
    errors = errors_of(source, "5b")
    swaps = f", 1 to {errors.sizes[-1]} swaps" if errors.sizes[-1] else ""
    named = heading_of(source, title)
    figure, (axes,) = panels(f"{_drawn(errors, named)}{swaps}", 1, width=6.5)
    tenths = by_tau(errors)
    positions = np.array([tau.mean() for tau in tenths.tau])
    gap = float(np.diff(-positions).min()) if len(positions) > 1 else 0.02
    _boxes(axes, tenths.rates, positions, 0.8 * max(gap, 0.003), errors)
    axes.set_xlim(1 + 0.02, positions.min() - 0.02)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter("{x:.2f}")
    axes.set_xlabel("Kendall's tau with the order of training (each box: a tenth of the draws)")
    return saved(figure, path_stem)


def _drawn(errors: ErrorBySize, title: str) -> str:
    networks = f" for each of {errors.seeds} networks" if errors.seeds > 1 else ""
    draws = "draw" if errors.draws == 1 else "draws"
    per_size = " per size" if errors.sizes[-1] else ""
    return f"{title}{title and ': '}{errors.draws} {draws}{per_size}{networks}"


def _boxes(axes: Axes, rates: Sequence[Array], positions: Array, width: float, errors: ErrorBySize) -> None:
    axes.boxplot(
        rates,
        positions=positions.tolist(),
        widths=width,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": LIGHT, "edgecolor": BLUE},
        medianprops={"color": DARK},
        whiskerprops={"color": BLUE},
        capprops={"color": BLUE},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": BLUE},
    )
    if np.isfinite(errors.intact):
        axes.axhline(errors.intact, color=DARK, linewidth=0.8, linestyle="--", label="no lesion")
    axes.set_ylabel("test error")
    _to_chance(axes, errors)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left")


def _to_chance(axes: Axes, errors: ErrorBySize) -> None:
    up_to_one(axes, 1.3)
    if np.isfinite(errors.chance):
        _draw_chance(axes, errors.chance)


def _draw_chance(axes: Axes, rate: float) -> None:
    axes.axhline(rate, color=GREY, linestyle=(0, (1, 3)), linewidth=1, label="chance")
