"""Figure of the effective depth over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pathnet.effective_depth import Depth
from pathnet.figures.sources import depths_of, heading_of
from pathnet.figures.sources.arrays import Arrays
from pathnet.figures.style import BLUE, DARK, LIGHT, MIDDLE, panels, saved

__all__ = ["figure_depth"]


@overload
def figure_depth(
    results: Sequence[Depth] | str | Path | Arrays, title: str | None = None, path_stem: None = None
) -> Figure: ...
@overload
def figure_depth(
    results: Sequence[Depth] | str | Path | Arrays, title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_depth(
    results: Sequence[Depth] | str | Path | Arrays, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw the effective depth, the lengths that hold 95 %, the length that explains half, and the loss.

    `pathnet.effective_depth.Depth` defines them.

    Args:
        results: the CSV file of an `EffectiveDepth`, or its rows; or arrays by name, those of the attributes of
            `Depth`. Rows without a depth are left out.
        title: heading of the figure; by default the effective depth.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or no row holds a depth.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> from pathnet.effective_depth import Depth
        >>> rows = [Depth(0, 3.6, 1, 6, 4, 0.79, 0.03), Depth(100, 2.9, 1, 5, 3, 0.21, 0.03)]
        >>> [file.name for file in figures.figure_depth(rows, "digits", "depth")]
        ['depth.png', 'depth.svg']
    """
    rows = depths_of(results)
    known = [row for row in rows if np.isfinite(row.depth)]
    if not known:
        raise ValueError("results: expected a measured depth, got none")
    steps, depth, first, last, half, loss = np.array(
        [(row.step, row.depth, row.first, row.last, row.half, row.loss) for row in known]
    ).T
    figure, (lengths, losses) = panels(heading_of(rows, title, "the effective depth"), 2, width=5.5)
    lengths.fill_between(steps, first, last, color=LIGHT, linewidth=0, label="lengths that hold 95 %")
    lengths.plot(steps, depth, "o-", color=BLUE, markersize=3, linewidth=1, label="effective depth")
    lengths.plot(
        steps,
        np.where(half < 0, np.nan, half),
        "s:",
        color=MIDDLE,
        markersize=3,
        linewidth=1,
        label="half explained",
    )
    lengths.set_ylabel("path length (modules)")
    lengths.set_ylim(0, 1.3 * max(last.max(), 1))
    lengths.legend(fontsize=8, frameon=False, loc="upper right")
    losses.plot(steps, loss, "o-", color=DARK, markersize=3, linewidth=1)
    losses.set_ylabel("loss on the batch")
    for axes in (lengths, losses):
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return saved(figure, path_stem)
