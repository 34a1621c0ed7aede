"""Paths as binary codes: drawing them, listing them, and how many there are of each length.

A path ``b`` in {0, 1}^n goes through the residual module of block i where ``b_i = 1`` and through its skip
where ``b_i = 0``; its length is the number of ones (Veit et al. 2016, section 3).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pathnet.streams import stream

__all__ = [
    "enumerate_all",
    "length_distribution",
    "one_of_each_length",
    "remaining_fraction",
    "routing",
    "sample",
    "signs",
]

ENUMERABLE = 20


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least one block, got {n}")


def sample(n: int, length: int, count: int, seed: int = 0, first: int = 0) -> Tensor:
    """Paths of one length, each drawn uniformly from the C(n, length) there are.

    Path number j is a function of (seed, j, length) alone, so a longer sample begins with the shorter one and
    any worker can redo any draw.

    Args:
        n: blocks of the network.
        length: residual modules on the path, 0 to n.
        count: paths to draw: numbers ``first`` to ``first + count - 1``.

    Returns:
        uint8 [count, n]

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_n(n)
    if not 0 <= length <= n:
        raise ValueError(f"length: expected 0 to {n} (the number of blocks), got {length}")
    if count < 0:
        raise ValueError(f"count: expected a non-negative integer, got {count}")
    codes = np.zeros((count, n), dtype=np.uint8)
    for row in range(count):
        chosen = stream(seed, "path", first + row, length).choice(n, length, replace=False, shuffle=False)
        codes[row, chosen] = 1
    return torch.from_numpy(codes)


def one_of_each_length(n: int, seed: int = 0, batch: int = 0) -> Tensor:
    """One path of every length 1..n: what the default plan measures on batch number ``batch``.

    Returns:
        uint8 [n, n]; row j is path number ``batch`` of length j + 1 (see `sample`).
    """
    _check_n(n)
    return torch.cat([sample(n, length, 1, seed, first=batch) for length in range(1, n + 1)])


def enumerate_all(n: int) -> Tensor:
    """All 2^n paths, for networks small enough to check everything else against.

    Returns:
        uint8 [2^n, n]; row r is the binary expansion of r, block 1 its lowest bit.

    Raises:
        ValueError: n is not between 1 and 20.
    """
    if not 1 <= n <= ENUMERABLE:
        raise ValueError(f"n: expected 1 to {ENUMERABLE} blocks (2^n paths are listed), got {n}")
    codes = np.arange(1 << n)[:, None] >> np.arange(n) & 1
    return torch.from_numpy(codes.astype(np.uint8))


def routing(paths: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The routing coefficients (a, c) = (1 - b, b) of each path.

    Args:
        paths: [P, n] of zeros and ones.

    Returns:
        [P, n, 2]
    """
    taken = paths.to(dtype)
    return torch.stack([1 - taken, taken], dim=-1)


def signs(n: int, count: int, seed: int = 0, first: int = 0) -> Tensor:
    """Independent random signs of n modules, for signed estimates.

    Args:
        count: draws: numbers ``first`` to ``first + count - 1``; draw j is a function of (seed, j) alone.

    Returns:
        int8 [count, n] of -1 and 1.
    """
    _check_n(n)
    drawn = [stream(seed, "signs", first + row).integers(0, 2, n) for row in range(count)]
    return torch.from_numpy(np.array(drawn, dtype=np.int8).reshape(count, n) * 2 - 1)


def length_distribution(n: int) -> Tensor:
    """The share of the 2^n paths that has each length: Binomial(n, 1/2) (section 5 and Figure 6 a).

    Returns:
        float64 [n + 1]
    """
    _check_n(n)
    return torch.tensor([math.comb(n, length) / (1 << n) for length in range(n + 1)], dtype=torch.float64)


def remaining_fraction(n: int, deleted: int) -> Tensor:
    """The share of the paths of each length that is left when ``deleted`` blocks are deleted (equation 8).

    Returns:
        float64 [n + 1]: C(n - deleted, k) / C(n, k), zero for k > n - deleted.

    Raises:
        ValueError: ``deleted`` is not between 0 and n.
    """
    _check_n(n)
    if not 0 <= deleted <= n:
        raise ValueError(f"deleted: expected 0 to {n} (the number of blocks), got {deleted}")
    shares = [math.comb(n - deleted, length) / math.comb(n, length) for length in range(n + 1)]
    return torch.tensor(shares, dtype=torch.float64)
