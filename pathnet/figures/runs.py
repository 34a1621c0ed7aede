"""The figures of a run, for each experiment: drawn into the run's folder, as PNG and SVG, under a heading."""

from __future__ import annotations

from pathlib import Path

from pathnet import results
from pathnet.experiments.comparison import compare
from pathnet.figures.gates import figure_highway
from pathnet.figures.gradients import figure_6
from pathnet.figures.lesions import figure_3, figure_5a, figure_5b, figure_8
from pathnet.figures.paths import figure_1, figure_2, figure_7, figure_effective
from pathnet.figures.sums import figure_sums

__all__ = [
    "draw_effective_training",
    "draw_highway",
    "draw_lesion_many",
    "draw_lesion_reorder",
    "draw_lesion_single",
    "draw_lesion_stochastic_depth",
    "draw_path_gradients",
    "draw_remaining_paths",
    "draw_unraveled",
]


def draw_path_gradients(run: results.Run, heading: str) -> list[Path]:
    """Draw Figure 6 where the run holds sampled or signed paths, and the exact sums where it holds those."""
    result, files = compare(run), list[Path]()
    if result.sampled is not None or result.signed is not None:
        files += figure_6(result, heading, run.figure_stem("figure-6"))
    if result.exact is not None:
        files += figure_sums(result, heading, run.figure_stem("exact-sums"))
    return files


def draw_lesion_single(run: results.Run, heading: str) -> list[Path]:
    """Draw Figure 3."""
    return figure_3(run, heading, run.figure_stem("figure-3"))


def draw_lesion_many(run: results.Run, heading: str) -> list[Path]:
    """Draw Figure 5 (a)."""
    return figure_5a(run, heading, run.figure_stem("figure-5a"))


def draw_lesion_reorder(run: results.Run, heading: str) -> list[Path]:
    """Draw Figure 5 (b)."""
    return figure_5b(run, heading, run.figure_stem("figure-5b"))


def draw_lesion_stochastic_depth(run: results.Run, heading: str) -> list[Path]:
    """Draw Figure 8."""
    return figure_8(run, heading, run.figure_stem("figure-8"))


def draw_effective_training(run: results.Run, heading: str) -> list[Path]:
    """Draw the errors of networks trained with some of their modules per batch, and the paths that were drawn."""
    return figure_effective(run, heading, run.figure_stem("effective-training"))


def draw_remaining_paths(run: results.Run, _: str) -> list[Path]:
    """Draw Figure 7, which is of no network: its heading is the number of blocks."""
    return figure_7(run, None, run.figure_stem("figure-7"))


def draw_highway(run: results.Run, heading: str) -> list[Path]:
    """Draw lesions, gates and gradients of highway networks."""
    return figure_highway(run, heading, run.figure_stem("highway"))


def draw_unraveled(run: results.Run, _: str) -> list[Path]:
    """Draw Figures 1 and 2, which are the same for every network."""
    return [*figure_1(run.figure_stem("figure-1")), *figure_2(run.figure_stem("figure-2"))]
