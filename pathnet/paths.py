"""Paths as codes: drawing them, listing them, and counting those of each length.

A path ``b`` in {0, 1}^n goes through the residual module of block i where ``b_i = 1`` and through its skip connection
where ``b_i = 0``; its length is the number of ones (Veit et al. 2016, section 3). In a block of m residual modules in
parallel, ``b_i = j`` from 1 to m goes through the j-th; the length is the number of entries that are not 0. Sections,
figures and equations below are those of that paper.
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
    """Return ``paths`` if it is a tensor of paths.

    Args:
        name: name of the argument in an error.
        paths: dense integer or bool tensor [P, n] of zeros and ones; in blocks of m residual modules in parallel, of
            numbers from 0 to m.
        n: number of blocks; None for any.
        modules: number of residual modules of each of the n blocks; None for one each.

    Returns:
        ``paths`` itself, [P, n].

    Raises:
        ValueError: ``paths`` is no such tensor.

    Example:
        >>> import torch
        >>> from pathnet import paths
        >>> paths.check_paths("b", torch.tensor([[0, 1, 1]]), n=3)
        tensor([[0, 1, 1]])
        >>> paths.check_paths("b", torch.tensor([[0, 2, 1]]))
        Traceback (most recent call last):
            ...
        ValueError: b: expected zeros and ones, got values 0 to 2
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
    """Draw paths of one length, each uniformly from all paths of that length (section 5), with replacement.

    Path number j is a function of (seed, j, length) alone: the same call returns the same paths, and a longer sample
    begins with the shorter one. For other paths pass another ``seed``, or ``first=count`` to continue.

    Args:
        n: number of blocks, 1 to 10000.
        length: number of residual modules on the path, 0 to n.
        count: number of paths; they hold at most 2 GiB.
        seed: seed of the draws, at least 0.
        first: number of the first path, at least 0.
        modules: number of residual modules in parallel, 1 to 255, of every block, or of each in a sequence.

    Returns:
        uint8 [count, n], on the CPU.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from pathnet import paths
        >>> paths.sample(n=6, length=2, count=3)
        tensor([[0, 1, 1, 0, 0, 0],
                [0, 1, 0, 0, 1, 0],
                [1, 1, 0, 0, 0, 0]], dtype=torch.uint8)

        With two residual modules in each block, a path enters the first, the second or neither:

        >>> paths.sample(n=4, length=2, count=2, modules=2)
        tensor([[2, 1, 0, 0],
                [1, 0, 0, 2]], dtype=torch.uint8)
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
        n: number of blocks, 1 to 10000.
        seed: seed of the draws, at least 0.
        batch: number of the batch, at least 0.
        modules: number of residual modules of every block, or of each, see `sample`.

    Returns:
        uint8 [n, n], on the CPU; row j is path number ``batch`` of length j + 1 (see `sample`).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from pathnet import paths
        >>> paths.one_of_each_length(4)
        tensor([[0, 0, 1, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 1],
                [1, 1, 1, 1]], dtype=torch.uint8)
    """
    n, batch = _check_n(n), check_integer("batch", batch, 0)
    return torch.cat([sample(n, length, 1, seed, batch, modules) for length in range(1, n + 1)])


