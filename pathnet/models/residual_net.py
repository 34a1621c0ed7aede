"""A network as a stem, residual blocks and a head: the view that the rest of pathnet works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import check_tensor, described
from pathnet.models.coefficients import Coefficient, check_coefficients, known_as, left_out, of_blocks, scaled

__all__ = [
    "Block",
    "Form",
    "FusedForm",
    "PostActivationForm",
    "ResidualNet",
    "Unit",
    "check_inputs",
    "check_net",
    "first_convolution",
    "unwrapped",
]


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


class Block(nn.Module):
    """A residual block ``y = join(skip(x) + residual(x))`` (Veit et al. 2016, equation 1).

    A subclass defines `residual`, and `skip` if that is not the identity, each as a function of the block's input
    alone. If they share work it also overrides `branches`; if more than an addition joins them, `join`.

    Attributes:
        survival: probability that a training step keeps the residual module (stochastic depth). A block with one
            below 1 multiplies ``residual`` by it in evaluation.
    """

    survival: float = 1.0

    def skip(self, x: Tensor) -> Tensor:
        """Return the skip connection's output; ``x`` unless overridden."""
        return x

    def residual(self, x: Tensor) -> Tensor:
        """Return the output of the residual module f, the branch with the weights."""
        raise NotImplementedError

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(skip(x), residual(x))``, with shared work done once."""
        return self.skip(x), self.residual(x)

    def join(self, z: Tensor) -> Tensor:
        """Apply the operations after the addition; none unless overridden."""
        return z

    def gated(self, x: Tensor) -> Tensor | None:
        """Return the part of the block outside both branches, such as a highway block's gate; None if there is none.

        Only its Jacobian is used, not its value: the block's Jacobian less those of ``skip`` and ``residual``.
        """
        return None

    def three_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``(skip(x), residual(x), gated(x))``, with shared work done once."""
        return *self.branches(x), self.gated(x)

    def routed(self, x: Tensor, forward: Sequence[Coefficient], backward: Sequence[Coefficient]) -> Tensor:
        """Return ``join(a skip(x) + c residual(x))``, with other coefficients in the backward pass.

        A branch whose coefficients are 0 in both directions is not computed.

        Args:
            forward: (a, c); further coefficients are ignored.
            backward: (a', c'), and for a block with a gate also the coefficient of the gradient through the gate
                itself, 0 by default.
        """
        (a, c), (back_a, back_c), gate = forward[:2], backward[:2], backward[2:]
        gated: Tensor | None = None
        if gate and not left_out(0.0, gate[0]):
            skip, residual, gated = self.three_parts(x)
        elif left_out(c, back_c):
            return self.join(scaled(self.skip(x), a, back_a))
        elif left_out(a, back_a):
            return self.join(scaled(self.residual(x), c, back_c))
        else:
            skip, residual = self.branches(x)
        z = scaled(skip, a, back_a) + scaled(residual, c, back_c)
        return self.join(z if gated is None else z + scaled(gated, 0.0, gate[0]))

    def lesioned(self, x: Tensor) -> Tensor:
        """Return the output of the block when it is deleted (section 4.1): its skip connection, unless overridden."""
        return self.join(self.skip(x))

    def settle(self) -> None:
        """Fold constants into weights. Called on copies in evaluation mode that will not be trained."""

    def form(self) -> Form | None:
        """Return the form in which fused engines take the block, or None if they cannot run it."""
        return None

    def unfused_reason(self) -> str:
        """Return why `form` returns None, in words that can follow "block 3: "."""
        return f"its class {type(self).__name__} defines no fused form"

    def forward(self, x: Tensor) -> Tensor:
        skip, residual = self.branches(x)
        return self.join(skip + residual)


