"""Highway networks (Srivastava, Greff and Schmidhuber 2015), equation 3 in Veit et al. 2016."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pathnet.checks import check_number, one_of
from pathnet.models.building import Shortcut, blocks_a_stage, check_size, initialised, linear_head
from pathnet.models.pointwise import Pointwise
from pathnet.models.preactivation import PreactBlock
from pathnet.models.residual_net import FusedForm, ResidualNet

__all__ = ["HighwayBlock", "highway"]


GATE = 2
"""Number of the gate among the parts of a block."""
MOST_BIAS = 1e6
"""Maximum magnitude of a gate's bias; the gate is then 0 or 1."""


class HighwayBlock(PreactBlock):
    """``y = t(x) f(x) + (1 - t(x)) s(x)``, with the residual module f and the skip connection s of a `PreactBlock`.

    This is equation 3 of the paper (Srivastava et al. 2015). The block maps [B, in_channels, H, W] to
    [B, out_channels, H / stride, W / stride], sides rounded up. The gate t is the sigmoid of a 1x1 convolution of the
    pre-activated input, one value per pixel and channel. Paths treat the gate as a constant: the residual branch is
    ``t f``, the skip ``(1 - t) s``. The gradient through the gate itself, ``(f - s) J_t``, belongs to the third part.
    Deleting the block leaves s.

    Args:
        in_channels: number of channels of the block's input.
        out_channels: number of channels of its output.
        stride: stride of the first convolution, the gate and the skip connection.
        shortcut: the skip connection if stride or channels change, see `PreactBlock`.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> block = models.highway(depth=20, width=8, in_channels=1, gate_bias=-1.0).blocks[0]
        >>> block.openness(torch.randn(2, 8, 8, 8)).mean().item()  # sigmoid(-1), as the gate is untrained
        0.2689
        >>> block.part_count  # skip connection, residual module, gate
        3
    """

    has_gate = True

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        out_channels = check_size("out_channels", out_channels)
        super().__init__(in_channels, (3, 3), (out_channels, out_channels), stride, shortcut)
        self.gate = Pointwise(int(in_channels), out_channels, int(stride), bias=True)

    def openness(self, x: Tensor) -> Tensor:
        """Return t(x) in (0, 1), the share of the residual module in the block's output.

        Args:
            x: the block's input, [B, in_channels, H, W].

        Returns:
            [B, out_channels, H', W'], of the shape of the block's output.
        """
        return torch.sigmoid(self.gate(self._preactivated(x)))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, s and f, from one normalisation of x, so BN computes its statistics once."""
        preactivated = self._preactivated(x)
        t = torch.sigmoid(self.gate(preactivated))
        return t, self._skip(x, preactivated), self._residual(preactivated)

    def skip(self, x: Tensor) -> Tensor:
        preactivated = self._preactivated(x)
        return (1 - torch.sigmoid(self.gate(preactivated)).detach()) * self._skip(x, preactivated)

    def residual(self, x: Tensor) -> Tensor:
        preactivated = self._preactivated(x)
        return torch.sigmoid(self.gate(preactivated)).detach() * self._residual(preactivated)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t, skip, residual = self._parts(x)
        return (1 - t.detach()) * skip, t.detach() * residual

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        if wanted is not None and GATE not in wanted:
            return (*super().parts(x, wanted), None)
        t, skip, residual = self._parts(x)
        frozen = t.detach()
        return (1 - frozen) * skip, frozen * residual, t * (residual - skip).detach()

    def forward(self, x: Tensor) -> Tensor:
        t, skip, residual = self._parts(x)
        return t * residual + (1 - t) * skip

    def lesioned(self, x: Tensor) -> Tensor:
        return PreactBlock.skip(self, x)

    def form(self) -> FusedForm | None:
        return None

    def unfused_reason(self) -> str:
        return "its gate multiplies skip connection and residual module"


def highway(
    depth: int = 20,
    width: int = 16,
    num_classes: int = 10,
    in_channels: int = 3,
    gate_bias: float = -1.0,
    shortcut: Shortcut = "projection",
) -> ResidualNet:
    """Build the CIFAR form of `preact_resnet` with basic blocks, each with a learned gate instead of an addition.

    The network (Srivastava et al. 2015) maps images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        depth: number of layers with weights along the longest path, gates not counted: 6n + 2.
        width: number of channels of the first stage.
        num_classes: number of classes.
        in_channels: number of channels of the images.
        gate_bias: initial bias of every gate; with a negative one, blocks initially pass most of their input on.
        shortcut: the skip connection of blocks that change shape, see `preact_resnet`.

    Raises:
        ValueError: an argument is out of its range, or the depth is not 6n + 2.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> net = models.highway(depth=14, width=8, in_channels=1)
        >>> net.n, net.parts, net(torch.zeros(2, 1, 8, 8)).shape
        (6, 3, torch.Size([2, 10]))
    """
    one_of("shortcut", shortcut, Shortcut)
    width, in_channels = check_size("width", width), check_size("in_channels", in_channels)
    num_classes = check_size("num_classes", num_classes)
    gate_bias = check_number("gate_bias", gate_bias, -MOST_BIAS, MOST_BIAS)
    channels, blocks = width, []
    for stage in range(3):
        for position in range(blocks_a_stage(depth, "basic")):
            strided = stage > 0 and position == 0
            blocks.append(HighwayBlock(channels, width << stage, 2 if strided else 1, shortcut))
            channels = width << stage
    config = {
        "model": "highway",
        "depth": int(depth),
        "width": width,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "gate_bias": gate_bias,
        "shortcut": shortcut,
    }
    stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    net = initialised(ResidualNet(stem, blocks, linear_head(channels, num_classes), config))
    for block in blocks:
        # A gate that initially does not depend on its input: with weights as large as those of the residual modules,
        # it would be open in some places and closed in others, at random.
        nn.init.zeros_(block.gate.weight)
        nn.init.constant_(block.gate.bias, gate_bias)  # type: ignore[arg-type]
    return net
