"""Figure of highway networks: lesions, gates, and the parts of the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathnet.experiments.highway import PARTS, Highway
from pathnet.figures.lesions import band, draw_single
from pathnet.figures.sources import Source, heading_of, highway_of, opened
from pathnet.figures.style import (
    BLUE,
    DARK,
    LIGHT,
    MIDDLE,
    headed,
    over_blocks,
    over_lengths,
    panels,
    saved,
    up_to_one,
)

__all__ = ["figure_highway"]


@overload
def figure_highway(results: Source | Highway, title: str | None = None, path_stem: None = None) -> Figure: ...
@overload
def figure_highway(
    results: Source | Highway, title: str | None = None, path_stem: str | Path = ...
) -> list[Path]: ...
def figure_highway(
    results: Source | Highway, title: str | None = None, path_stem: str | Path | None = None
) -> Figure | list[Path]:
    """Draw what equation 3 describes, in highway networks.

    The panels are (a) single deletions, (b) openness and learned bias of the gates, (c) the parts of the gradient
    through a block, and (d) the gradient along paths with frozen gates.

    Args:
        results: a run of highway networks, its folder, or its summary; or arrays by name: the mean ``openness`` of
            each gate [measurements, n], its ``bias`` [seeds, n], the shares of the gradient through ``skip``,
            ``residual`` and ``gate`` of each block [measurements, n], the norms along paths of the lengths 1 to n,
            ``path_norms`` [measurements, n], and ``deletions``, the error rates without single blocks, as `figure_3`
            takes them.
        title: heading of the figure; by default that of the run.
        path_stem: path of the files to write, without suffix; None to write none.

    Returns:
        The figure, which a notebook shows; with a path, the files written, PNG and SVG.

    Raises:
        ValueError: an argument is of another kind, an array does not fit, or the run holds too little.
        OSError: a file cannot be read or written.

    Example:
        >>> from pathnet import figures
        >>> gates = {"openness": [0.2, 0.3], "bias": [-1.4, -0.9]}
        >>> parts = {"skip": [0.6, 0.5], "residual": [0.3, 0.3], "gate": [0.1, 0.2]}
        >>> norms = {"path_norms": [0.04, 0.01], "deletions": [0.12, 0.31]}
        >>> figure = figures.figure_highway({**gates, **parts, **norms})
        >>> [panel.get_title(loc="left")[:3] for panel in figure.axes[:4]]
        ['(a)', '(b)', '(c)', '(d)']
    """
    source = opened(results)
    summary = highway_of(source)
    named = heading_of(source, title, "highway networks")
    figure, (single, gates, parts, along) = panels(named, 4, rows=2, width=5.5)
    headed(single, "(a) single blocks deleted")
    draw_single(single, {"highway": summary.deletions})
    headed(gates, "(b) gates: openness and learned bias")
    _draw_gates(gates, summary)
    headed(parts, "(c) parts of the gradient through each block")
    _draw_parts(parts, summary)
    headed(along, "(d) along paths with frozen gates")
    lengths = np.arange(1, len(summary.path_norms) + 1)
    mean = np.array([norm.mean for norm in summary.path_norms])
    band(along, lengths, summary.path_norms)
    along.semilogy(lengths, mean, "o", color=BLUE, markersize=3.5, label="mean")
    along.legend(fontsize=8, frameon=False, loc="upper right")
    along.set_ylabel("norm of the path gradient")
    over_lengths(along, len(lengths))
    return saved(figure, path_stem)


def _draw_gates(axes: Axes, summary: Highway) -> None:
    block = np.arange(len(summary.openness))
    mean = np.array([openness.mean for openness in summary.openness])
    band(axes, block, summary.openness)
    axes.plot(block, mean, "o-", color=BLUE, markersize=3.5, linewidth=1, label="mean openness t")
    axes.axhline(0.5, color=DARK, linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1)
    axes.set_ylabel("openness t (1: only the module)")
    over_blocks(axes, len(block), "block")
    biases = axes.twinx()
    biases.plot(block, summary.bias.mean(0), "s:", color=MIDDLE, markersize=3.5, linewidth=1, label="bias")
    biases.set_ylabel("learned bias, mean over channels")
    biases.tick_params(labelsize=8)
    biases.spines["top"].set_visible(False)
    bottom, top = biases.get_ylim()
    biases.set_ylim(bottom - 0.3 * (top - bottom), top + 0.6 * (top - bottom))
    drawn = [*axes.get_legend_handles_labels()[0], *biases.get_legend_handles_labels()[0]]
    axes.legend(handles=drawn, fontsize=8, frameon=False, loc="upper right")


def _draw_parts(axes: Axes, summary: Highway) -> None:
    block = np.arange(len(summary.openness))
    bottom = np.zeros(len(block))
    names = {"skip": "skip, (1 - t) s", "residual": "module, t f", "gate": "gate, (f - s) J_t"}
    for part, colour, hatch in zip(PARTS, (LIGHT, BLUE, MIDDLE), ("", "", "///"), strict=True):
        axes.bar(block, summary.shares[part], 0.8, bottom, color=colour, hatch=hatch, label=names[part])
        bottom += summary.shares[part]
    axes.set_ylabel("share of the sum of the three norms")
    up_to_one(axes, 1.2)
    over_blocks(axes, len(block), "block")
    axes.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)
