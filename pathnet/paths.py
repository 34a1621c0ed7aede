"""Paths as codes: drawing them, listing them, and counting those of each length.

A path ``b`` in {0, 1}^n goes through the residual module of block i where ``b_i = 1`` and through its skip connection
where ``b_i = 0``; its length is the number of ones (Veit et al. 2016, section 3). In a block of m residual modules in
parallel, ``b_i = j`` from 1 to m goes through the j-th; the length is the number of entries that are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet.checks import check_integer, check_integers, check_tensor, described
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

Modules = int | Sequence[int]

ENUMERABLE = 20
"""Maximum number of blocks whose paths are listed."""
MOST_BLOCKS = 10_000
"""Maximum number of blocks, more than any network has; the numbers of paths of more would take minutes."""
MOST_MODULES = 255
"""Maximum number of residual modules of a block, the greatest number that a path's uint8 holds."""
MOST_BYTES = 1 << 31
"""Maximum bytes of the paths, or signs, that one call draws."""


def check_paths(name: str, paths: object, n: int | None = None, modules: Sequence[int] | None = None) -> Tensor:
    """Return ``paths``, a dense integer or bool tensor [P, n] of zeros and ones, or up to each block's modules.

    Args:
        name: name of the argument in an error.
        n: number of blocks; None for any.
        modules: number of residual modules of each of the n blocks; None for one each.

    Raises:
        ValueError: ``paths`` is no such tensor.
    """
    checked = check_tensor(name, paths, "integer")
    if checked.ndim != 2 or n not in (None, checked.shape[1]):
        expected = "[P, n]" if n is None else f"[P, {n}] for {n} blocks"
        raise ValueError(f"{name}: expected shape {expected}, got {list(checked.shape)}")
    # As int64, since PyTorch has no least and greatest of all unsigned types.
    values = checked.to(torch.int64)
    most: Tensor | int = 1 if max(modules or [1]) == 1 else torch.tensor(modules, device=values.device)
    if not ((values >= 0) & (values <= most)).all():
        if isinstance(most, int):
            raise ValueError(f"{name}: expected zeros and ones, got values {values.min()} to {values.max()}")
        block = int(((values < 0) | (values > most)).any(0).nonzero()[0])
        got = f"{values[:, block].min()} to {values[:, block].max()}"
        raise ValueError(f"{name}: expected values 0 to {most[block]} for block {block}, got values {got}")
    return checked


def _check_n(n: int) -> int:
    return check_integer("n", n, 1, MOST_BLOCKS)


