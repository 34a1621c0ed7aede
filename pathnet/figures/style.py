"""Style of all figures: sizes, colours that stay distinct in grey, axes, and the files written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from pathnet.checks import described
from pathnet.files import replacing

__all__ = [
    "BLUE",
    "DARK",
    "GREY",
    "LIGHT",
    "MIDDLE",
    "MULTIPLIED",
    "STYLES",
    "check_result",
    "headed",
    "in_percent",
    "labelled",
    "over_blocks",
    "over_lengths",
    "panels",
    "saved",
    "up_to_one",
]

DARK, BLUE, MIDDLE, LIGHT, GREY = "#222222", "#1f5a94", "#d9822b", "#c9d9ea", "#8a8a8a"
STYLES: Sequence[tuple[str, str, str]] = (
    (BLUE, "-", "o"),
    (MIDDLE, "--", "s"),
    (DARK, ":", "^"),
    (GREY, "-.", "D"),
)
"""Colour, line and marker of each of the things compared; they differ in shade, line and shape."""
MULTIPLIED = "\N{MULTIPLICATION SIGN}"
DOTS_PER_INCH = 200
SHOWN_DOTS_PER_INCH = 144
"""Dots of a figure in a notebook, which shows it at half its size, so that it is sharp on dense displays."""
PANEL = (11 / 3, 3.7)


class CellFigure(Figure):
    """A figure that a notebook shows when it is the value of a cell, even if pyplot is not imported."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=SHOWN_DOTS_PER_INCH)
        width, height = (round(inches * SHOWN_DOTS_PER_INCH / 2) for inches in self.get_size_inches())
        return png.getvalue(), {"width": width, "height": height}


def check_result(name: str, value: object, kind: type) -> None:
    """Raise ValueError unless an argument is of the kind of results that a figure or table shows."""
    if not isinstance(value, kind):
        remedy = "a result of pathnet.experiments.comparison.compare(run)"
        raise ValueError(f"{name}: expected {kind.__name__}, {remedy}, got {described(value)}")


def panels(heading: str, count: int, rows: int = 1, width: float = PANEL[0]) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels in ``rows`` rows under one heading, and its panels.

    Args:
        heading: text above all panels.
        count, rows: number of panels and of rows.
        width: width of one panel, in inches.
    """
    columns = -(-count // rows)
    figure = CellFigure(figsize=(max(5.5, width * columns), PANEL[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    # A dollar sign in a name must not start mathematics.
    figure.suptitle(heading.replace("$", r"\$"), fontsize=10, color=DARK, wrap=True)
    return figure, axes


@overload
def saved(figure: Figure, path_stem: str | Path) -> list[Path]: ...
@overload
def saved(figure: Figure, path_stem: str | Path | None) -> Figure | list[Path]: ...
def saved(figure: Figure, path_stem: str | Path | None) -> Figure | list[Path]:
    """Write a figure as PNG and SVG, and return the paths of the files; without a path, return the figure itself.

    Raises:
        OSError: one of them cannot be written.
    """
    for axes in figure.axes:
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
    if path_stem is None:
        return figure
    files = [Path(f"{path_stem}.{suffix}") for suffix in ("png", "svg")]
    kept = "the measurements are on the disk, and the figure can be drawn again"
    with replacing(files[0], "figure", kept) as png:
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
    # The salt makes the same figure the same file.
    with rc_context({"svg.hashsalt": "pathnet"}), replacing(files[1], "figure", kept) as svg:
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return files


def over_lengths(axes: Axes, n: int) -> None:
    """Make the horizontal axis show path lengths 0 to n."""
    _over(axes, n, "path length (modules)")


def over_blocks(axes: Axes, n: int, label: str = "deleted block") -> None:
    """Make the horizontal axis show the blocks 0 to n - 1."""
    _over(axes, n - 1, label)
    axes.set_xlim(-0.75, n - 0.25)


def _over(axes: Axes, n: int, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(0, n + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))


def in_percent(axes: Axes) -> None:
    """Show the vertical axis in percent, with room above the data."""
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def up_to_one(axes: Axes, top: float) -> None:
    """Show shares from 0 to 1 on the vertical axis in percent, with room for a legend up to ``top``."""
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(FixedLocator([tenth / 10 for tenth in range(0, 11, 2)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def headed(axes: Axes, text: str) -> None:
    """Write a heading above a panel."""
    axes.set_title(text, fontsize=10, loc="left", pad=8)


def labelled(axes: Axes, text: str, top: float = 0.97) -> None:
    """Write text at the right, downwards from the share ``top`` of the height."""
    axes.text(0.98, top, text, transform=axes.transAxes, ha="right", va="top", fontsize=8)
