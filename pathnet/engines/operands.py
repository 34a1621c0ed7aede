"""The operands of one fused block, as the op of each engine takes them in a training step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["BlockOperands"]


class BlockOperands(NamedTuple):
    """Parameters and numbers of a pre-activation block.

    Attributes:
        weights: that of each unit, [C_out, C_in, k, k], then the projection's, [C_out, C, 1, 1], if there is one and
            ``a`` is not 0.
        norms: gain and bias of each unit, [C_in] each, one unit after the other, for statistics of the batch; for
            running ones gain, bias, running mean and running variance.
        strides: those of ``weights``.
        epsilons: that of each unit's BN.
        coefficients: a and c, of which c is not 0.
        pad_before: number of zero channels that a padding skip connection adds before the input's.
    """

    weights: list[Tensor]
    norms: list[Tensor]
    strides: list[int]
    epsilons: list[float]
    coefficients: list[float]
    pad_before: int
