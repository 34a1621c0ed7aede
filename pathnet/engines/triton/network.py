"""A network as the kernels see it: units, skips and packed weights; `packing` makes it.

Boundaries of post-activation blocks are at the additions, as in `pathnet.engines.tables`: the ReLU after an addition
is the ReLU of the next block's first unit, and that block's skip starts after this ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from pathnet.engines.magnitudes import Magnitudes
from pathnet.recording import BatchNormMode, Precision

__all__ = ["DTYPES", "PackedConvolution", "FusedBlock", "Shape", "TritonNetwork"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types of gradients and of weights in backward passes, by precision."""


@dataclass(frozen=True)
class Shape:
    """Shape of one image."""

    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> int:
        return self.channels * self.pixels


@dataclass(frozen=True)
class PackedConvolution:
    """A convolution that keeps the side, except for its stride.

    Attributes:
        weight: [kernel**2, channels of the input, channels of the output], float32 or bfloat16.
        transposed: [kernel**2, channels of the output, channels of the input].
        shift: float32 [channels of the output], added to the output; None for nothing.
    """

    kernel: int
    stride: int
    input: Shape
    output: Shape
    weight: Tensor
    transposed: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class FusedBlock:
    """A block's convolutions and its skip: a projection, or every stride-th pixel with channels zero-padded.

    Attributes:
        first: index of its first unit among all units of the network.
        activated: whether it is a post-activation block: its first unit has no BN, and its skip starts after that
            unit's ReLU, also without a projection.
        ends: indices, following those of all units, of the BNs after its last convolution and its projection, if
            their statistics are the batch's; otherwise the convolutions contain them.
        pad_before: number of zero channels that its skip adds before the input's.
    """

    convolutions: Sequence[PackedConvolution]
    projection: PackedConvolution | None
    first: int
    activated: bool = False
    ends: Sequence[int] = ()
    pad_before: int = 0

    @property
    def input(self) -> Shape:
        return self.convolutions[0].input

    @property
    def output(self) -> Shape:
        return self.convolutions[-1].output

    @property
    def stride(self) -> int:
        """Stride of the skip."""
        return math.prod(conv.stride for conv in self.convolutions)

    @cached_property
    def identity(self) -> bool:
        return self.projection is None and self.input == self.output and not self.activated


@dataclass(frozen=True)
class TritonNetwork:
    """A network packed for the kernels.

    Attributes:
        affine: float32 [units, 2, widest], BN's gain and bias, channels zero-padded; here and below, the
            blocks' ends follow the units.
        statistics: float32 [units, 2, widest], the running mean and variance; empty in BN mode ``batch``.
        epsilons, epsilon: each unit's BN epsilon; on the host, and float32 [units, 1] on the
            device.
        precision: that of backward passes; forward passes are float32-accurate in each.
        magnitudes: powers of two that the factors of backward passes were divided by; None if nothing was divided.
        scale_exponents: int32 [units, 1], the powers of two that BN's factors were divided by; None likewise.
    """

    blocks: Sequence[FusedBlock]
    affine: Tensor
    statistics: Tensor
    epsilons: Sequence[float]
    epsilon: Tensor
    bn: BatchNormMode
    precision: Precision
    magnitudes: Magnitudes | None = None
    scale_exponents: Tensor | None = None

    @property
    def backward_dtype(self) -> torch.dtype:
        """Type of the gradients in backward passes."""
        return DTYPES[self.precision]

    @property
    def post(self) -> bool:
        """True for post-activation blocks, whose last join is not part of the network."""
        return self.blocks[-1].activated

    def floor(self, unit: int) -> float:
        """Return the clamp minimum of a unit's activations: 0, or -inf for the first unit of post-activation blocks,
        since no ReLU follows the stem."""
        return -math.inf if self.post and unit == 0 else 0.0

    @property
    def widest(self) -> int:
        """Maximum number of channels of an activation."""
        return self.affine.shape[2]

    @cached_property
    def convolutions(self) -> list[PackedConvolution]:
        """Convolutions of all units."""
        return [conv for block in self.blocks for conv in block.convolutions]

    @cached_property
    def normalized(self) -> list[Shape | None]:
        """Input shapes of the BNs of all units, then of the blocks' ends; None for a unit without BN."""
        units = [
            None if block.activated and conv is block.convolutions[0] else conv.input
            for block in self.blocks
            for conv in block.convolutions
        ]
        return [*units, *(block.output for block in self.blocks for _ in block.ends)]

    @cached_property
    def largest(self) -> int:
        """Maximum number of elements of one sample's activation."""
        return max(shape.size for conv in self.convolutions for shape in (conv.input, conv.output))

    def bits_sizes(self, batch: int) -> list[int]:
        """Return each unit's bytes of ReLU bits [B, H, W, ceil(C / 8)]."""
        return [batch * conv.input.pixels * -(-conv.input.channels // 8) for conv in self.convolutions]

    def bits_starts(self, batch: int) -> list[int]:
        """Return the first byte of each unit, and the end of the last."""
        return _starts(self.bits_sizes(batch))

    def normalized_sizes(self, batch: int) -> list[int]:
        """Return the elements of the normalised activations [B, H, W, C] of all units, then of the blocks' ends."""
        return [0 if shape is None else batch * shape.size for shape in self.normalized]

    def normalized_starts(self, batch: int) -> list[int]:
        """Return the first element of each, and the end of the last."""
        return _starts(self.normalized_sizes(batch))


def _starts(sizes: Iterable[int]) -> list[int]:
    """Return multiples of 16, which let kernels read words of 16 bytes."""
    return list(accumulate((-(-size // 16) * 16 for size in sizes), initial=0))
