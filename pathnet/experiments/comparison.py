"""What a run of path gradients came to by each of its methods, and side by side: how large the gradients along single
paths are, how much of them cancels in their sums, and what the lengths have of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathnet import results
from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.signed import Judgement, judge, settling_index, tail_index
from pathnet.experiments.summary import (
    Summary,
    as_plain,
    norms_by_batch,
    summarise,
)
from pathnet.intervals import bootstrap_means, interval

__all__ = ["Cost", "Exact", "Found", "Means", "Signed", "found", "path_counts"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Means:
    """Means over batches, and the ends of their 95 % intervals from a bootstrap over whole batches (NaN of fewer than
    ten, see `pathnet.intervals`): float64 arrays of one shape."""

    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Exact:
    """The exact sums G_k of the gradients of all paths of a length, and G, their sum (`Found.gradient`); arrays for
    the lengths 0 to n.

    Attributes:
        norm: of G_k.
        full_norm: of G, the mean.
        next_cosine: between G_k and G_{k+1}, for k from 0 to n - 1.
        full_cosine: between G_k and G.
        share: of G that G_k explains.
        explained: the share of G that the lengths up to k explain.
        left: the norm of what they leave of G, over that of G.
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
        """float64 [n]: the norms of the sums of the lengths 1 to n, scaled to sum to 1."""
        return _of_total(self.norm.mean[1:])

    def first_to_explain(self, share: float) -> int:
        """The smallest length up to which that share of G is explained, and no less by any longer ones."""
        below = np.flatnonzero(self.explained.mean < share)
        return int(below[-1]) + 1 if len(below) else 0


@dataclass(frozen=True)
class Signed:
    """Signed draws, which estimate sums over all paths of a length of squared norms; arrays for the lengths 0 to n.

    Attributes:
        rms: float64 [n + 1], the root of the mean square of a path's norm.
    """

    batches: int
    judgement: Judgement
    rms: Array

    @property
    def total(self) -> Array:
        """float64 [n + 1]: the number of paths times ``rms``, which the sum of their norms is at most."""
        return path_counts(len(self.rms) - 1) * self.rms

    @property
    def product(self) -> Array:
        """float64 [n]: ``total`` of the lengths 1 to n, scaled to sum to 1."""
        return _of_total(self.total[1:])


@dataclass(frozen=True)
class Cost:
    """Signed draws beside single sampled paths, both as estimates of the mean squared norm of a path of a length. One
    draw costs what one path of every length costs: n (n + 1) / 2 module backwards. Arrays for the lengths 1 to n.

    Attributes:
        batches: on which both were measured.
        sampled: float64 [n], the relative standard deviation of the square of one sampled path's norm.
        signed: float64 [n], that of one draw.
        settled: bool [n], whether the one that varied less has a light tail; a heavy tail of the other only hides how
            much more that one varies.
    """

    batches: int
    sampled: Array
    signed: Array
    settled: NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """What a run of path gradients came to, by each of the methods that it holds.

    Attributes:
        cancelling: for the lengths 1 to n the norm of the exact sum over the sum of the norms, the number of paths
            times the mean norm: 1 where all paths point one way. On the batches where both were measured.
        gates: whether the network has gates (highway), which paths take for constants.
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
        """What all paths add up to, in words: what flows through gates themselves is in none of them."""
        return "the gradient with frozen gates" if self.gates else "the gradient"

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers, what was sampled on top; None for what JSON does not have."""
        parts: dict[str, Any] = {
            name: as_plain(asdict(part))
            for name in ("exact", "signed", "cancelling", "cost")
            if (part := getattr(self, name)) is not None
        }
        if self.signed is not None:
            parts["signed"]["trusted"] = self.signed.judgement.trusted.tolist()
        return {"n": self.n, **(self.sampled.as_json() if self.sampled else {}), **parts}


def path_counts(n: int) -> Array:
    """float64 [n + 1]: how many paths there are of the lengths 0 to n."""
    return np.array([float(math.comb(n, length)) for length in range(n + 1)])


def _of_total(values: Array) -> Array:
    total = values.sum()
    return np.asarray(values / total) if total > 0 else values


def found(run: results.Run) -> Found:
    """Reduces what a run of path gradients holds.

    Raises:
        ValueError: the run holds nothing, all norms are zero, or a batch is not complete.
    """
    results.check_run("run", run)
    n, measurements = run.n, run.measurements()
    gates = bool(run.fact("model").get("gates"))
    sums, draws = run.rows(ExactSum), run.rows(SignedDraw)
    batch_of_draw = np.array([row.batch for row in draws[:: n + 1]])
    if not (len(measurements) or sums or draws):
        raise ValueError(f"run: {run.folder} holds no measurements yet; start its command again")
    exact = _exact(run, sums) if sums else None
    estimates = _by_length(run, draws, "squared_norm")
    squares = {row.batch: own for row, own in zip(sums[:: n + 1], _by_length(run, sums, "norm") ** 2, strict=True)}
    signed = _signed(estimates, batch_of_draw, squares) if draws else None
    if not len(measurements):
        return Found(n, None, exact, signed, gates=gates)
    numbers, norms = norms_by_batch(measurements, n)
    cancelling = cost = None
    if sums:
        shared, own, others = np.intersect1d(numbers, [row.batch for row in sums[:: n + 1]], return_indices=True)
        if len(shared):
            cancelling = _cancelling(norms[own], _by_length(run, sums, "norm")[others, 1:])
    if draws and signed is not None:
        shared = np.intersect1d(numbers, batch_of_draw)
        if len(shared):
            trusted = signed.judgement.trusted[1:]
            cost = _cost(norms[np.isin(numbers, shared)], estimates[np.isin(batch_of_draw, shared), 1:], trusted)
    return Found(n, summarise(measurements, n), exact, signed, cancelling, cost, gates)


