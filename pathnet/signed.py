"""Judge, for each length, whether the mean of signed draws (`Tape.squared_norms_by_length`) can be trusted.

The mean of S draws means little if rare, unseen draws hold most of the expectation. Two things reveal that:

- The tail of the draws. Fit a generalised Pareto distribution to the largest draws; its index is k-hat. The mean of S
  draws settles if k-hat is below min(1 - 1 / log10(S), 0.7) (Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto
  smoothed importance sampling", JMLR 2024, section 3).
- Alignment. If the gradients of all C(n, k) paths point the same way, a draw is the square of the Krawtchouk
  polynomial K_k(m) of the number m of minus signs. Most of its expectation can then come from draws that are too
  rare to be seen, while those that are seen look harmless. The exact sum G_k bounds how much can be hidden this way:
  by the Cauchy-Schwarz inequality, the sum of the squared norms is at least ``|G_k|^2 / C(n, k)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import check_integer, check_integers, described
from pathnet.intervals import FEWEST

__all__ = ["Judgement", "aligned_variances", "judge", "tail_index"]

FEWEST_IN_TAIL = 5
LITTLE = 0.25
ERROR = 0.5
MOST_BLOCKS = 1000
"""Maximum number of blocks; with more, the numbers of paths leave the range of float64."""
SAME = 1e-4
"""Largest relative difference between draws that differ only by rounding."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """Means of signed draws and the evidence for and against them; arrays hold the lengths 0 to n.

    `judge` returns one.

    Attributes:
        draws: number of draws.
        mean: float64 [n + 1], the estimate of the sum of the squared norms of all path gradients of a length.
        error: float64 [n + 1], the relative standard error of the mean; NaN for fewer than ten batches, or for fewer
            than ten draws on a single batch.
        tail: float64 [n + 1], k-hat; infinity if there are too few draws to fit, minus infinity if all are equal.
        threshold: upper bound that k-hat must stay below.
        aligned: float64 [n + 1], ``|G_k|^2 / C(n, k)`` over the mean on the same batches. It is about the mean cosine
            between two path gradients of the length. NaN if the exact sums are unknown.
        needed: float64 [n + 1], the number of draws whose mean has a relative standard error of 1/2 if all path
            gradients are aligned.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> tape = pathnet.record(net, torch.randn(4, 1, 8, 8), torch.randint(10, (4,)))
        >>> draws = tape.squared_norms_by_length(40)
        >>> judgement = pathnet.signed.judge(draws)
        >>> judgement.mean[1:3].round(4)
        array([0.0052, 0.0076])
        >>> judgement.draws, float(judgement.needed[3])
        (40, 47.2)
        >>> judgement.trusted
        array([ True,  True,  True, False,  True,  True,  True])
    """

    draws: int
    mean: Array
    error: Array
    tail: Array
    threshold: float
    aligned: Array
    needed: Array

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Lengths whose mean can be trusted, bool [n + 1].

        The tail must be light. Besides, there must be as many draws as aligned paths need, or alignment must account
        for at most a quarter of the mean.
        """
        return (self.tail < self.threshold) & ((self.draws >= self.needed) | (self.aligned <= LITTLE))


def settling_index(count: int) -> float:
    """Return the tail index below which the mean of ``count`` draws settles (Vehtari et al. 2024).

    It is minus infinity for a single draw, whose mean never settles.
    """
    return float(min(1 - 1 / np.log10(count), 0.7)) if count > 1 else -np.inf


