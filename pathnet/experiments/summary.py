"""Statistics of sampled path gradients by length: the numbers of Figure 6 (section 5 of the paper)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathnet import paths
from pathnet.intervals import FEWEST, bootstrap_means, bracketed, interval
from pathnet.results import Measurements

__all__ = [
    "LengthRange",
    "Resampled",
    "Summary",
    "as_plain",
    "central_run",
    "findings",
    "norms_by_batch",
    "percent",
    "summarise",
]

MOST = 0.95

PAPER_BLOCKS = 54
PAPER_CENTRAL = (19, 35)
PAPER_EFFECTIVE = (5, 17)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LengthRange:
    """Consecutive path lengths and their shares.

    Attributes:
        first, last: the range of lengths, both included.
        paths: share of all 2^n paths, in [0, 1].
        gradient: share of the total of frequency times magnitude, in [0, 1].
    """

    first: int
    last: int
    paths: float
    gradient: float


@dataclass(frozen=True)
class Resampled:
    """Variation of the range of effective paths between resamples of the batches: ends of 95 % intervals.

    Attributes:
        first, last: the ends of the interval of each end of the range.
        paths: the ends of the interval of the share of all 2^n paths.
    """

    first: tuple[int, int]
    last: tuple[int, int]
    paths: tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """The numbers of Figure 6. Arrays are float64 [n], for the lengths 1 to n; NaN if nothing was measured.

    Attributes:
        n: number of blocks.
        measurements, batches: numbers of measurements and of batches.
        zeros: number of norms that are exactly 0. They count in the means; a logarithmic axis cannot show them.
        count: int64 [n], number of measurements of each length.
        share: share of the 2^n paths.
        mean, std: mean and standard deviation of the norms.
        quantile_05, quantile_50, quantile_95: quantiles of the norms.
        low, high: 95 % interval of the mean, from a bootstrap over whole batches (`pathnet.intervals`); NaN for
            fewer than ten.
        product: share times mean, scaled to sum to 1 (Figure 6 c).
        decay: the factor by which each module multiplies the mean norm, from a least-squares fit of its logarithm
            to the length, and the ends of the factor's 95 % interval by the same bootstrap.
        log_intercept: intercept of that line, at length 0.
        straightness: share of the variance of the logarithms that the line explains, and the ends of its 95 %
            interval.
        mean_length: mean length by frequency times magnitude, and the ends of its 95 % interval.
        effective: effective paths: the shortest range of lengths that holds 95 % of the product.
        resampled: that range in the resamples of the bootstrap, see `Resampled`.
        central: the lengths closest to n/2 that hold 95 % of the paths.
    """

    n: int
    measurements: int
    batches: int
    zeros: int
    count: NDArray[np.int64]
    share: Array
    mean: Array
    std: Array
    quantile_05: Array
    quantile_50: Array
    quantile_95: Array
    low: Array
    high: Array
    product: Array
    decay: tuple[float, float, float]
    log_intercept: float
    straightness: tuple[float, float, float]
    mean_length: tuple[float, float, float]
    effective: LengthRange
    resampled: Resampled | None
    central: LengthRange

    def as_json(self) -> dict[str, Any]:
        """Return plain lists and numbers, and None for NaN, which JSON lacks."""
        return dict(as_plain(asdict(self)))


def as_plain(value: Any) -> Any:
    """Replace arrays and tuples by lists, and NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def summarise(measurements: Measurements, n: int) -> Summary:
    """Summarise measurements on a network of n blocks by length.

    Squares and products of the norms of long paths leave the range of float64. So moments are taken of norms that are
    scaled by the largest norm of their length, and products are sums of logarithms.

    Raises:
        ValueError: there are no measurements, or all norms are zero.
    """
    if not measurements.norm.any():
        raise ValueError(f"measurements: expected some norms above zero, got none among {len(measurements)}")
    numbers, norms = norms_by_batch(measurements, n)
    batches, first_rows = np.unique(numbers, return_index=True)
    measured = np.isfinite(norms)
    filled = np.where(measured, norms, 0.0)
    largest = filled.max(0)
    scale = np.where(largest > 0, largest, 1.0)
    scaled = filled / scale
    count = measured.sum(0)
    share = paths.length_distribution(n).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = scaled.sum(0) / count
        std = np.sqrt((np.where(measured, scaled - mean, 0) ** 2).sum(0) / np.where(count > 1, count - 1, np.nan))
        log_mean = np.log(mean) + np.log(scale)
        # Measurements on one batch depend on each other, so the bootstrap draws their sums.
        sums, measured_sums = (np.add.reduceat(values, first_rows) for values in (scaled, measured.astype(np.int64)))
        replicates = bootstrap_means(sums, measured_sums)
        slope, intercept = _line(log_mean)
        log_means = np.log(replicates) + np.log(scale)
        slopes, intercepts = _line(log_means)
    spread = [column[np.isfinite(column)] for column in norms.T]
    ends = [np.quantile(column, (0.05, 0.5, 0.95)) if len(column) else [np.nan] * 3 for column in spread]
    quantiles = np.array(ends).T
    low, high = interval(replicates, (measured_sums > 0).sum(0)) * scale
    decay_low, decay_high = interval(np.exp(slopes[:, None]), len(batches))[:, 0]
    straightness = float(_explained(log_mean, slope, intercept))
    # Noise makes every resample less straight, so the ends are reflected at the measured value (basic bootstrap).
    straight = 2 * straightness - interval(_explained(log_means, slopes, intercepts)[:, None], len(batches))[::-1, 0]
    product, products = _products(share, log_mean), _products(share, log_means[np.isfinite(log_means).any(1)])
    mean_length = interval(_mean_length(products)[:, None], len(batches))[:, 0]
    return Summary(
        n=n,
        measurements=len(measurements),
        batches=len(batches),
        zeros=int((measurements.norm == 0).sum()),
        count=count,
        share=share[1:],
        mean=mean * scale,
        std=std * scale,
        quantile_05=quantiles[0],
        quantile_50=quantiles[1],
        quantile_95=quantiles[2],
        low=low,
        high=high,
        product=product,
        decay=(float(np.exp(slope)), float(decay_low), float(decay_high)),
        log_intercept=float(intercept),
        straightness=(straightness, float(straight[0]), float(np.minimum(1, straight[1]))),
        mean_length=(float(_mean_length(product)), float(mean_length[0]), float(mean_length[1])),
        effective=_range(*_shortest_run(product, MOST), share, product),
        resampled=_resampled(products, share) if len(products) else None,
        central=_range(*central_run(share, MOST), share, product),
    )