def _by_length(run: results.Run, rows: Sequence[ExactSum] | Sequence[SignedDraw], name: str) -> Array:
    """One field of rows that are sorted by what was measured and then by length: [.., n + 1]."""
    lengths = np.array([row.length for row in rows], np.int64)
    if len(rows) % (run.n + 1) or (lengths != np.arange(len(rows)) % (run.n + 1)).any():
        raise ValueError(f"run: the parts in {run.folder / 'measurements'} hold a batch with some lengths only")
    return np.array([getattr(row, name) for row in rows], np.float64).reshape(-1, run.n + 1)


def _exact(run: results.Run, rows: Sequence[ExactSum]) -> Exact:
    norm, full_norm, share = (_by_length(run, rows, name) for name in ("norm", "full_norm", "share"))
    if not full_norm.any():
        raise ValueError(f"run: expected a gradient above zero on some batch, got none on {len(norm)} (exact sums)")
    return Exact(
        batches=len(norm),
        norm=_means(norm),
        full_norm=float(full_norm[:, 0].mean()),
        next_cosine=_means(_by_length(run, rows, "next_cosine")[:, :-1]),
        full_cosine=_means(_by_length(run, rows, "full_cosine")),
        share=_means(share),
        explained=_means(share.cumsum(1)),
        left=_means(_by_length(run, rows, "left")),
    )


def _signed(estimates: Array, batch: NDArray[np.int64], squares: Mapping[int, Array]) -> Signed:
    """Of draws [draws, n + 1], each on its batch; by batch, the squared norms of the exact sums [n + 1]."""
    unknown = np.full(estimates.shape[1], np.nan)
    judgement = judge(estimates, np.array([squares.get(own, unknown) for own in batch.tolist()]), batch)
    rms = np.sqrt(judgement.mean / path_counts(estimates.shape[1] - 1))
    return Signed(len(np.unique(batch)), judgement, rms)


def _means(values: Array) -> Means:
    """Of values [batches, m], over those that are numbers."""
    measured = np.isfinite(values)
    filled = np.where(measured, values, 0.0)
    largest = np.abs(filled).max(0)
    scale = np.where(largest > 0, largest, 1.0)
    with np.errstate(invalid="ignore"):
        mean = (filled / scale).sum(0) / measured.sum(0) * scale
        low, high = interval(bootstrap_means(filled / scale, measured), measured.sum(0)) * scale
    return Means(mean, low, high)


def _cancelling(norms: Array, sums: Array) -> Means:
    """Of norms along one path of every length [batches, n], and norms of the exact sums [batches, n]."""
    n, measured = norms.shape[1], np.isfinite(norms)
    filled = np.where(measured, norms, 0.0)
    scales = [np.where(own.max(0) > 0, own.max(0), 1.0) for own in (filled, sums)]
    both = np.concatenate([filled / scales[0], sums / scales[1]], 1), np.concatenate([measured, sums >= 0], 1)
    factor = np.exp(np.log(scales[1]) - np.log(scales[0]) - np.log(path_counts(n)[1:]))

    def ratio(means: Array) -> Array:
        return np.asarray(means[..., n:] / means[..., :n] * factor)

    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = interval(ratio(bootstrap_means(*both)), measured.sum(0))
        return Means(ratio(both[0].sum(0) / both[1].sum(0)), low, high)


def _cost(norms: Array, estimates: Array, trusted: NDArray[np.bool_]) -> Cost:
    """Of norms along one path of every length [batches, n] and signed draws [draws, n], on the same batches."""
    squares = [column[np.isfinite(column)] for column in (_scaled(norms) ** 2).T]
    light = [tail_index(own) < settling_index(len(own)) for own in squares]
    of_paths = np.array([_relative_deviation(own) for own in squares])
    of_draws = np.array([_relative_deviation(own) for own in _scaled(estimates).T])
    return Cost(len(norms), of_paths, of_draws, np.where(of_draws < of_paths, trusted, light))


def _scaled(values: Array) -> Array:
    """With 1 as the largest of each column, so that squares stay in range."""
    largest = np.nan_to_num(values).max(0)
    return np.asarray(values / np.where(largest > 0, largest, 1.0))


def _relative_deviation(values: Array) -> float:
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 and values.any() else np.nan