def judge(
    squared_norms: Tensor | Array, sums: Tensor | Array | None = None, batch: NDArray[np.int64] | None = None
) -> Judgement:
    """Judge, for each length, whether the mean of signed draws can be trusted.

    Method: Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 2024, section 3, for
    the tails; the closed form of `aligned_variances` for aligned path gradients.

    Args:
        squared_norms: float64 [draws, n + 1], from `Tape.squared_norms_by_length`, in an array or a tensor.
        sums: float64 [n + 1], or [draws, n + 1] for draws on several batches: the squared norms of the exact sums by
            length, such as ``Tape.compare_lengths().norm ** 2``; NaN for batches whose sums are unknown. Without
            them, all path gradients may be aligned, and lengths that would then need more draws are not trusted.
        batch: integers [draws], the number of the batch of each draw. Draws on one batch depend on each other, so the
            standard error is that of whole batches. By default, all draws are from one batch.

    Returns:
        The means and what speaks for and against them; `Judgement.trusted` is bool [n + 1].

    Raises:
        ValueError: there are no draws, n is above 1000, a draw is negative or not finite, ``sums`` or ``batch`` has
            another shape, or a sum is negative or infinite.

    Example:
        Length 3 would need 47 draws if all its path gradients were aligned; the exact sums show that they are not:

        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> tape = pathnet.record(net, torch.randn(4, 1, 8, 8), torch.randint(10, (4,)))
        >>> draws = tape.squared_norms_by_length(40)
        >>> pathnet.signed.judge(draws).trusted
        array([ True,  True,  True, False,  True,  True,  True])
        >>> pathnet.signed.judge(draws, tape.compare_lengths().norm ** 2).trusted
        array([ True,  True,  True,  True,  True,  True,  True])
    """
    draws = _numbers("squared_norms", squared_norms)
    if draws.ndim != 2 or not 1 <= draws.shape[1] <= MOST_BLOCKS + 1 or not len(draws):
        raise ValueError(
            f"squared_norms: expected shape [draws, n + 1] with at least one draw and n from 0 to {MOST_BLOCKS}, got "
            f"{draws.shape}"
        )
    if not (np.isfinite(draws) & (draws >= 0)).all():
        raise ValueError("squared_norms: expected finite squares, got some that are negative, infinite or NaN")
    n = draws.shape[1] - 1
    known = np.full(n + 1, np.nan) if sums is None else _numbers("sums", sums)
    if known.shape not in ((n + 1,), draws.shape):
        raise ValueError(f"sums: expected shape [{n + 1}] (one per length) or {draws.shape}, got {known.shape}")
    if (known < 0).any() or np.isinf(known).any():
        raise ValueError("sums: expected finite squares or NaN, got some that are negative or infinite")
    if batch is not None:
        batch = np.array(check_integers("batch", batch))
        if len(batch) != len(draws):
            raise ValueError(f"batch: expected {len(draws)} numbers (one per draw), got {len(batch)}")
    largest = draws.max(0)
    scaled = draws / np.where(largest > 0, largest, 1.0)
    mean = scaled.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = _standard_error(scaled, batch) / mean
        beside = np.isfinite(np.broadcast_to(known, draws.shape))
        ratio = np.where(beside, known / largest, 0).sum(0) / np.where(beside, scaled, 0).sum(0)
        aligned = ratio / [float(math.comb(n, k)) for k in range(n + 1)]
    tail = np.array([tail_index(column) for column in scaled.T])
    count = len(draws)
    threshold = settling_index(count)
    needed = np.array(aligned_variances(n)) / ERROR**2
    return Judgement(count, mean * largest, error, tail, float(threshold), aligned, needed)


def _numbers(name: str, values: object) -> Array:
    """Return an array or a dense tensor of real numbers as a float64 array.

    Raises:
        ValueError: ``values`` is neither.
    """
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().double().numpy()
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: expected an array or a tensor of numbers, got {described(values)}") from None


def aligned_variances(n: int) -> tuple[float, ...]:
    """Return the relative variance of one signed draw if all path gradients of a length are equal, by length.

    With m minus signs among n, a draw is then K_k(m)^2, where the Krawtchouk polynomial K_k(m) is the coefficient of
    x^k in ``(1 - x)^m (1 + x)^(n - m)``; m is binomially distributed. The arithmetic is in integers, since the sums
    cancel.

    Args:
        n: number of residual modules, 0 to 1000.

    Returns:
        The variances over the squared means, for the lengths 0 to n.

    Raises:
        ValueError: n is not an integer from 0 to 1000.

    Example:
        >>> from pathnet import signed
        >>> signed.aligned_variances(4)
        (0.0, 1.5, 3.6667, 1.5, 0.0)
        >>> f"{signed.aligned_variances(54)[27]:.0e}"
        '4e+14'
    """
    return _aligned_variances(check_integer("n", n, 0, MOST_BLOCKS))


