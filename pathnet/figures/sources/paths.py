"""Paths that remain after deletions, and paths that training draws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pathnet import paths
from pathnet.experiments import effective_training, remaining_paths
from pathnet.experiments.drawn_paths import DrawnPaths, drawn_paths
from pathnet.experiments.effective_training import EffectiveTraining, compared
from pathnet.experiments.remaining_paths import RemainingPaths
from pathnet.figures.sources.arrays import Arrays, Columns, Frame, by_name
from pathnet.figures.sources.opened import summary_of
from pathnet.figures.style import STYLES
from pathnet.signed import MOST_BLOCKS

__all__ = ["drawn_of", "effective_of", "remaining_of"]


def remaining_of(value: object) -> RemainingPaths:
    """Return the shares of paths that remain after deletions: of a run, or of arrays.

    Args:
        value: the results, as `opened` returns them. Arrays are the number of ``blocks``, some numbers ``deleted`` of
            them, and the shares ``drawn`` at random for each of those and each length [deleted, n + 1], which are
            optional.

    Raises:
        ValueError: it is something else, or an array does not fit.
    """
    return summary_of(value, RemainingPaths, (remaining_paths.NAME,), remaining_paths.summarise, _remaining)


def _remaining(arrays: Arrays) -> RemainingPaths:
    columns = Columns("results", arrays, ("blocks", "deleted"), ("drawn",))
    blocks = columns.integer("blocks", 1, MOST_BLOCKS)
    deleted = columns.integers("deleted", 0, blocks, (0, 1)).reshape(-1).tolist()
    if len(set(deleted)) < len(deleted) or len(deleted) > len(STYLES):
        raise ValueError(f"results['deleted']: expected 1 to {len(STYLES)} different numbers, got {deleted}")
    share = {number: paths.remaining_fraction(blocks, number).numpy() for number in deleted}
    if "drawn" not in columns:
        return RemainingPaths(blocks, share, {})
    drawn = np.atleast_2d(columns.array("drawn", (1, 2), 0, 1))
    if drawn.shape != (len(deleted), blocks + 1):
        expected = [len(deleted), blocks + 1]
        raise ValueError(f"results['drawn']: expected the shape {expected}, got {list(drawn.shape)}")
    return RemainingPaths(blocks, share, dict(zip(deleted, drawn, strict=True)))


def drawn_of(columns: Columns) -> DrawnPaths:
    """Return drawn paths: by ``survival`` probabilities, or ``drawn`` and ``expected`` ones."""
    if "survival" in columns:
        survival = columns.array("survival", least=0, most=1)
        if not survival.all():
            raise ValueError(f"{columns.place('survival')}: expected probabilities above 0, got 0.0")
        return drawn_paths(survival.tolist())
    if not ("drawn" in columns and "expected" in columns):
        raise ValueError(f"{columns.name}: expected 'survival', or 'drawn' and 'expected', got neither")
    columns.same_length("drawn", "expected")
    drawn, expected = columns.integers("drawn", 0), columns.array("expected", least=0, most=1)
    if not drawn.any():
        raise ValueError(f"{columns.place('drawn')}: expected at least one path, got none")
    return DrawnPaths(drawn, expected)


def effective_of(value: object) -> EffectiveTraining:
    """Return errors after training with some of the modules and with all: of a run, or of arrays.

    Args:
        value: the results, as `opened` returns them. Arrays are the number of ``modules`` that each batch trains,
            that of ``blocks``, and the error rates [seeds] of networks trained in ``full`` and of ``effective`` ones,
            these by way of testing if there are several.

    Raises:
        ValueError: it is something else, or an array does not fit.
    """
    names = (effective_training.NAME,)
    return summary_of(value, EffectiveTraining, names, effective_training.summarise, _effective)


def _effective(arrays: Arrays) -> EffectiveTraining:
    columns = Columns("results", arrays, ("modules", "blocks", "full", "effective"))
    blocks = columns.integer("blocks", 1, MOST_BLOCKS)
    modules = columns.integer("modules", 1, blocks)
    full, effective = columns.array("full", (0, 1), 0, 1).reshape(-1), columns["effective"]
    by_way = by_name(effective) if isinstance(effective, Mapping | Frame) else {"as it is": effective}
    tested = Columns(columns.place("effective"), by_way, (), list(by_way))
    if not by_way:
        raise ValueError(f"{columns.place('effective')}: expected error rates, got none")
    rates = {str(name): tested.array(name, (0, 1), 0, 1).reshape(-1) for name in by_way}
    return compared(modules, blocks, full, rates)
