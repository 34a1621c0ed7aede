"""Figures 3, 4 and 8: single deletions; Figure 5: several deletions, and reordered blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pathnet.experiments.by_size import ErrorBySize, by_tau
from pathnet.experiments.drawn_paths import DrawnPaths
from pathnet.experiments.errors import Spread
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.figures.paths import draw_drawn
from pathnet.figures.style import BLUE, DARK, LIGHT, STYLES, headed, over_blocks, panels, saved, up_to_one
from pathnet.intervals import no_interval

__all__ = ["band", "draw_single", "figure_3", "figure_5a", "figure_5b", "figure_8"]

Array = NDArray[np.float64]


def figure_3(deletions: Mapping[str, SingleDeletions], title: str, path_stem: str | Path) -> list[Path]:
    """Draw Figures 3 and 4 of the paper, the error without each single block by kind of network, in one panel.

    Args:
        deletions: error rates by kind of network.
        title: heading of the figure.
        path_stem: path of the files to write, without suffix.

    Returns:
        The files written: PNG and SVG.
    """
    figure, (axes,) = panels(title, 1, width=8)
    draw_single(axes, deletions)
    return saved(figure, path_stem)


def figure_8(
    deletions: Mapping[str, SingleDeletions], trained: DrawnPaths, title: str, path_stem: str | Path
) -> list[Path]:
    """Draw Figure 8 of the paper and return the files written, PNG and SVG.

    The panels are (a) single deletions after training with stochastic depth and without, and (b) the lengths of the
    paths that stochastic depth trains.

    Args:
        deletions: error rates by kind of network.
        trained: the paths that stochastic depth trains.
        title: heading of the figure.
        path_stem: path of the files to write, without suffix.
    """
    figure, (single, lengths) = panels(title, 2, width=5.5)
    headed(single, "(a) single blocks deleted")
    draw_single(single, deletions)
    headed(lengths, "(b) paths trained by stochastic depth")
    draw_drawn(lengths, trained)
    return saved(figure, path_stem)


def draw_single(axes: Axes, deletions: Mapping[str, SingleDeletions]) -> None:
    """Draw one line per kind of network, the mean over seeds, with bars that span the intervals of all seeds."""
    first = next(iter(deletions.values()))
    for (kind, nets), (colour, line, marker) in zip(deletions.items(), STYLES, strict=False):
        block = nets.first + np.arange(nets.rate.shape[1])
        mean = nets.rate.mean(0)
        several = f", mean of {len(nets.rate)} seeds" if len(nets.rate) > 1 else ""
        axes.vlines(block, nets.low.min(0), nets.high.max(0), color=colour, linewidth=1, alpha=0.5)
        axes.plot(
            block, mean, line, color=colour, marker=marker, markersize=3.5, linewidth=1, label=f"{kind}{several}"
        )
        axes.axhline(float(nets.intact.mean()), color=colour, linestyle=line, linewidth=0.6, alpha=0.8)
        marked = [i for i in nets.downsampling if i < len(mean)]
        axes.plot(
            block[marked],
            mean[marked],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=colour,
            label="_" if nets is not first else "downsampling (or pooling) block",
        )
        if nets.first > 0:
            axes.plot([0], [0.02], "x", color=colour, markersize=6, label=f"{kind}: layer 0 cannot be deleted")
    axes.axhline(first.chance, color="#8a8a8a", linestyle=(0, (1, 3)), linewidth=1, label="chance")
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


def figure_5a(errors: ErrorBySize, title: str, path_stem: str | Path) -> list[Path]:
    """Draw Figure 5 (a) of the paper and return the files written, PNG and SVG.

    The panels show the error against (a) the number of deleted modules and (b) the number of valid paths.

    Args:
        errors: error rates by number of deleted blocks.
        title: heading of the figure.
        path_stem: path of the files to write, without suffix.
    """
    figure, (deleted, valid) = panels(_drawn(errors, title), 2, width=5.5)
    headed(deleted, "(a) random blocks deleted")
    _boxes(deleted, errors.rates, np.array(errors.sizes, np.float64), 0.6, errors)
    deleted.set_xlabel("deleted modules")
    deleted.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    headed(valid, "(b) the same, by number of valid paths")
    log_left = np.array([errors.blocks - size for size in errors.sizes])
    mean_error = np.array([mean.mean for mean in errors.means])
    band(valid, log_left, errors.means)
    valid.plot(log_left, mean_error, "o-", color=BLUE, markersize=3.5, linewidth=1, label="mean error")
    valid.plot([errors.blocks], [errors.intact], "s", color=DARK, markersize=5, label="no block deleted")
    valid.invert_xaxis()
    valid.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    valid.xaxis.set_major_formatter(lambda power, _: f"$2^{{{power:.0f}}}$")
    valid.set_xlabel("valid paths")
    valid.set_ylabel("test error")
    _to_chance(valid, errors)
    valid.legend(fontsize=8, frameon=False, loc="upper left")
    return saved(figure, path_stem)


def figure_5b(errors: ErrorBySize, title: str, path_stem: str | Path) -> list[Path]:
    """Draw Figure 5 (b) of the paper and return the files written, PNG and SVG.

    It shows the error against Kendall's tau between the order of the blocks and that of training, with one box for
    each tenth of the draws.

    Args:
        errors: error rates by number of swapped pairs.
        title: heading of the figure.
        path_stem: path of the files to write, without suffix.
    """
    figure, (axes,) = panels(f"{_drawn(errors, title)}, 1 to {errors.sizes[-1]} swaps", 1, width=6.5)
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
    return f"{title}: {errors.draws} draws per size{networks}"


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
    axes.axhline(errors.intact, color=DARK, linewidth=0.8, linestyle="--", label="no lesion")
    axes.set_ylabel("test error")
    _to_chance(axes, errors)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _to_chance(axes: Axes, errors: ErrorBySize) -> None:
    up_to_one(axes, 1.3)
    axes.axhline(errors.chance, color="#8a8a8a", linestyle=(0, (1, 3)), linewidth=1, label="chance")
