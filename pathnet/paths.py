"""Paths as binary codes: drawing them, listing them, and counting those of each length.

A path ``b`` in {0, 1}^n goes through the residual module of block i where ``b_i = 1`` and through its skip connection
where ``b_i = 0``; its length is the number of ones (Veit et al. 2016, section 3).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pathnet.checks import check_integer, check_tensor, described
from pathnet.streams import stream

__all__ = [
    "check_paths",
    "enumerate_all",
    "length_distribution",
    "one_of_each_length",
    "remaining_fraction",
    "routing",
    "sample",
    "signs",
]

ENUMERABLE = 20
"""Maximum number of blocks whose paths are listed."""
MOST_BLOCKS = 10_000
"""Maximum number of blocks, more than any network has; the numbers of paths of more would take minutes."""
MOST_BYTES = 1 << 31
"""Maximum bytes of the paths, or signs, that one call draws."""


def check_paths(name: str, paths: object, n: int | None = None) -> Tensor:
    """Return ``paths``, a dense integer or bool tensor [P, n] of zeros and ones.

    Args:
        name: name of the argument in an error.
        n: number of blocks; None for any.

    Raises:
        ValueError: ``paths`` is no such tensor.
    """
    checked = check_tensor(name, paths, "integer")
    if checked.ndim != 2 or n not in (None, checked.shape[1]):
        expected = "[P, n]" if n is None else f"[P, {n}] for {n} blocks"
        raise ValueError(f"{name}: expected shape {expected}, got {list(checked.shape)}")
    if not ((checked == 0) | (checked == 1)).all():
        # As int64, since PyTorch has no least and greatest of all unsigned types.
        values = checked.to(torch.int64)
        raise ValueError(f"{name}: expected zeros and ones, got values {values.min()} to {values.max()}")
    return checked


def _check_n(n: int) -> int:
    return check_integer("n", n, 1, MOST_BLOCKS)


def _check_draws(n: int, count: int, seed: int, first: int) -> tuple[int, int, int]:
    return (
        check_integer("count", count, 0, MOST_BYTES // n),
        check_integer("seed", seed, 0),
        check_integer("first", first, 0),
    )


def sample(n: int, length: int, count: int, seed: int = 0, first: int = 0) -> Tensor:
    """Draw paths of one length, each uniformly from the C(n, length) paths of that length.

    Path number j is a function of (seed, j, length) alone, so a longer sample begins with the shorter one and
    any worker can redo any draw.

    Args:
        n: number of blocks.
        length: number of residual modules on the path, 0 to n.
        count: number of paths, from number ``first`` on.

    Returns:
        uint8 [count, n]

    Raises:
        ValueError: an argument is out of its range.
    """
    n = _check_n(n)
    length = check_integer("length", length, 0, n)
    count, seed, first = _check_draws(n, count, seed, first)
    codes = np.zeros((count, n), dtype=np.uint8)
    for row in range(count):
        chosen = stream(seed, "path", first + row, length).choice(n, length, replace=False, shuffle=False)
        codes[row, chosen] = 1
    return torch.from_numpy(codes)


def one_of_each_length(n: int, seed: int = 0, batch: int = 0) -> Tensor:
    """Draw one path of every length 1..n: those that the default plan measures on batch number ``batch``.

    Returns:
        uint8 [n, n]; row j is path number ``batch`` of length j + 1 (see `sample`).

    Raises:
        ValueError: an argument is out of its range.
    """
    n, batch = _check_n(n), check_integer("batch", batch, 0)
    return torch.cat([sample(n, length, 1, seed, first=batch) for length in range(1, n + 1)])


def enumerate_all(n: int) -> Tensor:
    """Return all 2^n paths, for exact checks on small networks.

    Returns:
        uint8 [2^n, n]; row r is the binary expansion of r, block 1 its lowest bit.

    Raises:
        ValueError: n is not between 1 and 20.
    """
    n = check_integer("n", n, 1, ENUMERABLE)
    codes = np.arange(1 << n)[:, None] >> np.arange(n) & 1
    return torch.from_numpy(codes.astype(np.uint8))


def routing(paths: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the routing coefficients (a, c) = (1 - b, b) of each path.

    Args:
        paths: integer or bool [P, n] of zeros and ones.
        dtype: the floating-point type of the result.

    Returns:
        [P, n, 2]

    Raises:
        ValueError: an argument is out of its range.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype: expected a floating-point type of at least 16 bits, got {described(dtype)}")
    residual = check_paths("paths", paths).to(dtype)
    return torch.stack([1 - residual, residual], dim=-1)


def signs(n: int, count: int, seed: int = 0, first: int = 0) -> Tensor:
    """Draw independent random signs of n modules, for signed estimates.

    Args:
        count: number of draws, from number ``first`` on; draw j is a function of (seed, j) alone.

    Returns:
        int8 [count, n] of -1 and 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    n = _check_n(n)
    count, seed, first = _check_draws(n, count, seed, first)
    drawn = [stream(seed, "signs", first + row).integers(0, 2, n) for row in range(count)]
    return torch.from_numpy(np.array(drawn, dtype=np.int8).reshape(count, n) * 2 - 1)


def length_distribution(n: int) -> Tensor:
    """Return the share of the 2^n paths that has each length: Binomial(n, 1/2) (section 5 and Figure 6 a).

    Returns:
        float64 [n + 1]

    Raises:
        ValueError: n is out of its range.
    """
    n = _check_n(n)
    return torch.tensor([math.comb(n, length) / (1 << n) for length in range(n + 1)], dtype=torch.float64)


def remaining_fraction(n: int, deleted: int) -> Tensor:
    """Return the share of the paths of each length that is left when ``deleted`` blocks are deleted (equation 8).

    Returns:
        float64 [n + 1]: C(n - deleted, k) / C(n, k), zero for k > n - deleted.

    Raises:
        ValueError: ``deleted`` is not between 0 and n.
    """
    n = _check_n(n)
    deleted = check_integer("deleted", deleted, 0, n)
    shares = [math.comb(n - deleted, length) / math.comb(n, length) for length in range(n + 1)]
    return torch.tensor(shares, dtype=torch.float64)