def enumerate_all(n: int, modules: Modules = 1) -> Tensor:
    """Return all paths, 2^n with one residual module in each block, for exact checks on small networks.

    Args:
        n: number of blocks, 1 to 20.
        modules: number of residual modules of every block, or of each, see `sample`.

    Returns:
        uint8 [2^n, n], on the CPU; row r is the binary expansion of r, the first block its lowest bit. With m_i
        modules in block i there are ``prod_i (m_i + 1)`` rows, and row r holds the digits of r in those bases.

    Raises:
        ValueError: n is not between 1 and 20, ``modules`` is out of its range, or there are more than 2^20 paths.

    Example:
        >>> from pathnet import paths
        >>> paths.enumerate_all(2)
        tensor([[0, 0],
                [1, 0],
                [0, 1],
                [1, 1]], dtype=torch.uint8)
        >>> paths.enumerate_all(2, modules=[1, 2]).shape
        torch.Size([6, 2])
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
        dtype: the floating-point type of the result, of 16 bits or more.
        parts: number of coefficients of each block, one more than the maximum number of residual modules; 2 to 256.

    Returns:
        [P, n, parts], on the device of ``paths``: 1 for the part of a block that the path goes through, else 0.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from pathnet import paths
        >>> paths.routing(torch.tensor([[0, 1]]))
        tensor([[[1., 0.],
                 [0., 1.]]], dtype=torch.float64)
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype: expected a floating-point type of at least 16 bits, got {described(dtype)}")
    parts = check_integer("parts", parts, 2, MOST_MODULES + 1)
    n = paths.shape[1] if isinstance(paths, Tensor) and paths.ndim == 2 else 0
    checked = check_paths("paths", paths, modules=[parts - 1] * n)
    return F.one_hot(checked.to(torch.int64), parts).to(dtype)


def signs(n: int, count: int, seed: int = 0, first: int = 0) -> Tensor:
    """Draw independent random signs of n modules, for signed estimates (`Tape.squared_norms_by_length`).

    Args:
        n: number of residual modules, 1 to 10000.
        count: number of draws; draw j is a function of (seed, j) alone. They hold at most 2 GiB.
        seed: seed of the draws, at least 0.
        first: number of the first draw, at least 0.

    Returns:
        int8 [count, n] of -1 and 1, on the CPU.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from pathnet import paths
        >>> paths.signs(n=5, count=2)
        tensor([[-1,  1,  1, -1,  1],
                [ 1, -1,  1, -1, -1]], dtype=torch.int8)
    """
    n = _check_n(n)
    count, seed, first = _check_draws(n, count, seed, first)
    drawn = [stream(seed, "signs", first + row).integers(0, 2, n) for row in range(count)]
    return torch.from_numpy(np.array(drawn, dtype=np.int8).reshape(count, n) * 2 - 1)


def length_distribution(n: int) -> Tensor:
    """Return the share of the 2^n paths that has each length: Binomial(n, 1/2) (section 5 and Figure 6 a).

    Args:
        n: number of blocks, of one residual module each, 1 to 10000.

    Returns:
        float64 [n + 1]: ``C(n, k) / 2**n`` for the lengths k = 0 to n.

    Raises:
        ValueError: n is out of its range.

    Example:
        >>> from pathnet import paths
        >>> paths.length_distribution(4)
        tensor([0.0625, 0.2500, 0.3750, 0.2500, 0.0625], dtype=torch.float64)

        In a network of 54 blocks, more than 95 % of the paths enter 19 to 35 residual modules:

        >>> round(float(paths.length_distribution(54)[19:36].sum()), 2)
        0.98
    """
    n = _check_n(n)
    return torch.tensor([math.comb(n, length) / (1 << n) for length in range(n + 1)], dtype=torch.float64)


def remaining_fraction(n: int, deleted: int) -> Tensor:
    """Return the share of the paths of each length that is left when ``deleted`` blocks are deleted (equation 8).

    Args:
        n: number of blocks, of one residual module each, 1 to 10000.
        deleted: number of blocks that are deleted, 0 to n.

    Returns:
        float64 [n + 1]: ``C(n - deleted, k) / C(n, k)`` for the lengths k = 0 to n; zero for k > n - deleted.

    Raises:
        ValueError: n or ``deleted`` is out of its range.

    Example:
        >>> from pathnet import paths
        >>> paths.remaining_fraction(4, deleted=2)
        tensor([1.0000, 0.5000, 0.1667, 0.0000, 0.0000], dtype=torch.float64)
    """
    n = _check_n(n)
    deleted = check_integer("deleted", deleted, 0, n)
    shares = [math.comb(n - deleted, length) / math.comb(n, length) for length in range(n + 1)]
    return torch.tensor(shares, dtype=torch.float64)
