"""Figures 3, 4 and 8: single deletions; Figure 5: many deletions, and blocks in another order."""

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


def figure_3(found: Mapping[str, SingleDeletions], title: str, path_stem: str | Path) -> list[Path]:
    """Figure 3 of the paper, and 4: the error without each single block, by kind of network."""
    figure, (axes,) = panels(title, 1, width=8)
    draw_single(axes, found)
    return saved(figure, path_stem)


def figure_8(
    found: Mapping[str, SingleDeletions], trained: DrawnPaths, title: str, path_stem: str | Path
) -> list[Path]:
    """Figure 8 of the paper: single deletions after training with stochastic depth and without; beside it the
    lengths of the paths that such training takes."""
    figure, (single, lengths) = panels(title, 2, width=5.5)
    headed(single, "(a) each single block deleted")
    draw_single(single, found)
    headed(lengths, "(b) paths trained by stochastic depth")
    draw_drawn(lengths, trained)
    return saved(figure, path_stem)


def draw_single(axes: Axes, found: Mapping[str, SingleDeletions]) -> None:
    """One line a kind of network, the mean over seeds; bars from the lowest to the highest end of their intervals."""
    first = next(iter(found.values()))
    for (kind, own), (colour, line, marker) in zip(found.items(), STYLES, strict=False):
        block = own.first + np.arange(own.rate.shape[1])
        mean = own.rate.mean(0)
        several = f", mean of {len(own.rate)} seeds" if len(own.rate) > 1 else ""
        axes.vlines(block, own.low.min(0), own.high.max(0), color=colour, linewidth=1, alpha=0.5)
        axes.plot(
            block, mean, line, color=colour, marker=marker, markersize=3.5, linewidth=1, label=f"{kind}{several}"
        )
        axes.axhline(float(own.intact.mean()), color=colour, linestyle=line, linewidth=0.6, alpha=0.8)
        marked = [i for i in own.downsampling if i < len(mean)]
        axes.plot(
            block[marked],
            mean[marked],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=colour,
            label="_" if own is not first else "downsampling (or pooling) block",
        )
        if own.first > 1:
            axes.plot([1], [0.02], "x", color=colour, markersize=6, label=f"{kind}: layer 1 cannot be deleted")
    axes.axhline(first.chance, color="#8a8a8a", linestyle=(0, (1, 3)), linewidth=1, label="chance")
    axes.set_ylabel("test error")
    up_to_one(axes, 1.35)
    label = "deleted block" if all(own.first == 1 for own in found.values()) else "deleted block (vgg: layer)"
    over_blocks(axes, max(own.first - 1 + own.rate.shape[1] for own in found.values()), label)
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def band(axes: Axes, where: NDArray[np.int64], means: Sequence[Spread]) -> None:
    """The intervals of means, where there are some; the legend says so where there are none."""
    low, high = np.array([(own.low, own.high) for own in means]).T
    drawn = np.isfinite(low).any()
    label = "95 % interval of the mean" if drawn else no_interval(means[0].count)
    axes.fill_between(where, low, high, color=LIGHT if drawn else "none", linewidth=0, label=label)


def figure_5a(found: ErrorBySize, title: str, path_stem: str | Path) -> list[Path]:
    """Figure 5 (a) of the paper: error against the number of deleted modules; beside it, against the number of
    paths that are left."""
    figure, (deleted, valid) = panels(_drawn(found, title), 2, width=5.5)
    headed(deleted, "(a) random blocks deleted")
    _boxes(deleted, found.rates, np.array(found.sizes, np.float64), 0.6, found)
    deleted.set_xlabel("deleted modules")
    deleted.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    headed(valid, "(b) the same, by the paths that are left")
    log_left = np.array([found.blocks - size for size in found.sizes])
    middle = np.array([own.mean for own in found.means])
    band(valid, log_left, found.means)
    valid.plot(log_left, middle, "o-", color=BLUE, markersize=3.5, linewidth=1, label="mean error")
    valid.plot([found.blocks], [found.intact], "s", color=DARK, markersize=5, label="no block deleted")
    valid.invert_xaxis()
    valid.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    valid.xaxis.set_major_formatter(lambda power, _: f"$2^{{{power:.0f}}}$")
    valid.set_xlabel("valid paths")
    valid.set_ylabel("test error")
    _to_chance(valid, found)
    valid.legend(fontsize=8, frameon=False, loc="upper left")
    return saved(figure, path_stem)


def figure_5b(found: ErrorBySize, title: str, path_stem: str | Path) -> list[Path]:
    """Figure 5 (b) of the paper: error against Kendall's tau of the blocks' order with that of training, a box for
    each tenth of the draws."""
    figure, (axes,) = panels(f"{_drawn(found, title)} of 1 to {found.sizes[-1]} swaps", 1, width=6.5)
    tenths = by_tau(found)
    positions = np.array([own.mean() for own in tenths.tau])
    gap = float(np.diff(-positions).min()) if len(positions) > 1 else 0.02
    _boxes(axes, tenths.rates, positions, 0.8 * max(gap, 0.003), found)
    axes.set_xlim(1 + 0.02, positions.min() - 0.02)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter("{x:.2f}")
    axes.set_xlabel("Kendall's tau with the order of training (a box: a tenth of the draws)")
    return saved(figure, path_stem)


def _drawn(found: ErrorBySize, title: str) -> str:
    several = f" for each of {found.seeds} networks" if found.seeds > 1 else ""
    return f"{title}: {found.draws} draws a size{several}"


def _boxes(axes: Axes, rates: Sequence[Array], positions: Array, width: float, found: ErrorBySize) -> None:
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
    axes.axhline(found.intact, color=DARK, linewidth=0.8, linestyle="--", label="no lesion")
    axes.set_ylabel("test error")
    _to_chance(axes, found)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _to_chance(axes: Axes, found: ErrorBySize) -> None:
    up_to_one(axes, 1.3)
    axes.axhline(found.chance, color="#8a8a8a", linestyle=(0, (1, 3)), linewidth=1, label="chance")
