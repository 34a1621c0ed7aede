"""Path gradients by length: of sampled paths, exact sums and signed draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pathnet.checks import described
from pathnet.experiments import path_gradients
from pathnet.experiments.comparison import SUMS, ByBatch, Comparison, compare, compared
from pathnet.experiments.summary import Summary
from pathnet.figures.sources.arrays import Arrays, Columns, Frame
from pathnet.figures.sources.opened import summary_of
from pathnet.gradients import LengthSums
from pathnet.results import LARGEST, Measurements
from pathnet.signed import MOST_BLOCKS

__all__ = ["comparison_of"]

MOST_BATCHES = 2**31 - 1


def comparison_of(value: object) -> Comparison:
    """Return the results of path gradients: of a run, or of arrays.

    Arrays of sampled paths are those of the run's files: ``length`` and ``norm`` of each path, and ``batch``, the
    number of the batch, by default one for all. ``blocks`` is the number n of blocks, by default the greatest
    length. ``exact`` are exact sums, a `LengthSums` for each batch or the columns of `ExactSum`, and ``signed``
    signed draws, the columns of `SignedDraw`.

    Args:
        value: the results, as `opened` returns them; also a `Summary` or `Measurements` of sampled paths, or a list
            of `LengthSums`.

    Raises:
        ValueError: it is something else, or an array does not fit.
    """
    if isinstance(value, Summary):
        return Comparison(value.n, value)
    if isinstance(value, Measurements):
        value = {
            "blocks": value.path.shape[1],
            **{name: getattr(value, name) for name in ("length", "norm", "batch")},
        }
    if isinstance(value, LengthSums):
        value = [value]
    if isinstance(value, Sequence) and value and all(isinstance(sums, LengthSums) for sums in value):
        value = {"exact": value}
    return summary_of(value, Comparison, (path_gradients.NAME,), compare, _of_arrays)


def _of_arrays(arrays: Arrays) -> Comparison:
    optional = ("length", "norm", "batch", "blocks", "exact", "signed", "gates", "path", "engine")
    columns = Columns("results", arrays, (), optional)
    if not ("norm" in columns or "exact" in columns or "signed" in columns):
        raise ValueError("results: expected arrays 'length' and 'norm', or 'exact' or 'signed', got none of them")
    exact, signed = (_by_length(columns, name) if name in columns else None for name in ("exact", "signed"))
    sizes = {
        values.columns[first].shape[1] - 1 for values, first in ((exact, "norm"), (signed, "squared_norm")) if values
    }
    if "blocks" in columns:
        sizes.add(columns.integer("blocks", 1, MOST_BLOCKS))
    if len(sizes) > 1:
        raise ValueError(f"results['blocks']: expected one number of blocks, got {sorted(sizes)}")
    sampled = None
    if "norm" in columns:
        sampled = _sampled(columns, next(iter(sizes), None))
        sizes.add(sampled.path.shape[1])
    if exact and not exact.columns["full_norm"].any():
        raise ValueError("results['exact']: expected a gradient above zero on some batch, got none")
    return compared(sizes.pop(), sampled, exact, signed, columns.flag("gates"))


def _sampled(columns: Columns, blocks: int | None) -> Measurements:
    if "length" not in columns:
        raise ValueError("results: expected an array 'length' beside 'norm', got none")
    columns.same_length("norm", "length", "batch")
    norm = columns.array("norm", least=0, most=LARGEST)
    length = columns.integers("length", 1, blocks or MOST_BLOCKS)
    if not norm.any():
        raise ValueError(f"results['norm']: expected some norms above zero, got none among {len(norm)}")
    batch = columns.integers("batch", 0, MOST_BATCHES) if "batch" in columns else np.zeros(len(norm), np.int64)
    n = blocks or int(length.max())
    # The summary does not read codes and engines, which a caller need not have.
    codes = np.broadcast_to(np.uint8(0), (len(norm), n))
    order = np.lexsort((length, batch))
    return Measurements(
        batch[order].astype(np.int32), length[order].astype(np.int16), codes, norm[order], [""] * len(norm)
    )


def _by_length(columns: Columns, name: str) -> ByBatch:
    """Return the columns of exact sums or signed draws, with a row for each batch or draw."""
    value, place = columns[name], columns.place(name)
    if name == "exact" and isinstance(value, Sequence) and all(isinstance(sums, LengthSums) for sums in value):
        value = _of_sums(place, value)
    keys = ("batch",) if name == "exact" else ("batch", "draw")
    fields = SUMS if name == "exact" else ("squared_norm",)
    flat = Columns(place, value, (*keys, "length", *fields), ("engine",))
    flat.same_length(*keys, "length", *fields)
    length, numbers = flat.integers("length", 0, MOST_BLOCKS), [flat.integers(key, 0) for key in keys]
    n, order = int(length.max()), np.lexsort((length, *reversed(numbers)))
    rows = len(length) // (n + 1)
    whole = len(length) == rows * (n + 1) and (length[order] == np.tile(np.arange(n + 1), rows)).all()
    if not whole or any(np.ptp(number[order].reshape(rows, -1), 1).any() for number in numbers):
        raise ValueError(f"{place}: expected the lengths 0 to {n} once for each {' and '.join(keys)}, got others")
    values = {field: flat.array(field, (1,), *_bounds(field))[order].reshape(rows, n + 1) for field in fields}
    return ByBatch(numbers[0][order][:: n + 1], values)


def _bounds(field: str) -> tuple[float, float, bool]:
    """Return the least and the most value of a column, and whether it may hold NaN, which is undefined."""
    return (0.0, LARGEST, False) if field.endswith("norm") else (-math.inf, math.inf, True)


def _of_sums(place: str, sums: Sequence[LengthSums]) -> Frame | dict[str, object]:
    sizes = {len(of_batch.norm) for of_batch in sums}
    if len(sizes) != 1:
        raise ValueError(f"{place}: expected sums for the same lengths on every batch, got {described(sums)}")
    (size,), batches = sizes, range(len(sums))
    tables = {name: [np.asarray(getattr(each, name), np.float64) for each in sums] for name in SUMS}
    tables["full_norm"] = [np.full(size, each.full_norm) for each in sums]
    tables["next_cosine"] = [np.append(cosine, np.nan) for cosine in tables["next_cosine"]]
    columns: dict[str, object] = {name: np.concatenate(table) for name, table in tables.items()}
    return {"batch": np.repeat(batches, size), "length": np.tile(np.arange(size), len(sums)), **columns}
