"""The results of a run of path gradients, for each of its methods and compared: how large single path gradients are,
how much of them cancels in their sums, and which share of the gradient each length explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathnet import results
from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.summary import Summary, as_plain, norms_by_batch, summarise
from pathnet.intervals import bootstrap_means, interval
from pathnet.results import Measurements
from pathnet.signed import Judgement, judge, settling_index, tail_index

__all__ = [
    "SUMS",
    "ByBatch",
    "Comparison",
    "Cost",
    "Exact",
    "Means",
    "Signed",
    "compare",
    "compared",
    "path_counts",
]

SUMS = ("norm", "full_norm", "next_cosine", "full_cosine", "share", "left")
"""Columns of exact sums."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Means:
    """Means over batches and the ends of their 95 % intervals, float64 arrays of one shape.

    The intervals come from a bootstrap over whole batches; they are NaN for fewer than ten (`pathnet.intervals`).
    """

    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Exact:
    """Exact sums G_k of all path gradients of a length, and their sum G (`Comparison.gradient`).

    Arrays hold the lengths 0 to n.

    Attributes:
        batches: number of batches.
        norm: norm of G_k.
        full_norm: mean norm of G.
        next_cosine: cosine between G_k and G_{k+1}, for k from 0 to n - 1.
        full_cosine: cosine between G_k and G.
        share: share of G that G_k explains.
        explained: share of G that the lengths up to k explain.
        left: norm of the remainder that the lengths up to k leave, over the norm of G.
    """

    batches: int
    norm: Means
    full_norm: float
    next_cosine: Means
    full_cosine: Means
    share: Means
    explained: Means
    left: Means

    @property
    def product(self) -> Array:
        """Norms of the sums of the lengths 1 to n, scaled to sum to 1: float64 [n]."""
        return _shares(self.norm.mean[1:])

    def first_to_explain(self, share: float) -> int:
        """Return the smallest length k such that the lengths up to k, and up to any longer one, explain ``share``."""
        below = np.flatnonzero(self.explained.mean < share)
        return int(below[-1]) + 1 if len(below) else 0


@dataclass(frozen=True)
class Signed:
    """Signed draws, which estimate the sum of the squared norms of all path gradients of a length.

    Attributes:
        batches: number of batches.
        judgement: whether each mean can be trusted.
        rms: float64 [n + 1], the root mean square of the norm of a path gradient, for the lengths 0 to n.
    """

    batches: int
    judgement: Judgement
    rms: Array

    @property
    def total(self) -> Array:
        """Number of paths times ``rms``, an upper bound of the sum of their norms: float64 [n + 1]."""
        return path_counts(len(self.rms) - 1) * self.rms

    @property
    def product(self) -> Array:
        """``total`` of the lengths 1 to n, scaled to sum to 1: float64 [n]."""
        return _shares(self.total[1:])


@dataclass(frozen=True)
class Cost:
    """Signed draws compared with single sampled paths, as estimates of the mean squared norm of a path gradient.

    One draw costs as much as one path of every length: n (n + 1) / 2 vector-Jacobian products of residual modules.
    Arrays hold the lengths 1 to n.

    Attributes:
        batches: number of batches on which both were measured.
        sampled: float64 [n], the relative standard deviation of the squared norm of one sampled path gradient.
        signed: float64 [n], the relative standard deviation of one draw.
        settled: bool [n], whether the estimate that varied less has a light tail. A heavy tail of the other estimate
            does not matter: it only hides how much more that one varies.
    """

    batches: int
    sampled: Array
    signed: Array
    settled: NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """Results of a run of path gradients; those of methods that the run lacks are None.

    Attributes:
        n: number of blocks.
        sampled: sampled paths.
        exact: exact sums by length.
        signed: signed draws.
        cancelling: for the lengths 1 to n, the norm of the exact sum over the sum of the norms, which is the number
            of paths times their mean norm; 1 if all path gradients point the same way. Taken over the batches where
            both were measured.
        cost: signed draws compared with sampled paths.
        gates: whether the network has gates (highway), which are constants along a path.
    """

    n: int
    sampled: Summary | None = None
    exact: Exact | None = None
    signed: Signed | None = None
    cancelling: Means | None = None
    cost: Cost | None = None
    gates: bool = False

    @property
    def gradient(self) -> str:
        """Name of the sum of all path gradients; no path contains the gradient that flows through gates."""
        return "the gradient with frozen gates" if self.gates else "the gradient"

    def as_json(self) -> dict[str, Any]:
        """Return plain lists and numbers, those of sampled paths at the top level; None for numbers JSON lacks."""
        parts: dict[str, Any] = {
            name: as_plain(asdict(part))
            for name in ("exact", "signed", "cancelling", "cost")
            if (part := getattr(self, name)) is not None
        }
        if self.signed is not None:
            parts["signed"]["trusted"] = self.signed.judgement.trusted.tolist()
        return {"n": self.n, **(self.sampled.as_json() if self.sampled else {}), **parts}


