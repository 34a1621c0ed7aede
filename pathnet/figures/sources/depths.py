"""Effective depths by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pathnet.checks import described
from pathnet.effective_depth import Depth, read
from pathnet.figures.sources.arrays import Columns, Frame

__all__ = ["depths_of"]

NEEDED = ("step", "depth", "first", "last", "half", "loss")


def depths_of(value: object) -> Sequence[Depth]:
    """Return measured depths: of a CSV file, a list, or arrays by the names of the attributes of `Depth`.

    Raises:
        ValueError: it is something else, or the file holds something else.
        OSError: the file cannot be read.
    """
    if isinstance(value, str | Path):
        return read(value)
    if isinstance(value, Mapping | Frame):
        columns = Columns("results", value, NEEDED, ("seconds",))
        columns.same_length(*NEEDED)
        step, first, last, half = (columns.integers(name, -1).tolist() for name in ("step", "first", "last", "half"))
        depth, loss = (columns.array(name, nan=True).tolist() for name in ("depth", "loss"))
        seconds = [np.nan] * len(step)
        return [Depth(*row) for row in zip(step, depth, first, last, half, loss, seconds, strict=True)]
    if not isinstance(value, Sequence) or not all(isinstance(row, Depth) for row in value):
        forms = "a list of Depths, as read returns it, its file, or arrays by name"
        raise ValueError(f"results: expected {forms}, got {described(value)}")
    return value
