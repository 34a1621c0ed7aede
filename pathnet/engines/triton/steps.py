"""Steps of routings at every block, in the order of a pass, by which routings that agree share their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathnet.engines.triton.network import FusedBlock

__all__ = [
    "ALL_EXITS",
    "EXITS",
    "USUAL_BACKWARD",
    "USUAL_FORWARD",
    "Exit",
    "Flags",
    "Floats",
    "Steps",
    "steps_backward",
    "steps_forward",
]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Exit(NamedTuple):
    """Kind of a launch that ends a block: the branches that end in it, and whether the skip is an identity."""

    residual: bool
    skip: bool
    identity: bool


USUAL_BACKWARD = frozenset({Exit(True, False, True), Exit(True, False, False), Exit(False, True, False)})
"""Exits that paths need: a block's module, or its skip."""

USUAL_FORWARD = frozenset({Exit(True, True, True), Exit(True, True, False), Exit(False, True, False)})
"""Exits that deleted blocks need: both branches, or the skip."""

EXITS = [Exit(*(bool(code >> bit & 1) for bit in range(3))) for code in range(8)]
"""Exits by code: 1 for the residual module, 2 for the skip, 4 for an identity, added up."""

ALL_EXITS = frozenset(EXITS)


@dataclass(frozen=True)
class Steps:
    """Steps of all routings at every block, in the order of a pass.

    Attributes:
        a, c: float64 [n, P], coefficients of skip and residual module; backward, of magnitude about 1.
        passes: bool [n, P], whether a routing passes the block unchanged, through an identity.
        enters: bool [n, P], whether kernels take it through the block. Neither holds once a routing is zero.
        keys: float64 [P, n, 2], equal for two routings where they do the same; zeros, the least of all byte strings,
            where they pass.
        mantissas, exponents: float64 and int64 [P], scale factors still to be applied to the results.
        exits: the kinds of launches that end blocks.
    """

    a: Floats
    c: Floats
    passes: Flags
    enters: Flags
    keys: Floats
    mantissas: Floats
    exponents: NDArray[np.int64]
    exits: frozenset[Exit]

    @property
    def count(self) -> int:
        """Number of routings."""
        return len(self.exponents)


def steps_backward(blocks: Sequence[FusedBlock], coefficients: Floats) -> Steps:
    """Return the steps from the last block to the first.

    The backward pass is linear: where a routing passes a block by an identity, its coefficient is a factor of the
    result, and so is the power of two of all other coefficients.

    Args:
        coefficients: [P, n, 2], the (a, c) of every block.
    """
    a, c = (np.ascontiguousarray(coefficients[:, ::-1, branch].T) for branch in range(2))
    size, exponents = np.frexp(np.maximum(np.abs(a), np.abs(c)))
    zero = size == 0
    a, c = np.ldexp(a, -exponents), np.ldexp(c, -exponents)
    passes = _identities(blocks)[::-1, None] & (c == 0) & ~zero
    enters = ~(passes | np.logical_or.accumulate(zero, 0))
    mantissas, total = np.ones(a.shape[1]), exponents.sum(0, dtype=np.int64)
    factors = np.where(passes, a, 1.0)
    # In parts, since the product of more than a thousand numbers of 1/2 would leave float64's range.
    for first in range(0, len(factors), 512):
        mantissas, more = np.frexp(mantissas * np.multiply.reduce(factors[first : first + 512], 0))
        # In [1, 2): the mantissa is 1 where no block was passed.
        mantissas, total = 2 * mantissas, total + more - 1
    return _steps(blocks[::-1], a, c, passes, enters, mantissas, total)


def steps_forward(blocks: Sequence[FusedBlock], coefficients: Floats) -> Steps:
    """Return the steps from the first block to the last, coefficients unchanged."""
    a, c = (np.ascontiguousarray(coefficients[:, :, branch].T) for branch in range(2))
    passes = _identities(blocks)[:, None] & (c == 0) & (a == 1)
    count = a.shape[1]
    return _steps(blocks, a, c, passes, ~passes, np.ones(count), np.zeros(count, dtype=np.int64))


def _identities(blocks: Sequence[FusedBlock]) -> Flags:
    return np.array([block.identity for block in blocks], dtype=bool)


def _steps(
    blocks: Sequence[FusedBlock],
    a: Floats,
    c: Floats,
    passes: Flags,
    enters: Flags,
    mantissas: Floats,
    exponents: NDArray[np.int64],
) -> Steps:
    zero = (a == 0) & (c == 0)
    # Adding 0 turns -0 into 0: equal coefficients then have equal bytes.
    a, c = a + 0.0, c + 0.0
    keys = np.stack([a, c], -1)
    keys[passes] = 0.0
    keys[zero] = np.inf
    codes = (c != 0) + 2 * (a != 0) + 4 * _identities(blocks)[:, None]
    codes_seen = np.flatnonzero(np.bincount(codes[enters], minlength=8))
    exits = frozenset(EXITS[code] for code in codes_seen.tolist())
    return Steps(a, c, passes, enters, np.ascontiguousarray(keys.transpose(1, 0, 2)), mantissas, exponents, exits)