def path_counts(n: int) -> Array:
    """Return the numbers of paths of the lengths 0 to n, float64 [n + 1]."""
    return np.array([float(math.comb(n, length)) for length in range(n + 1)])


def _shares(values: Array) -> Array:
    """Scale values to sum to 1."""
    total = values.sum()
    return np.asarray(values / total) if total > 0 else values


def compare(run: results.Run) -> Comparison:
    """Summarise a run of path gradients by method, and compare the methods.

    Raises:
        ValueError: the run is empty, all norms are zero, or a batch is incomplete.
    """
    results.check_run("run", run)
    n, measurements = run.n, run.measurements()
    sums, draws = run.rows(ExactSum), run.rows(SignedDraw)
    if not (len(measurements) or sums or draws):
        raise ValueError(f"run: {run.folder} holds no measurements yet; start its command again")
    return compared(
        n,
        measurements if len(measurements) else None,
        _by_batch(run, sums, SUMS) if sums else None,
        _by_batch(run, draws, ("squared_norm",)) if draws else None,
        bool(run.fact("model").get("gates")),
    )


@dataclass(frozen=True)
class ByBatch:
    """Columns of exact sums or signed draws.

    Attributes:
        batch: int64 [rows], the number of the batch of each row.
        columns: by name, values for the lengths 0 to n, float64 [rows, n + 1].
    """

    batch: NDArray[np.int64]
    columns: Mapping[str, Array]


def compared(
    n: int, sampled: Measurements | None, sums: ByBatch | None, draws: ByBatch | None, gates: bool = False
) -> Comparison:
    """Summarise the measurements of each method on a network of n blocks, and compare the methods.

    Raises:
        ValueError: all norms are zero.
    """
    exact = _exact(sums.columns) if sums is not None else None
    signed = _signed(draws, sums) if draws is not None else None
    if sampled is None:
        return Comparison(n, None, exact, signed, gates=gates)
    numbers, norms = norms_by_batch(sampled, n)
    cancelling = cost = None
    if sums is not None:
        shared, of_norms, of_sums = np.intersect1d(numbers, sums.batch, return_indices=True)
        if len(shared):
            if len(np.unique(numbers)) < len(numbers):
                norms_of_batches = np.array([_mean(norms[numbers == number]) for number in shared])
            else:
                norms_of_batches = norms[of_norms]
            cancelling = _cancelling(norms_of_batches, sums.columns["norm"][of_sums, 1:])
    if draws is not None and signed is not None:
        shared = np.intersect1d(numbers, draws.batch)
        if len(shared):
            trusted = signed.judgement.trusted[1:]
            estimates = draws.columns["squared_norm"][np.isin(draws.batch, shared), 1:]
            cost = replace(_cost(norms[np.isin(numbers, shared)], estimates, trusted), batches=len(shared))
    return Comparison(n, summarise(sampled, n), exact, signed, cancelling, cost, gates)


def _mean(norms: Array) -> Array:
    """Return the mean of each column of [rows, n], NaN where nothing was measured."""
    measured = np.isfinite(norms).sum(0)
    return np.asarray(np.nansum(norms, 0) / np.where(measured > 0, measured, np.nan))


def _by_batch(run: results.Run, rows: Sequence[ExactSum] | Sequence[SignedDraw], names: Sequence[str]) -> ByBatch:
    """Return fields of rows, which are sorted by length last."""
    lengths = np.array([row.length for row in rows], np.int64)
    if len(rows) % (run.n + 1) or (lengths != np.arange(len(rows)) % (run.n + 1)).any():
        raise ValueError(f"run: the parts in {run.folder / 'measurements'} hold a batch that lacks some lengths")
    columns = {name: np.array([getattr(row, name) for row in rows], np.float64) for name in names}
    batch = np.array([row.batch for row in rows[:: run.n + 1]])
    return ByBatch(batch, {name: column.reshape(-1, run.n + 1) for name, column in columns.items()})