@cache
def _aligned_variances(n: int) -> tuple[float, ...]:
    fourth = [0] * (n + 1)
    for m in range(n + 1):
        previous, value, weight = 0, 1, math.comb(n, m)
        for k in range(n + 1):
            fourth[k] += weight * value**4
            # The recurrence (k + 1) K_{k+1} = (n - 2m) K_k - (n - k + 1) K_{k-1}.
            previous, value = value, ((n - 2 * m) * value - (n - k + 1) * previous) // (k + 1)
    squares = [math.comb(n, k) ** 2 << n for k in range(n + 1)]
    return tuple((power - square) / square for power, square in zip(fourth, squares, strict=True))


def _standard_error(values: Array, batch: NDArray[np.int64] | None) -> Array:
    """Return the standard errors [n + 1] of the means of values [draws, n + 1].

    If there are several batches, they follow from the sums of whole batches.
    """
    number = np.zeros(len(values), np.int64) if batch is None else np.unique(batch, return_inverse=True)[1]
    batches = number.max() + 1
    parts = values - values.mean(0)
    if batches > 1:
        sums = np.zeros((batches, values.shape[1]))
        np.add.at(sums, number, parts)
        parts = sums
    if len(parts) < FEWEST:
        return np.full(values.shape[1], np.nan)
    return np.asarray(np.sqrt((parts**2).sum(0) * len(parts) / (len(parts) - 1)) / len(values))


def tail_index(values: Tensor | Array) -> float:
    """Return the tail index k-hat of values [S] of at least 0.

    The generalised Pareto distribution is fitted to those of the min(S / 5, 3 sqrt(S)) largest values that exceed all
    others (Vehtari et al. 2024). The index is minus infinity if all values are equal, and infinity if fewer than five
    are left to fit.

    Args:
        values: real numbers [S], S >= 1, in an array or a tensor.

    Raises:
        ValueError: there are no values, or one is negative or not finite.

    Example:
        Values whose tail falls exponentially, with the index 0, and as 1 / x^2, with the index 1/2:

        >>> import numpy as np
        >>> from pathnet import signed
        >>> share = (np.arange(1000) + 0.5) / 1000
        >>> round(signed.tail_index(-np.log(share)), 2), round(signed.tail_index(share**-0.5), 2)
        (0.06, 0.5)
    """
    values = _numbers("values", values)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"values: expected finite numbers [S] of at least 0, S >= 1, got shape {values.shape}")
    largest = values.max()
    if largest - values.min() <= SAME * largest:
        return -np.inf
    ordered = np.sort(values)
    count = int(np.ceil(min(len(values) / 5, 3 * np.sqrt(len(values)))))
    excess = ordered - ordered[-count - 1] if count < len(values) else ordered
    excess = excess[excess > 0]
    return _pareto_index(excess) if len(excess) >= FEWEST_IN_TAIL else np.inf


def _pareto_index(excess: Array) -> float:
    """Return the index of the generalised Pareto distribution that fits sorted positive values.

    The estimate is the mean of theta = -k / sigma under its profile likelihood and a prior whose scale the values
    set (Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto distribution",
    Technometrics 2009). It is then shrunk towards 1/2 with the weight of ten values (Vehtari et al. 2024, appendix).
    """
    count = len(excess)
    points = 30 + int(np.sqrt(count))
    quartile = excess[int(count / 4 + 0.5) - 1]
    steps = np.arange(1, points + 1) - 0.5
    theta = 1 / excess[-1] + (1 - np.sqrt(points / steps)) / (3 * quartile)
    index = np.log1p(-theta[:, None] * excess).mean(1)
    likelihood = count * (np.log(-theta / index) - index - 1)
    weight = np.exp(likelihood - likelihood.max())
    best = (theta * weight).sum() / weight.sum()
    return float((count * np.log1p(-best * excess).mean() + 10 * 0.5) / (count + 10))
