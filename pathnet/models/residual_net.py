"""The view of a network that everything else works on: a stem, residual building blocks, a head."""

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
    """BN, then ReLU, then convolution: the step that fused engines know."""

    bn: nn.BatchNorm2d
    conv: nn.Conv2d


@dataclass(frozen=True)
class FusedForm:
    """A block as fused engines see it: ``units`` in the order of the forward pass, and the skip.

    ``projection`` reads what the first unit's convolution reads (the pre-activated input). ``pad`` takes every
    ``stride``-th pixel of the block's input and appends zero channels. With neither, the skip is the identity.
    """

    units: tuple[Unit, ...]
    projection: nn.Conv2d | None = None
    pad: bool = False

    @property
    def convs(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions of the residual module, in the order of the forward pass."""
        return tuple(unit.conv for unit in self.units)


@dataclass(frozen=True)
class PostActivationForm:
    """A post-activation block (He et al., "Deep Residual Learning for Image Recognition", 2016), as engines see it.

    The residual module is convolutions, each with its BN, and ReLUs between them; a ReLU, the join, ends the block.
    ``projection`` reads the block's input, and ``projection_bn`` follows it; ``pad`` is as in `FusedForm`.
    """

    convs: tuple[nn.Conv2d, ...]
    bns: tuple[nn.BatchNorm2d, ...]
    projection: nn.Conv2d | None = None
    projection_bn: nn.BatchNorm2d | None = None
    pad: bool = False


Form = FusedForm | PostActivationForm
"""The forms of blocks that fused engines know."""


class Block(nn.Module):
    """A building block ``y = join(skip(x) + residual(x))`` (Veit et al. 2016, equation 1).

    A subclass defines `skip` and `residual`, each a whole function of the block's input. Where they share
    work it also overrides `branches`; where more than an addition joins them, `join`.

    Attributes:
        survival: the probability that a step of training keeps the residual module (stochastic depth). A block
            that has one below 1 multiplies ``residual`` by it in evaluation.
    """

    survival: float = 1.0

    def skip(self, x: Tensor) -> Tensor:
        """The skip connection; the identity unless overridden."""
        return x

    def residual(self, x: Tensor) -> Tensor:
        """The residual module f, the branch that holds the weights."""
        raise NotImplementedError

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(skip(x), residual(x))``, with what both need computed once."""
        return self.skip(x), self.residual(x)

    def join(self, z: Tensor) -> Tensor:
        """What follows the addition; the identity unless overridden."""
        return z

    def gated(self, x: Tensor) -> Tensor | None:
        """What goes through neither branch: a highway block's gate. None where all goes through the branches.

        Its value has no meaning; its Jacobian is that of the block less those of ``skip`` and ``residual``.
        """
        return None

    def three_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(skip(x), residual(x), gated(x))``, with what they need in common computed once."""
        return *self.branches(x), self.gated(x)

    def routed(self, x: Tensor, forward: Sequence[Coefficient], backward: Sequence[Coefficient]) -> Tensor:
        """``join(a skip(x) + c residual(x))``, differentiated as if its coefficients were others.

        Args:
            forward: (a, c); more is not looked at.
            backward: (a', c'), and where there is a gate also the coefficient of what flows through the gate itself,
                0 if it is not given. A branch that is left out in both directions is not computed.
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
        """The block when it is deleted (section 4.1): its skip, unless overridden."""
        return self.join(self.skip(x))

    def settle(self) -> None:
        """Called on copies in evaluation mode that are not trained any more: constants may go into weights."""

    def form(self) -> Form | None:
        """Return the block as fused engines read it, or None where they have no form for it."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        skip, residual = self.branches(x)
        return self.join(skip + residual)


class ResidualNet(nn.Module):
    """``head(block_n(... block_1(stem(x))))``.

    Args:
        stem: maps images ``[B, C, H, W]`` to ``y_0``, the input of block 1.
        blocks: the n building blocks, from input to output.
        head: maps ``y_n`` to the output (logits ``[B, classes]`` for the models here).
        config: how to build the network again: the constructor's name and its arguments, as JSON holds them.

    Attributes:
        frozen_statistics: where batch normalisation takes running statistics whatever its mode.
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
            raise ValueError(f"blocks: expected at least one building block, in a list, got {got}")
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
        """The number of building blocks, hence of residual modules."""
        return len(self.blocks)

    @property
    def parts(self) -> int:
        """Into how many parts a block's dependence on its input falls: skip and residual, and where there are gates
        what flows through the gate itself."""
        return 3 if any(type(block).gated is not Block.gated for block in self) else 2

    def __iter__(self) -> Iterator[Block]:
        """The building blocks, from input to output."""
        return iter(self.blocks)  # type: ignore[arg-type]

    def stem_weight(self) -> Tensor:
        """The weight of the first convolution, ``[C_0, C, k, k]``: the paper's first layer.

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
        """
        Args:
            x: [B, C, H, W]
            drawn: which blocks keep their residual module, all by default. The others are passed as deleted ones
                are, their modules computed neither here nor in the backward pass.
            routing, backward: see `pathnet.routed`, which any network that wraps this one can be given to.

        Raises:
            ValueError: ``drawn`` does not hold one value a block, or is given beside a routing; a routing is not one.
        """
        if drawn is not None and len(drawn) != self.n:
            raise ValueError(f"drawn: expected {self.n} values (one a block), got {len(drawn)}")
        if routing is not None or backward is not None:
            if drawn is not None:
                raise ValueError("drawn: expected None beside a routing")
            return self._routed(x, routing, backward)
        x = self.stem(x)
        for i, block in enumerate(self):
            x = block(x) if drawn is None or drawn[i] else block.lesioned(x)
        return torch.as_tensor(self.head(x))

    def _routed(self, x: Tensor, routing: Any, backward: Any) -> Tensor:
        ones = [[1.0] * self.parts] * self.n
        there = ones if routing is None else of_blocks(check_coefficients("routing", routing, self.n, self.parts))
        back = there if backward is None else of_blocks(check_coefficients("backward", backward, self.n, self.parts))
        x = self.stem(x)
        for block, forward, own in zip(self, there, back, strict=True):
            whole = len(own) == self.parts and all(known_as(each, 1) for each in (*forward[:2], *own))
            x = block(x) if whole else block.routed(x, forward, own)
        return torch.as_tensor(self.head(x))


def check_net(net: object) -> None:
    """Raises ValueError unless ``net`` is a `ResidualNet`."""
    if not isinstance(net, ResidualNet):
        raise ValueError(f"net: expected a pathnet ResidualNet, got {described(net)}")


def first_convolution(net: ResidualNet) -> nn.Conv2d | None:
    """Return the convolution that the stem begins with, or None where it is known to begin with none."""
    first = net.stem[0] if isinstance(net.stem, nn.Sequential) and len(net.stem) else net.stem
    return first if isinstance(first, nn.Conv2d) else None


def check_inputs(name: str, inputs: object, net: ResidualNet) -> Tensor:
    """Return ``inputs``, a dense tensor of a shape, type and device that the network's stem takes.

    Args:
        name: what an error calls the argument.

    Raises:
        ValueError: it is no such tensor. Of stems that do not begin with a convolution only the device is known.
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
    """The network within DistributedDataParallel, `torch.compile`'s module, or both; itself where nothing wraps it.

    Raises:
        ValueError: there is no `ResidualNet` in it.
    """
    inner: Any = net
    while not isinstance(inner, ResidualNet):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"net: expected a pathnet ResidualNet, or one wrapped, got {described(net)}")
    return inner
