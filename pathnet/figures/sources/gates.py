"""Measurements of highway networks."""

from __future__ import annotations

import numpy as np

from pathnet.experiments import highway
from pathnet.experiments.errors import spread
from pathnet.experiments.highway import PARTS, Highway
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.figures.sources.arrays import Arrays, Columns
from pathnet.figures.sources.lesions import deletions_of
from pathnet.figures.sources.opened import summary_of

__all__ = ["highway_of"]


def highway_of(value: object) -> Highway:
    """Return the measurements of highway networks: of a run, or of arrays.

    Args:
        value: the results, as `opened` returns them. Arrays are the mean ``openness`` of each gate [measurements, n],
            the ``bias`` of each gate [seeds, n], the shares of the gradient through ``skip``, ``residual`` and
            ``gate`` of each block [measurements, n], the norms along paths of the lengths 1 to n, ``path_norms``
            [measurements, n], and ``deletions`` (see `deletions_of`).

    Raises:
        ValueError: it is something else, or an array does not fit.
    """
    return summary_of(value, Highway, (highway.NAME,), highway.summarise, _of_arrays)


def _of_arrays(arrays: Arrays) -> Highway:
    columns = Columns("results", arrays, ("openness", "bias", *PARTS, "path_norms", "deletions"))
    openness = np.atleast_2d(columns.array("openness", (1, 2), 0, 1))
    tables = {name: np.atleast_2d(columns.array(name, (1, 2))) for name in ("bias", *PARTS, "path_norms")}
    n = openness.shape[1]
    for name, table in tables.items():
        if table.shape[1] != n:
            raise ValueError(f"{columns.place(name)}: expected {n} columns, as in openness, got {table.shape[1]}")
    unknown = spread([np.nan])
    return Highway(
        openness=[spread(column) for column in openness.T],
        bias=tables["bias"],
        shares={part: np.array([column.mean() for column in tables[part].T]) for part in PARTS},
        path_norms=[spread(column) for column in tables["path_norms"].T],
        frozen=unknown,
        parts_off=np.nan,
        half_off=np.nan,
        deletions=_one_kind(columns),
    )


def _one_kind(columns: Columns) -> SingleDeletions:
    """Return single deletions of highway networks, by kind of network or without."""
    value = columns["deletions"]
    kinds = value if isinstance(value, dict) and "highway" in value else {"highway": value}
    return deletions_of(kinds, columns.place("deletions"))["highway"]