class ResidualNet(nn.Module):
    """``head(block_n(... block_1(stem(x))))``.

    Args:
        stem: maps images ``[B, C, H, W]`` to ``y_0``, the input of block 1.
        blocks: the n residual blocks, from input to output.
        head: maps ``y_n`` to the output (logits ``[B, classes]`` for the models here).
        config: the constructor's name and arguments in JSON types, from which `build` builds the network again.

    Attributes:
        frozen_statistics: the batch normalisations that use running statistics in every mode.
    """

    frozen_statistics: tuple[str, ...] = ()

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        head: nn.Module,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("stem", stem), ("head", head)):
            if not isinstance(part, nn.Module):
                raise ValueError(f"{name}: expected a torch.nn.Module, got {described(part)}")
        if not isinstance(blocks, Sequence | nn.ModuleList) or len(blocks) == 0:
            got = "none" if isinstance(blocks, Sequence) else described(blocks)
            raise ValueError(f"blocks: expected at least one residual block, in a list, got {got}")
        for block in blocks:
            if not isinstance(block, Block):
                raise ValueError(f"blocks: expected pathnet Blocks, got {described(block)}")
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"config: expected a dictionary or None, got {described(config)}")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.config = config

    @property
    def n(self) -> int:
        """Number of residual blocks, hence of residual modules."""
        return len(self.blocks)

    @property
    def parts(self) -> int:
        """Number of parts of a block's Jacobian: skip, residual module, and gate if any block has one."""
        return 3 if any(type(block).gated is not Block.gated for block in self) else 2

    def __iter__(self) -> Iterator[Block]:
        """Iterate over the residual blocks, from input to output."""
        return iter(self.blocks)  # type: ignore[arg-type]

    def stem_weight(self) -> Tensor:
        """Return the weight of the first convolution, ``[C_0, C, k, k]``: the paper's first layer.

        Raises:
            ValueError: the stem has no convolution.
        """
        for module in self.stem.modules():
            if isinstance(module, nn.Conv2d):
                return module.weight
        raise ValueError('at="stem_weight": this network\'s stem has no convolution')

    def forward(
        self,
        x: Tensor,
        drawn: Sequence[bool] | None = None,
        routing: Any = None,
        backward: Any = None,
    ) -> Tensor:
        """Return the network's output.

        Args:
            x: inputs, [B, C, H, W] for images.
            drawn: for each block, whether it keeps its residual module; all do by default. Other blocks run as if
                deleted: their residual modules are computed neither here nor in the backward pass.
            routing, backward: see `pathnet.routed`, which also accepts networks that wrap this one.

        Raises:
            ValueError: ``drawn`` does not have one value per block, or comes with a routing; or a routing is invalid.
        """
        if drawn is not None and len(drawn) != self.n:
            raise ValueError(f"drawn: expected {self.n} values (one per block), got {len(drawn)}")
        if routing is not None or backward is not None:
            if drawn is not None:
                raise ValueError(f"drawn: expected None with a routing, got {described(drawn)}")
            return self._routed(x, routing, backward)
        x = self.stem(x)
        for i, block in enumerate(self):
            x = block(x) if drawn is None or drawn[i] else block.lesioned(x)
        return torch.as_tensor(self.head(x))

    def _routed(self, x: Tensor, routing: Any, backward: Any) -> Tensor:
        ones = [[1.0] * self.parts] * self.n
        rows = ones if routing is None else of_blocks(check_coefficients("routing", routing, self.n, self.parts))
        back_rows = rows
        if backward is not None:
            back_rows = of_blocks(check_coefficients("backward", backward, self.n, self.parts))
        x = self.stem(x)
        for block, row, back_row in zip(self, rows, back_rows, strict=True):
            ordinary = len(back_row) == self.parts and all(known_as(factor, 1) for factor in (*row[:2], *back_row))
            x = block(x) if ordinary else block.routed(x, row, back_row)
        return torch.as_tensor(self.head(x))


def check_net(net: object) -> None:
    """Raise ValueError unless ``net`` is a `ResidualNet`."""
    if not isinstance(net, ResidualNet):
        raise ValueError(f"net: expected a pathnet ResidualNet, got {described(net)}")


def first_convolution(net: ResidualNet) -> nn.Conv2d | None:
    """Return the convolution that the stem begins with, or None if it is not known to begin with one."""
    first = net.stem[0] if isinstance(net.stem, nn.Sequential) and len(net.stem) else net.stem
    return first if isinstance(first, nn.Conv2d) else None


def check_inputs(name: str, inputs: object, net: ResidualNet) -> Tensor:
    """Return ``inputs``, a dense tensor whose shape, type and device the network's stem accepts.

    Args:
        name: the argument's name in errors.

    Raises:
        ValueError: it is no such tensor. If the stem does not begin with a convolution, only the device is checked.
    """
    device = next((parameter.device for parameter in net.parameters()), None)
    checked = check_tensor(name, inputs, device=device)
    first = first_convolution(net)
    if first is not None:
        check_tensor(name, inputs, "floating-point", [None, first.in_channels, None, None], device)
        if checked.numel() == 0:
            raise ValueError(f"{name}: expected images that are not empty, got shape {list(checked.shape)}")
        if checked.dtype != first.weight.dtype and not torch.is_autocast_enabled(checked.device.type):
            raise ValueError(f"{name}: expected {first.weight.dtype} (the network's), got {checked.dtype}")
    return checked


def unwrapped(net: nn.Module) -> ResidualNet:
    """Return the network inside DistributedDataParallel, `torch.compile`'s module, or both; or the network itself.

    Raises:
        ValueError: there is no `ResidualNet` inside.
    """
    inner: Any = net
    while not isinstance(inner, ResidualNet):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"net: expected a pathnet ResidualNet, or one wrapped, got {described(net)}")
    return inner
