"""Agreement of a faster computation with the plain one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AGREEMENT", "agree"]

AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Maximum relative difference of a result from the plain one, by the narrowest type in the block."""


def agree(result: Tensor, expected: Tensor, inner: torch.dtype) -> bool:
    """Return whether a result is finite and that of the plain computation, but for rounding.

    Args:
        inner: the narrowest floating-point type in the computation.
    """
    if result.shape != expected.shape:
        return False
    return bool((result - expected).norm() <= AGREEMENT[inner] * expected.norm())
