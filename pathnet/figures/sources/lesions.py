"""Error rates of lesioned networks: single deletions, and random lesions by size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy

from pathnet.experiments import by_size, highway, lesion_many, lesion_reorder, lesion_single, lesion_stochastic_depth
from pathnet.experiments.by_size import ErrorBySize
from pathnet.experiments.errors import spread
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.experiments.lesion_stochastic_depth import StochasticDepth, stochastic_depth
from pathnet.figures.sources.arrays import Array, Arrays, Columns, Frame, by_name
from pathnet.figures.sources.opened import summary_of
from pathnet.figures.sources.paths import drawn_of
from pathnet.figures.style import STYLES
from pathnet.intervals import wilson
from pathnet.lesion import Errors
from pathnet.signed import MOST_BLOCKS

__all__ = ["deletions_of", "errors_of", "stochastic_depth_of"]

SINGLE = (lesion_single.NAME, lesion_stochastic_depth.NAME, highway.NAME)


def deletions_of(value: object, name: str = "results") -> Mapping[str, SingleDeletions]:
    """Return the error rates without single blocks by kind of network: of a run, or of arrays.

    Args:
        value: the results, as `opened` returns them. By kind, `SingleDeletions`, `pathnet.lesion.Errors`, error rates
            [n] or [seeds, n], or arrays by name: ``rate``, or the numbers ``wrong`` of ``images``; and ``intact``
            rates [seeds], ``images`` for intervals, or their ends ``low`` and ``high``, ``downsampling`` blocks, the
            rate of ``chance``, and the number of the ``first`` block, all optional.
        name: name of the argument in errors.

    Raises:
        ValueError: it is something else, or an array does not fit.
    """

    def of_kinds(kinds: Arrays) -> dict[str, SingleDeletions]:
        of_kind = by_name(kinds)
        if not 1 <= len(of_kind) <= len(STYLES):
            expected = f"1 to {len(STYLES)} kinds of network"
            raise ValueError(f"{name}: expected error rates by {expected}, got {len(of_kind)}")
        return {str(kind): _single(f"{name}[{kind!r}]", rates) for kind, rates in of_kind.items()}

    if isinstance(value, StochasticDepth):
        return value.deletions
    if isinstance(value, Mapping):
        return of_kinds(value)
    return summary_of(value, None, SINGLE, lesion_single.summarise, of_kinds)


def _single(place: str, value: Any) -> SingleDeletions:
    if isinstance(value, SingleDeletions):
        return value
    if isinstance(value, Errors):
        value = {"wrong": value.wrong, "images": value.images}
    if not isinstance(value, Mapping | Frame):
        value = {"rate": value}
    optional = ("rate", "wrong", "images", "intact", "low", "high", "downsampling", "chance", "first")
    columns = Columns(place, value, (), optional)
    images = columns.integer("images", 1, 2**53) if "images" in columns else None
    if "wrong" in columns and images is not None:
        wrong = columns.integers("wrong", 0, images, (1, 2))
        rate = wrong / images
    elif "rate" in columns:
        rate = columns.array("rate", (1, 2), 0, 1)
        wrong = np.rint(rate * (images or 0)).astype(np.int64)
    else:
        raise ValueError(f"{place}: expected 'rate', or 'wrong' and 'images', got neither")
    rate, wrong = np.atleast_2d(rate), np.atleast_2d(wrong)
    seeds, n = rate.shape
    if images is not None:
        ends = np.array([[wilson(int(count), images) for count in of_seed] for of_seed in wrong])
        low, high = np.moveaxis(ends, -1, 0)
    else:
        low, high = (_like(columns, end, rate) for end in ("low", "high"))
    if columns.is_table or "intact" not in columns:
        intact = np.array(columns.number("intact", np.nan, 0, 1))
    else:
        intact = columns.array("intact", (0, 1), 0, 1)
    if intact.size not in (1, seeds):
        raise ValueError(f"{columns.place('intact')}: expected the rates of {seeds} networks, got {intact.size}")
    changing = columns.integers("downsampling", 0, n - 1).tolist() if columns.rows("downsampling") else []
    return SingleDeletions(
        rate,
        low,
        high,
        np.broadcast_to(intact.reshape(-1), seeds),
        tuple(changing),
        columns.number("chance", np.nan, 0, 1),
        columns.integer("first", 0, MOST_BLOCKS) if "first" in columns else 0,
        images,
    )


def _like(columns: Columns, column: str, rate: Array) -> Array:
    """Return rates of the same shape; NaN if there are none."""
    if column not in columns:
        return np.full_like(rate, np.nan)
    values = np.atleast_2d(columns.array(column, (1, 2), 0, 1))
    if values.shape != rate.shape:
        raise ValueError(f"{columns.place(column)}: expected the shape {list(rate.shape)}, got {list(values.shape)}")
    return values


def stochastic_depth_of(value: object) -> StochasticDepth:
    """Return the numbers of Figure 8: of a run, or of arrays.

    Args:
        value: the results, as `opened` returns them. Arrays are ``deletions`` (see `deletions_of`), and the
            ``survival`` probability of each module, from which paths are drawn, or the number of steps that ``drawn``
            paths of each length [n + 1] took and the ``expected`` shares.

    Raises:
        ValueError: it is something else, or an array does not fit.
    """

    def of_arrays(arrays: Arrays) -> StochasticDepth:
        columns = Columns("results", arrays, ("deletions",), ("survival", "drawn", "expected"))
        return StochasticDepth(deletions_of(columns["deletions"], columns.place("deletions")), drawn_of(columns))

    names = (lesion_stochastic_depth.NAME,)
    return summary_of(value, StochasticDepth, names, stochastic_depth, of_arrays)


def errors_of(value: object, figure: str) -> ErrorBySize:
    """Return the error rates of random lesions by size: of a run, or of arrays.

    Args:
        value: the results, as `opened` returns them. Arrays hold for each lesion its error ``rate`` and its ``size``;
            Figure 5 (b) needs Kendall's ``tau``, or the ``order`` of the blocks [lesions, n], and can do without the
            size. Others are the ``seed`` of each network, the number of ``blocks``, which Figure 5 (a) needs, and
            the rates ``intact`` and ``chance``.
        figure: ``5a`` or ``5b``.

    Raises:
        ValueError: it is something else, or an array does not fit.
    """
    experiment = lesion_many.NAME if figure == "5a" else lesion_reorder.NAME
    of_arrays = _errors_by_deletions if figure == "5a" else _errors_by_swaps
    return summary_of(value, ErrorBySize, (experiment,), by_size.summarise, of_arrays)


def _errors_by_deletions(arrays: Arrays) -> ErrorBySize:
    columns = Columns("results", arrays, ("size", "rate", "blocks"), ("seed", "intact", "chance"))
    blocks = columns.integer("blocks", 1, MOST_BLOCKS)
    rate = columns.array("rate", least=0, most=1)
    return _by_size(columns, columns.integers("size", 1, blocks), np.ones_like(rate), blocks)


def _errors_by_swaps(arrays: Arrays) -> ErrorBySize:
    optional = ("tau", "order", "size", "seed", "intact", "chance", "blocks")
    columns = Columns("results", arrays, ("rate",), optional)
    if ("tau" in columns) == ("order" in columns):
        raise ValueError("results: expected an array 'tau' or 'order', got both or neither")
    columns.same_length("rate", "tau", "order")
    rate = columns.array("rate", least=0, most=1)
    blocks = columns.integer("blocks", 1, MOST_BLOCKS) if "blocks" in columns else 1
    if "order" in columns:
        order = columns.integers("order", 0, dimensions=(2,))
        blocks = order.shape[1]
        if (np.sort(order, 1) != np.arange(blocks)).any():
            raise ValueError(f"results['order']: expected orders of the blocks 0 to {blocks - 1}, got others")
        tau = np.array([scipy.stats.kendalltau(np.arange(blocks), each).statistic for each in order])
    else:
        tau = columns.array("tau", least=-1, most=1)
    size = columns.integers("size", 1) if "size" in columns else np.zeros(len(rate), np.int64)
    return _by_size(columns, size, tau, blocks)


def _by_size(columns: Columns, size: np.ndarray, tau: Array, blocks: int) -> ErrorBySize:
    columns.same_length("rate", "size", "seed")
    rate = columns.array("rate", least=0, most=1)
    seed = columns.integers("seed", 0) if "seed" in columns else np.zeros(len(rate), np.int64)
    sizes = np.unique(size).tolist()
    rates = [rate[size == each] for each in sizes]
    _, draws = np.unique(np.stack([size, seed]), axis=1, return_counts=True)
    return ErrorBySize(
        sizes,
        rates,
        [tau[size == each] for each in sizes],
        list(map(spread, rates)),
        columns.number("intact", np.nan, 0, 1),
        columns.number("chance", np.nan, 0, 1),
        blocks,
        int(draws.max()),
        len(np.unique(seed)),
    )