def _exact(columns: Mapping[str, Array]) -> Exact:
    norm, full_norm, share = (columns[name] for name in ("norm", "full_norm", "share"))
    if not full_norm.any():
        raise ValueError(f"run: expected a gradient above zero on some batch, got none on {len(norm)} (exact sums)")
    return Exact(
        batches=len(norm),
        norm=_means(norm),
        full_norm=float(full_norm[:, 0].mean()),
        next_cosine=_means(columns["next_cosine"][:, :-1]),
        full_cosine=_means(columns["full_cosine"]),
        share=_means(share),
        explained=_means(share.cumsum(1)),
        left=_means(columns["left"]),
    )


def _signed(draws: ByBatch, sums: ByBatch | None) -> Signed:
    """Summarise signed draws; the exact sums on their batches help to judge them."""
    estimates = draws.columns["squared_norm"]
    unknown = np.full(estimates.shape[1], np.nan)
    squares = {} if sums is None else dict(zip(sums.batch.tolist(), sums.columns["norm"] ** 2, strict=True))
    known = np.array([squares.get(number, unknown) for number in draws.batch.tolist()])
    judgement = judge(estimates, known, draws.batch)
    rms = np.sqrt(judgement.mean / path_counts(estimates.shape[1] - 1))
    return Signed(len(np.unique(draws.batch)), judgement, rms)


def _means(values: Array) -> Means:
    """Return the means of values [batches, m] over batches, leaving out NaN and infinities."""
    measured = np.isfinite(values)
    filled = np.where(measured, values, 0.0)
    largest = np.abs(filled).max(0)
    scale = np.where(largest > 0, largest, 1.0)
    with np.errstate(invalid="ignore"):
        mean = (filled / scale).sum(0) / measured.sum(0) * scale
        low, high = interval(bootstrap_means(filled / scale, measured), measured.sum(0)) * scale
    return Means(mean, low, high)


def _cancelling(norms: Array, sums: Array) -> Means:
    """Return the norms of the exact sums over the sums of the norms of all path gradients.

    Args:
        norms: [batches, n], along one path of every length.
        sums: [batches, n], the norms of the exact sums.
    """
    n, measured = norms.shape[1], np.isfinite(norms)
    filled = np.where(measured, norms, 0.0)
    scales = [np.where(values.max(0) > 0, values.max(0), 1.0) for values in (filled, sums)]
    both = np.concatenate([filled / scales[0], sums / scales[1]], 1), np.concatenate([measured, sums >= 0], 1)
    factor = np.exp(np.log(scales[1]) - np.log(scales[0]) - np.log(path_counts(n)[1:]))

    def ratio(means: Array) -> Array:
        return np.asarray(means[..., n:] / means[..., :n] * factor)

    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = interval(ratio(bootstrap_means(*both)), measured.sum(0))
        return Means(ratio(both[0].sum(0) / both[1].sum(0)), low, high)


def _cost(norms: Array, estimates: Array, trusted: NDArray[np.bool_]) -> Cost:
    """Compare signed draws with sampled paths on the same batches.

    Args:
        norms: [rows, n], along one path of every length.
        estimates: [draws, n], signed draws.
        trusted: [n], whether the mean of the draws can be trusted.
    """
    squares = [column[np.isfinite(column)] for column in (_scaled(norms) ** 2).T]
    light = [tail_index(column) < settling_index(len(column)) for column in squares]
    of_paths = np.array([_relative_deviation(column) for column in squares])
    of_draws = np.array([_relative_deviation(column) for column in _scaled(estimates).T])
    return Cost(len(norms), of_paths, of_draws, np.where(of_draws < of_paths, trusted, light))


def _scaled(values: Array) -> Array:
    """Scale each column to a largest value of 1, so squares stay in range."""
    largest = np.nan_to_num(values).max(0)
    return np.asarray(values / np.where(largest > 0, largest, 1.0))


def _relative_deviation(values: Array) -> float:
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 and values.any() else np.nan