def norms_by_batch(measurements: Measurements, n: int) -> tuple[NDArray[np.int32], Array]:
    """Return the numbers of the batches [rows], sorted, and the norms [rows, n], NaN where nothing was measured.

    A batch has one row; or more if a length was measured several times on it.
    """
    batches, row = np.unique(measurements.batch, return_inverse=True)
    length = measurements.length.astype(np.int64) - 1
    cell = row * n + length
    if np.bincount(cell).max(initial=0) > 1:
        order = np.argsort(cell, kind="stable")
        first = np.searchsorted(cell[order], cell[order])
        repetition = np.empty_like(cell)
        repetition[order] = np.arange(len(cell)) - first
        rows, row = np.unique(row * len(cell) + repetition, return_inverse=True)
        batches = batches[rows // len(cell)]
    norms = np.full((len(batches), n), np.nan)
    norms[row, length] = measurements.norm
    return batches, norms


def _line(log_mean: Array) -> tuple[Array, Array]:
    """Fit a line to the finite values of ``log_mean`` [..., n] over the lengths 1 to n: slope and intercept."""
    use = np.isfinite(log_mean)
    count = use.sum(-1, keepdims=True)
    length = np.where(use, np.arange(1, log_mean.shape[-1] + 1), 0)
    y = np.where(use, log_mean, 0)
    middle = length.sum(-1, keepdims=True) / count
    off = np.where(use, length - middle, 0)
    slope = (off * y).sum(-1) / (off * off).sum(-1)
    return slope, (y.sum(-1) - slope * length.sum(-1)) / count[..., 0]


def _explained(log_mean: Array, slope: Array, intercept: Array) -> Array:
    """Return the share of the variance of ``log_mean`` [..., n] that the line explains; NaN if all values are equal.

    Values that are not finite are left out.
    """
    use = np.isfinite(log_mean)
    length, y = np.arange(1, log_mean.shape[-1] + 1), np.where(use, log_mean, 0)
    off = (np.where(use, y - slope[..., None] * length - intercept[..., None], 0) ** 2).sum(-1)
    mean = y.sum(-1, keepdims=True) / use.sum(-1, keepdims=True)
    total = (np.where(use, y - mean, 0) ** 2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(total > 0, 1 - off / total, np.nan))


def _products(share: Array, log_mean: Array) -> Array:
    """Return frequency times magnitude from ``share`` [n + 1] and ``log_mean`` [..., n], scaled to sum to 1."""
    with np.errstate(divide="ignore"):
        logs = np.log(share[1:]) + log_mean
    logs = np.where(np.isfinite(logs), logs, -np.inf)
    product = np.exp(logs - logs.max(-1, keepdims=True))
    return np.asarray(product / product.sum(-1, keepdims=True))


def _mean_length(product: Array) -> Array:
    """Return the mean of the lengths 1 to n weighted by ``product`` [..., n]."""
    return np.asarray((np.arange(1, product.shape[-1] + 1) * product).sum(-1))


def _resampled(products: Array, share: Array) -> Resampled:
    ranges = np.array([_shortest_run(product, MOST) for product in products])
    held = [share[first : last + 1].sum() for first, last in ranges.tolist()]

    def ends(values: Any) -> Any:
        return tuple(np.quantile(values, (0.025, 0.975), method="nearest").tolist())

    return Resampled(ends(ranges[:, 0]), ends(ranges[:, 1]), ends(held))


def _shortest_run(shares: Array, most: float) -> tuple[int, int]:
    """Return the first and last length (from 1) of the shortest run with ``most``, or the fullest of several."""
    total = np.concatenate([[0.0], np.cumsum(shares)])
    for width in range(1, len(shares)):
        held = total[width:] - total[:-width]
        if held.max() >= most:
            first = int(held.argmax()) + 1
            return first, first + width - 1
    return 1, len(shares)


def central_run(share: Array, most: float) -> tuple[int, int]:
    """Return the innermost lengths k to n - k that hold ``most`` of the [n + 1] shares."""
    n = len(share) - 1
    first = next(k for k in range(n // 2, -1, -1) if share[k : n - k + 1].sum() >= most)
    return first, n - first


def _range(first: int, last: int, share: Array, product: Array) -> LengthRange:
    return LengthRange(
        first, last, float(share[first : last + 1].sum()), float(product[max(first, 1) - 1 : last].sum())
    )


def percent(share: float) -> str:
    """Return a share in [0, 1] as a percentage, to two or three digits."""
    return f"{100 * share:.3g} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _varying(resampled: Resampled | None) -> str:
    """Return the intervals of the ends of the effective paths and of their share in words, or nothing without any."""
    if resampled is None:
        return ""
    first, last = ("-".join(map(str, dict.fromkeys(ends))) for ends in (resampled.first, resampled.last))
    low, high = map(percent, resampled.paths)
    return f" (95 % intervals: first {first}, last {last}, share {low} to {high})"


def findings(summary: Summary) -> list[str]:
    """Return the summary in sentences, which are printed below its table."""
    factor, low, high = summary.decay
    effective, central = summary.effective, summary.central
    lines = [f"{summary.measurements} measurements on {summary.batches} batches"]
    if np.isfinite(factor):
        ends = bracketed(low, high, summary.batches)
        lines.append(f"the mean norm changes by a factor of {factor:.3g} per module ({ends})")
    few = summary.count[(summary.count > 0) & (summary.count < FEWEST)]
    if len(few):
        batches = f"{few.min()}" if few.min() == few.max() else f"{few.min()} to {few.max()}"
        lines.append(
            f"no intervals for {len(few)} of the lengths, which were measured on {batches} batches "
            f"(an interval takes {FEWEST})"
        )
    lines += [
        f"effective paths: lengths {effective.first} to {effective.last} hold {percent(effective.gradient)} of "
        f"frequency times magnitude, and {percent(effective.paths)} of all paths{_varying(summary.resampled)}",
        f"lengths {central.first} to {central.last} hold {percent(central.paths)} of all paths, and "
        f"{percent(central.gradient)} of frequency times magnitude",
    ]
    if summary.zeros:
        lines.append(f"{summary.zeros} norms are exactly 0; they are included in the means")
    if summary.n == PAPER_BLOCKS:
        share = np.concatenate([[0.5**summary.n], summary.share])
        middle, short = (_range(*ends, share, summary.product) for ends in (PAPER_CENTRAL, PAPER_EFFECTIVE))
        lines.append(
            f"the paper's ranges for {PAPER_BLOCKS} blocks: lengths {middle.first} to {middle.last} hold "
            f"{percent(middle.paths)} of all paths (paper: more than 95 %); {short.first} to {short.last} hold "
            f"{percent(short.paths)} (paper: 0.45 %), and {percent(short.gradient)} of the gradient here"
        )
    return lines
