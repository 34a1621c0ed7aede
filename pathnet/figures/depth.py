"""Figure of the effective depth over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pathnet.checks import described
from pathnet.effective_depth import Depth
from pathnet.figures.style import BLUE, DARK, LIGHT, MIDDLE, panels, saved

__all__ = ["figure_depth"]


@overload
def figure_depth(rows: Sequence[Depth], title: str) -> Figure: ...
@overload
def figure_depth(rows: Sequence[Depth], title: str, path_stem: str | Path) -> list[Path]: ...
def figure_depth(rows: Sequence[Depth], title: str, path_stem: str | Path | None = None) -> Figure | list[Path]:
    """Draw the effective depth, the lengths that hold 95 %, the length that explains half, and the loss.

    `pathnet.effective_depth.Depth` defines them.

    Args:
        rows: measurements in the order of the steps; rows without a depth are left out.
        title: heading of the figure.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The files written, PNG and SVG; without a path, the figure, which a notebook shows.

    Raises:
        ValueError: ``rows`` is no list of depths, or no row holds one.
        OSError: a file cannot be written.

    Example:
        >>> from pathnet import figures
        >>> from pathnet.effective_depth import Depth
        >>> rows = [Depth(0, 3.6, 1, 6, 4, 0.79, 0.03), Depth(100, 2.9, 1, 5, 3, 0.21, 0.03)]
        >>> [file.name for file in figures.figure_depth(rows, "digits", "depth")]
        ['depth.png', 'depth.svg']
    """
    if not isinstance(rows, Sequence) or not all(isinstance(row, Depth) for row in rows):
        raise ValueError(f"rows: expected a list of Depths, as read returns it, got {described(rows)}")
    known = [row for row in rows if np.isfinite(row.depth)]
    if not known:
        raise ValueError("rows: expected a measured depth, got none")
    steps, depth, first, last, half, loss = np.array(
        [(row.step, row.depth, row.first, row.last, row.half, row.loss) for row in known]
    ).T
    figure, (lengths, losses) = panels(title, 2, width=5.5)
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
