"""The forms of blocks that fused engines know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Form", "FusedForm", "PostActivationForm", "Unit"]


@dataclass(frozen=True)
class Unit:
    """BN, then ReLU, then convolution: the unit of pre-activation blocks in fused engines."""

    bn: nn.BatchNorm2d
    conv: nn.Conv2d


@dataclass(frozen=True)
class FusedForm:
    """A pre-activation block in the form that fused engines take.

    Attributes:
        units: the units of the residual module, in the order of the forward pass.
        projection: the convolution of the skip connection, which reads the pre-activated input, as the first unit's
            does.
        pad: whether the skip connection takes every ``stride``-th pixel of the block's input and adds zero channels.
            With neither ``projection`` nor ``pad``, it is the identity.
        pad_before: number of those zero channels that come before the input's; the rest come after them.
    """

    units: tuple[Unit, ...]
    projection: nn.Conv2d | None = None
    pad: bool = False
    pad_before: int = 0

    @property
    def convs(self) -> tuple[nn.Conv2d, ...]:
        """Convolutions of the residual module, in the order of the forward pass."""
        return tuple(unit.conv for unit in self.units)


@dataclass(frozen=True)
class PostActivationForm:
    """A post-activation block in the form that fused engines take.

    The block is that of He et al., "Deep Residual Learning for Image Recognition", 2016: convolutions, each followed
    by its BN, with ReLUs between them, and a ReLU after the addition (`Block.join`).

    Attributes:
        convs, bns: the convolutions of the residual module and their BNs, in the order of the forward pass.
        projection, projection_bn: the convolution of the skip connection, which reads the block's input, and its BN.
        pad, pad_before: see `FusedForm`.
    """

    convs: tuple[nn.Conv2d, ...]
    bns: tuple[nn.BatchNorm2d, ...]
    projection: nn.Conv2d | None = None
    projection_bn: nn.BatchNorm2d | None = None
    pad: bool = False
    pad_before: int = 0


Form = FusedForm | PostActivationForm
"""Forms in which fused engines take a block."""
