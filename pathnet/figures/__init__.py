"""Runs in, figures and tables out."""

from __future__ import annotations

from pathnet.extras import require

require("matplotlib", "pathnet.figures draws with matplotlib")
require("rich", "pathnet.figures prints tables with rich")

from collections.abc import Callable
from pathlib import Path

from pathnet import results
from pathnet.experiments import (
    by_size,
    effective_training,
    highway,
    lesion_many,
    lesion_reorder,
    lesion_single,
    lesion_stochastic_depth,
    path_gradients,
    remaining_paths,
    unraveled,
)
from pathnet.experiments.comparison import compare
from pathnet.experiments.drawn_paths import drawn_paths
from pathnet.experiments.run import title
from pathnet.figures.depth import figure_depth
from pathnet.figures.gates import figure_highway
from pathnet.figures.gradients import figure_6, table_6
from pathnet.figures.lesions import figure_3, figure_5a, figure_5b, figure_8
from pathnet.figures.paths import figure_1, figure_2, figure_7, figure_effective
from pathnet.figures.sums import figure_sums, table_exact, table_signed

__all__ = ["draw", "figure_6", "figure_depth", "figure_sums", "table_6", "table_exact", "table_signed"]


def draw(run: results.Run) -> list[Path]:
    """Draws the figures of a run into its folder; the files written, PNG and SVG of each figure.

    Raises:
        ValueError: the run is of an experiment that is not known, or holds too little.
    """
    results.check_run("run", run)
    if run.experiment not in DRAW:
        raise ValueError(f"run: {run.folder} is of {run.experiment!r}; expected one of {', '.join(DRAW)}")
    return DRAW[run.experiment](run, title(run.identity))


def _figure_6(run: results.Run, heading: str) -> list[Path]:
    result, files = compare(run), list[Path]()
    if result.sampled is not None or result.signed is not None:
        files += figure_6(result, heading, run.figure_stem("figure-6"))
    if result.exact is not None:
        files += figure_sums(result, result.exact, heading, run.figure_stem("exact-sums"))
    return files


def _figure_3(run: results.Run, heading: str) -> list[Path]:
    return figure_3(lesion_single.summarise(run), heading, run.figure_stem("figure-3"))


def _figure_8(run: results.Run, heading: str) -> list[Path]:
    survival = run.fact("networks", "stochastic depth", 0, "survival")
    return figure_8(lesion_single.summarise(run), drawn_paths(survival), heading, run.figure_stem("figure-8"))


def _figure_5a(run: results.Run, heading: str) -> list[Path]:
    return figure_5a(by_size.summarise(run), heading, run.figure_stem("figure-5a"))


def _figure_5b(run: results.Run, heading: str) -> list[Path]:
    return figure_5b(by_size.summarise(run), heading, run.figure_stem("figure-5b"))


def _figure_7(run: results.Run, heading: str) -> list[Path]:
    found = remaining_paths.summarise(run)
    return figure_7(found, f"{found.blocks} blocks", run.figure_stem("figure-7"))


def _effective(run: results.Run, heading: str) -> list[Path]:
    return figure_effective(effective_training.summarise(run), heading, run.figure_stem("effective-training"))


def _highway(run: results.Run, heading: str) -> list[Path]:
    return figure_highway(highway.summarise(run), heading, run.figure_stem("highway"))


def _unraveled(run: results.Run, heading: str) -> list[Path]:
    return [*figure_1(run.figure_stem("figure-1")), *figure_2(run.figure_stem("figure-2"))]


DRAW: dict[str, Callable[[results.Run, str], list[Path]]] = {
    path_gradients.NAME: _figure_6,
    lesion_single.NAME: _figure_3,
    lesion_many.NAME: _figure_5a,
    lesion_reorder.NAME: _figure_5b,
    lesion_stochastic_depth.NAME: _figure_8,
    effective_training.NAME: _effective,
    remaining_paths.NAME: _figure_7,
    highway.NAME: _highway,
    unraveled.NAME: _unraveled,
}