def _check_draws(n: int, count: int, seed: int, first: int) -> tuple[int, int, int]:
    return (
        check_integer("count", count, 0, MOST_BYTES // n),
        check_integer("seed", seed, 0),
        check_integer("first", first, 0),
    )


def sample(n: int, length: int, count: int, seed: int = 0, first: int = 0, modules: Modules = 1) -> Tensor:
    """Draw paths of one length, each uniformly from all paths of that length.

    Path number j is a function of (seed, j, length) alone, so a longer sample begins with the shorter one and
    any worker can redo any draw.

    Args:
        n: number of blocks.
        length: number of residual modules on the path, 0 to n.
        count: number of paths, from number ``first`` on.
        modules: number of residual modules in parallel of every block, or of each (`ResidualNet.residual_modules`).

    Returns:
        uint8 [count, n]

    Raises:
        ValueError: an argument is out of its range.
    """
    n = _check_n(n)
    length = check_integer("length", length, 0, n)
    count, seed, first = _check_draws(n, count, seed, first)
    of_blocks = _check_modules(modules, n)
    weights = None if len(set(of_blocks)) == 1 else _weights(of_blocks)
    codes = np.zeros((count, n), dtype=np.uint8)
    for row in range(count):
        generator = stream(seed, "path", first + row, length)
        if weights is None:
            chosen = generator.choice(n, length, replace=False, shuffle=False)
        else:
            chosen = np.array(_weighted_choice(of_blocks, length, weights, generator), dtype=np.int64)
        codes[row, chosen] = 1
        if max(of_blocks) > 1:
            codes[row, chosen] = generator.integers(1, np.array(of_blocks)[chosen] + 1)
    return torch.from_numpy(codes)


def _check_modules(modules: Modules, n: int) -> tuple[int, ...]:
    """Return the number of residual modules of each block."""
    if isinstance(modules, Sequence):
        of_blocks = check_integers("modules", modules, 1, MOST_MODULES)
        if len(of_blocks) != n:
            raise ValueError(f"modules: expected {n} numbers (one per block), got {len(of_blocks)}")
        return of_blocks
    return (check_integer("modules", modules, 1, MOST_MODULES),) * n


def _weights(modules: Sequence[int]) -> list[list[int]]:
    """Return the number of paths of each length through the blocks from i on, for i = 0..n."""
    weights = [[1]]
    for count in reversed(modules):
        rest = weights[-1]
        weights.append([skip + count * through for skip, through in zip([*rest, 0], [0, *rest], strict=True)])
    return weights[::-1]


def _weighted_choice(
    modules: Sequence[int], length: int, weights: Sequence[Sequence[int]], generator: np.random.Generator
) -> list[int]:
    """Draw the blocks whose modules a path of this length enters, each set in proportion to its number of paths."""
    chosen: list[int] = []
    for block, draw in enumerate(generator.random(len(modules)).tolist()):
        left = length - len(chosen)
        # An exact fraction, since the numbers of paths leave the range of float64.
        if left and draw < Fraction(modules[block] * _at(weights[block + 1], left - 1), weights[block][left]):
            chosen.append(block)
    return chosen


def _at(counts: Sequence[int], index: int) -> int:
    return counts[index] if index < len(counts) else 0


def one_of_each_length(n: int, seed: int = 0, batch: int = 0, modules: Modules = 1) -> Tensor:
    """Draw one path of every length 1..n: those that the default plan measures on batch number ``batch``.

    Args:
        modules: see `sample`.

    Returns:
        uint8 [n, n]; row j is path number ``batch`` of length j + 1 (see `sample`).

    Raises:
        ValueError: an argument is out of its range.
    """
    n, batch = _check_n(n), check_integer("batch", batch, 0)
    return torch.cat([sample(n, length, 1, seed, batch, modules) for length in range(1, n + 1)])


def enumerate_all(n: int, modules: Modules = 1) -> Tensor:
    """Return all paths, 2^n with one residual module in each block, for exact checks on small networks.

    Args:
        modules: see `sample`.

    Returns:
        uint8 [2^n, n]; row r is the binary expansion of r, the first block its lowest bit. With m_i modules in block
        i, the product of all m_i + 1 rows, whose digits have those bases.

    Raises:
        ValueError: n is not between 1 and 20, ``modules`` is out of its range, or there are more than 2^20 paths.
    """
    n = check_integer("n", n, 1, ENUMERABLE)
    bases = [count + 1 for count in _check_modules(modules, n)]
    if math.prod(bases) > 1 << ENUMERABLE:
        raise ValueError(f"modules: expected at most {1 << ENUMERABLE} paths, got {math.prod(bases)}")
    places = np.cumprod([1, *bases[:-1]])
    codes = np.arange(math.prod(bases))[:, None] // places % np.array(bases)
    return torch.from_numpy(codes.astype(np.uint8))


def routing(paths: Tensor, dtype: torch.dtype = torch.float64, parts: int = 2) -> Tensor:
    """Return the routing coefficients of each path, (a, c) = (1 - b, b) with one residual module in each block.

    Args:
        paths: integer or bool [P, n] of numbers from 0 to ``parts - 1``, see `pathnet.paths`.
        dtype: the floating-point type of the result.
        parts: number of coefficients of each block, one more than the maximum number of residual modules.

    Returns:
        [P, n, parts], 1 for the part of each block that the path goes through and 0 for the others.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype: expected a floating-point type of at least 16 bits, got {described(dtype)}")
    parts = check_integer("parts", parts, 2, MOST_MODULES + 1)
    n = paths.shape[1] if isinstance(paths, Tensor) and paths.ndim == 2 else 0
    checked = check_paths("paths", paths, modules=[parts - 1] * n)
    return F.one_hot(checked.to(torch.int64), parts).to(dtype)


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
