"""The forms of blocks that fused engines know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

__all__ = ["Form", "FusedEngine", "FusedForm", "PostActivationForm", "Unit"]


@dataclass(frozen=True)
class Unit:
    """BN, then ReLU, then convolution: the unit of pre-activation blocks in fused engines (He et al. 2016).

    Attributes:
        bn: the batch normalisation of the unit's input, [B, C_in, H, W].
        conv: the convolution after the ReLU, whose weight is [C_out, C_in, k, k].

    Example:
        >>> from pathnet import models
        >>> block = models.preact_resnet(depth=14, width=8, in_channels=1).blocks[0]
        >>> [unit.conv.kernel_size for unit in block.form().units]
        [(3, 3), (3, 3)]
    """

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

    Example:
        >>> from pathnet import models
        >>> form = models.preact_resnet(depth=14, width=8, in_channels=1).blocks[2].form()
        >>> form.convs[0].stride, form.projection.weight.shape
        ((2, 2), torch.Size([16, 8, 1, 1]))
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
        convs: the convolutions of the residual module, in the order of the forward pass.
        bns: the BN of each of them.
        projection: the convolution of the skip connection, which reads the block's input; None if there is none.
        projection_bn: its BN.
        pad: whether the skip connection takes every ``stride``-th pixel and adds zero channels, see `FusedForm`.
        pad_before: number of those zero channels that come before the input's.

    Example:
        >>> from pathnet import models
        >>> form = models.resnet(depth=8, width=4, in_channels=1).blocks[1].form()
        >>> [conv.stride for conv in form.convs], form.projection, form.pad
        ([(2, 2), (1, 1)], None, True)
    """

    convs: tuple[nn.Conv2d, ...]
    bns: tuple[nn.BatchNorm2d, ...]
    projection: nn.Conv2d | None = None
    projection_bn: nn.BatchNorm2d | None = None
    pad: bool = False
    pad_before: int = 0


Form = FusedForm | PostActivationForm
"""Forms in which fused engines take a block."""

FusedEngine = Literal["auto", "cpu", "triton", "none"]
"""Engines of fused blocks: ``auto`` is ``cpu`` for tensors on the CPU and ``triton`` on GPUs; ``none`` is none."""
