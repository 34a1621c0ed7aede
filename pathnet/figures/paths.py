"""Figure 7, the paths that training draws, and the diagrams of the unraveled view (Figures 1 and 2)."""

from __future__ import annotations

from pathlib import Path
from typing import overload

import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from pathnet.experiments.drawn_paths import DrawnPaths
from pathnet.experiments.effective_training import EffectiveTraining
from pathnet.experiments.remaining_paths import RemainingPaths
from pathnet.figures.sources import Source, effective_of, heading_of, opened, remaining_of
from pathnet.figures.style import (
    BLUE,
    DARK,
    LIGHT,
    MIDDLE,
    STYLES,
    headed,
    in_percent,
    over_lengths,
    panels,
    saved,
)

__all__ = ["draw_drawn", "figure_1", "figure_2", "figure_7", "figure_effective"]

FAINT = "#b8b8b8"


@overload
def figure_7(results: Source | RemainingPaths, title: str | None = None, path_stem: None = None) -> Figure: ...
@overload
def figure_7(
    results: Source | RemainingPaths, title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_7(
    results: Source | RemainingPaths, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw Figure 7 of the paper, the share of paths of each length that remains after deletions.

    Args:
        results: a run of remaining paths, its folder, or its summary; or arrays by name: the number of ``blocks`` and
            some numbers ``deleted`` of them; and, if random paths were drawn, the shares ``drawn`` of them that
            remain [deleted, n + 1].
        title: heading of the figure; by default the number of blocks.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> figure = figures.figure_7({"blocks": 54, "deleted": [1, 10, 20]})
        >>> figure.get_suptitle()
        '54 blocks'
    """
    source = opened(results)
    remaining = remaining_of(source)
    # The run is of no network, and has no heading.
    named = heading_of(remaining, title, f"{remaining.blocks} blocks")
    figure, (axes,) = panels(named, 1, width=6.5)
    lengths = np.arange(remaining.blocks + 1)
    for (deleted, share), (colour, line, marker) in zip(remaining.share.items(), STYLES, strict=False):
        axes.plot(lengths, share, line, color=colour, linewidth=1.4, label=f"{deleted} deleted (equation 8)")
        if (drawn := remaining.drawn.get(deleted)) is not None:
            axes.plot(lengths, drawn, marker, color=colour, markersize=2.5, label="drawn at random")
    over_lengths(axes, remaining.blocks)
    axes.set_ylabel("share of the paths of a length that remains")
    in_percent(axes)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, frameon=False)
    return saved(figure, path_stem)


def draw_drawn(axes: Axes, paths: DrawnPaths) -> None:
    """Draw the lengths drawn by the schedule of a training, their expectation, and the lengths of all paths."""
    n, steps = len(paths.drawn) - 1, int(paths.drawn.sum())
    lengths = np.arange(n + 1)
    axes.bar(lengths, paths.drawn / steps, 0.8, color=LIGHT, label=f"drawn, {steps} steps")
    axes.plot(lengths, paths.expected, "o-", color=BLUE, markersize=3, linewidth=1, label="expected")
    axes.plot(
        lengths,
        scipy.stats.binom.pmf(lengths, n, 0.5),
        "--",
        color=DARK,
        linewidth=1,
        label="all paths of the network",
    )
    over_lengths(axes, n)
    axes.set_ylabel("share of paths")
    in_percent(axes)
    axes.set_ylim(0, 1.35 * max(paths.drawn.max() / steps, paths.expected.max()))
    axes.legend(fontsize=8, frameon=False, loc="upper right")


@overload
def figure_effective(
    results: Source | EffectiveTraining, title: str | None = None, path_stem: None = None
) -> Figure: ...
@overload
def figure_effective(
    results: Source | EffectiveTraining, title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_effective(
    results: Source | EffectiveTraining, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw the last experiment of section 5.

    The panels are (a) test errors after training in full and with k of n modules per batch, and (b) the lengths of
    the trained paths.

    Args:
        results: a run of effective training, its folder, or its summary; or arrays by name: the number of ``modules``
            that each batch trains, that of ``blocks``, the error rates [seeds] of networks trained in ``full``, and
            those of ``effective`` ones: rates [seeds], or by way of testing.
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> rates = {"full": [0.07, 0.08], "effective": {"recalibrated": [0.09, 0.08]}}
        >>> figure = figures.figure_effective({"modules": 7, "blocks": 18, **rates})
        >>> figure.axes[0].get_title(loc="left")
        '(a) test error, 2 networks each'
    """
    source = opened(results)
    training = effective_of(source)
    named = heading_of(source, title, "effective training")
    figure, (errors, lengths) = panels(named, 2, width=5.5)
    groups = {"all modules": training.full} | {
        f"{training.modules} of {training.blocks},\n{name}": rates for name, rates in training.effective.items()
    }
    headed(errors, f"(a) test error, {len(training.full)} network{'s'[: len(training.full) > 1]} each")
    for position, (name, rates) in enumerate(groups.items()):
        errors.plot(np.full(len(rates), position), rates, "o", color=BLUE, markersize=4, alpha=0.7)
        errors.plot([position - 0.2, position + 0.2], [rates.mean()] * 2, color=DARK, linewidth=2)
        difference = training.difference.get(name.partition("\n")[2])
        if difference is not None and np.isfinite(difference.low):
            base = training.full.mean()
            errors.vlines(position + 0.3, base + difference.low, base + difference.high, color=MIDDLE, linewidth=2)
    errors.axhline(float(training.full.mean()), color=DARK, linewidth=0.8, linestyle="--")
    errors.set_xticks(range(len(groups)), list(groups), fontsize=8)
    errors.set_xlim(-0.6, len(groups) - 0.4)
    errors.set_ylabel("test error (side bar: 95 % interval of difference)")
    in_percent(errors)
    errors.set_ylim(bottom=0)
    headed(lengths, f"(b) paths trained with {training.modules} of {training.blocks} modules")
    draw_drawn(lengths, training.trained)
    return saved(figure, path_stem)


@overload
def figure_1(path_stem: None = None) -> Figure: ...
@overload
def figure_1(path_stem: str | Path) -> list[Path]: ...
def figure_1(path_stem: str | Path | None = None) -> Figure | list[Path]:
    """Draw Figure 1 of the paper: three residual blocks, and their unraveled view with its 2^3 paths.

    The figure is the same for every network.

    Args:
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        OSError: a file cannot be written.

    Example:
        >>> from pathnet import figures
        >>> figures.figure_1().axes[0].get_title(loc="left")
        '(a) blocks, each a module and a skip connection'
    """
    figure, (block_view, tree) = panels("a residual network of three blocks, and its unraveled view", 2, width=5.5)
    headed(block_view, "(a) blocks, each a module and a skip connection")
    _draw_blocks(block_view)
    headed(tree, "(b) unraveled view: all 8 paths")
    _draw_tree(tree, None)
    return saved(figure, path_stem)


@overload
def figure_2(path_stem: None = None) -> Figure: ...
@overload
def figure_2(path_stem: str | Path) -> list[Path]: ...
def figure_2(path_stem: str | Path | None = None) -> Figure | list[Path]:
    """Draw Figure 2 of the paper: what deleting the second module does to a residual network and to a VGG.

    The figure is the same for every network.

    Args:
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        OSError: a file cannot be written.

    Example:
        >>> from pathnet import figures
        >>> figures.figure_2().axes[0].get_title(loc="left")
        '(a) residual network: half of the paths remain'
    """
    figure, (tree, chain) = panels("the second module deleted", 2, width=5.5)
    headed(tree, "(a) residual network: half of the paths remain")
    _draw_tree(tree, 1)
    headed(chain, "(b) VGG: the only path is cut")
    _draw_chain(chain)
    return saved(figure, path_stem)


def _bare(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(-0.6, width)
    axes.set_ylim(-0.7, height)
    axes.set_axis_off()
    axes.set_aspect("equal", anchor="N")


def _module(axes: Axes, x: float, y: float, number: int, gone: bool = False) -> None:
    size = 0.62
    colour = FAINT if gone else BLUE
    axes.add_patch(
        FancyBboxPatch(
            (x - size / 2, y - size / 2),
            size,
            size,
            boxstyle="round,pad=0.02",
            facecolor="white" if gone else LIGHT,
            edgecolor=colour,
            linestyle="--" if gone else "-",
            zorder=3,
        )
    )
    axes.text(
        x, y + (0.62 if gone else 0), f"$f_{number}$", ha="center", va="center", fontsize=9, color=DARK, zorder=4
    )
    if gone:
        axes.plot([x - 0.42, x + 0.42], [y - 0.42, y + 0.42], color=MIDDLE, linewidth=2, zorder=5)
        axes.plot([x - 0.42, x + 0.42], [y + 0.42, y - 0.42], color=MIDDLE, linewidth=2, zorder=5)


def _plus(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Circle((x, y), 0.17, facecolor="white", edgecolor=DARK, zorder=3))
    axes.text(x, y, "+", ha="center", va="center", fontsize=8, color=DARK, zorder=4)


def _wire(axes: Axes, points: list[tuple[float, float]], gone: bool = False) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=FAINT if gone else DARK, linestyle="--" if gone else "-", linewidth=1, zorder=1)


def _draw_blocks(axes: Axes) -> None:
    for i in range(3):
        x = 2.2 * i
        _wire(axes, [(x, 1), (x + 2.2, 1)])
        _wire(axes, [(x + 0.2, 1), (x + 0.2, 2.2), (x + 1.6, 2.2), (x + 1.6, 1)])
        _module(axes, x + 0.9, 1, i + 1)
        _plus(axes, x + 1.6, 1)
    axes.text(-0.15, 1, "$y_0$", ha="right", va="center", fontsize=9)
    axes.text(6.75, 1, "$y_3$", ha="left", va="center", fontsize=9)
    _bare(axes, 7.4, 3.4)


def _draw_tree(axes: Axes, deleted: int | None) -> None:
    """Draw the nested expression as a tree; level i has 2^(3 - i) copies of the output of block i."""
    heights = [float(7 - row) for row in range(8)]
    axes.text(-0.1, 3.5, "$y_0$", ha="right", va="center", fontsize=9)
    x = 0.3
    for height in heights:
        _wire(axes, [(0, 3.5), (x, height)])
    for level in range(3):
        merged = []
        for upper, lower in zip(heights[::2], heights[1::2], strict=True):
            gone = level == deleted
            middle = (upper + lower) / 2
            _wire(axes, [(x, upper), (x + 1.5, upper), (x + 1.9, middle)])
            _wire(axes, [(x, lower), (x + 1.5, lower), (x + 1.9, middle)], gone)
            _module(axes, x + 0.8, lower, level + 1, gone)
            _plus(axes, x + 1.9, middle)
            merged.append(middle)
        x += 1.9
        heights = merged
    _wire(axes, [(x, heights[0]), (x + 0.6, heights[0])])
    axes.text(x + 0.7, heights[0], "$y_3$", ha="left", va="center", fontsize=9)
    _bare(axes, x + 1.4, 7.7)


def _draw_chain(axes: Axes) -> None:
    for i in range(3):
        _wire(axes, [(1.6 * i, 1), (1.6 * i + 1.6, 1)], gone=i == 1)
        _module(axes, 1.6 * i + 0.8, 1, i + 1, gone=i == 1)
    axes.text(-0.1, 1, "$y_0$", ha="right", va="center", fontsize=9)
    axes.text(4.9, 1, "$y_3$", ha="left", va="center", fontsize=9)
    _bare(axes, 5.6, 2.7)
