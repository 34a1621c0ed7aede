"""The reference engine: autograd through each block, for any model and device, in float32 or float64.

It is the truth that the other engines are held to, so it is as plain as can be: one vector-Jacobian product a
path and branch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet import scaling
from pathnet.engines import fallback
from pathnet.models.residual_net import Block, ResidualNet, Unit
from pathnet.recording import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["BlockInputs", "FrozenBlock", "Modules", "ReferenceEngine", "freeze"]


@dataclass(frozen=True)
class Modules:
    """The blocks as they are."""

    blocks: Sequence[Block]


@dataclass(frozen=True)
class BlockInputs:
    """The blocks and what entered them, ``y_0`` to ``y_{n-1}``."""

    modules: Sequence[Block]
    tensors: Sequence[Tensor]


class ReferenceEngine:
    """Walks by ``torch.autograd.grad`` through one block at a time, its branches computed anew."""

    name = "reference"
    device_type: str | None = None

    def unavailable(self) -> str | None:
        return None

    def unsupported(
        self,
        net: ResidualNet,
        bn: BatchNormMode,
        precision: Precision,
        y0_shape: Sequence[int],
        device: torch.device,
    ) -> str | None:
        return 'no precision="bfloat16"' if precision == "bfloat16" else None

    def prepare(self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]) -> Modules:
        return Modules(list(net.blocks))  # type: ignore[arg-type]

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, BlockInputs]:
        assert isinstance(prepared, Modules)
        inputs, y = [], y0
        with torch.no_grad():
            for block in prepared.blocks:
                inputs.append(y)
                y = block(y.clone())
        return y, BlockInputs(prepared.blocks, inputs)

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(blocks, BlockInputs)
        grads = grad.expand(len(routing), *grad.shape)
        exponents = exponent.expand(len(routing), *exponent.shape)
        coefficients = routing.tolist()
        for i in reversed(range(len(blocks.modules))):
            ways = [own[i] for own in coefficients]
            grads, exponents = _through(blocks.modules[i], blocks.tensors[i], grads, exponents, ways)
        return grads, exponents

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        largest = max(tensor.nbytes for tensor in (*blocks.tensors, grad))
        return fallback.norms(lambda part: self.routed_backward(blocks, grad, exponent, part), grad, largest, routing)

    def sums_by_length(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(blocks, BlockInputs)

        def walk(
            i: int, grads: Tensor, exponents: Tensor, ways: Sequence[tuple[float, float]]
        ) -> tuple[Tensor, Tensor]:
            return _through(blocks.modules[i], blocks.tensors[i], grads, exponents, ways)

        return fallback.sums_by_length(walk, grad, exponent, routing)

    def sums_by_length_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return fallback.norms_of(*self.sums_by_length(blocks, grad, exponent, routing))

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(prepared, Modules)
        return fallback.routed_forward(prepared.blocks, y0, routing)


LIFT = {torch.float32: 100, torch.float64: 900}
"""By how many powers of two a gradient is lifted that a block would take out of its type's range."""


def _through(
    block: Block, x: Tensor, grads: Tensor, exponents: Tensor, coefficients: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """One block's routed Jacobian, from its output to its input.

    Inside the block nothing is rescaled. Where hardly anything is left of a gradient, or it is not finite, it goes
    through once more, lifted or lowered by a power of two: a block may shrink it by 2^200 in float32.

    Args:
        grads, exponents: scaled gradients [P, B, ...], and int32 [P, B] or [P, 1].
        coefficients: P times (a, c) or (a, c, gate).

    Returns:
        Scaled gradients and exponents of the same kind, the largest magnitudes brought to [1/2, 1).
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        # Copies, since a branch or a join may begin with an in-place ReLU.
        skip, residual = block.branches(x.clone())
        z = (skip + residual).detach().requires_grad_()
        y = block.join(z.clone())
        asked = max(map(len, coefficients), default=0)
        branches = (skip, residual, *([block.gated(x.clone())] if asked > 2 else []))

    def walked(grad: Tensor, own: Sequence[float]) -> Tensor:
        (grad,) = torch.autograd.grad(y, z, grad, retain_graph=True)
        parts = [
            coefficient * torch.autograd.grad(branch, x, grad, retain_graph=True)[0]
            for coefficient, branch in zip(own, branches, strict=True)
            if coefficient != 0 and branch is not None
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(x)

    if len(grads) == 0:
        return grads.new_zeros(0, *x.shape), exponents
    through = torch.stack([walked(*pair) for pair in zip(grads, coefficients, strict=True)])
    lift = LIFT[grads.dtype]
    largest = scaling.largest(through, exponents)
    lost = (largest < 2.0 ** (-lift // 2)) & (scaling.largest(grads, exponents) > 0)
    lifts = torch.where(torch.isfinite(largest), lift * lost.int(), -lift)
    for path in lifts.any(1).nonzero().flatten().tolist():
        again = walked(
            scaling.times_power_of_two(grads[path], scaling.beside(lifts[path], grads[path])), coefficients[path]
        )
        better = torch.isfinite(scaling.largest(again[None], exponents[path : path + 1]))[0]
        lifts[path] = lifts[path].where(better, 0)
        through[path] = torch.where(scaling.beside(lifts[path], again) != 0, again, through[path])
    return scaling.rescale(through.detach(), exponents - lifts)


class FrozenBlock(Block):
    """A fused block at a recorded point: ReLU is a multiplication with its bits, BN an affine map.

    Args:
        block: one with a `fused_form`, BN in evaluation mode.
        bits: for each unit the recorded ReLU bits, bool [B, C, H, W].
    """

    def __init__(self, block: Block, bits: Sequence[Tensor]) -> None:
        super().__init__()
        form = block.fused_form()
        if form is None or len(form.units) != len(bits):
            raise ValueError("bits: expected one tensor for each unit of a block that has a fused form")
        self.form, self.bits = form, bits

    def _unit(self, position: int, x: Tensor) -> Tensor:
        unit: Unit = self.form.units[position]
        return torch.as_tensor(unit.bn(x)) * self.bits[position].to(x.dtype)

    def skip(self, x: Tensor) -> Tensor:
        if self.form.projection is not None:
            return torch.as_tensor(self.form.projection(self._unit(0, x)))
        if not self.form.pad:
            return x
        stride = math.prod(unit.conv.stride[0] for unit in self.form.units)
        extra_channels = self.form.units[-1].conv.out_channels - x.shape[1]
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, extra_channels))

    def residual(self, x: Tensor) -> Tensor:
        for position, unit in enumerate(self.form.units):
            x = unit.conv(self._unit(position, x))
        return x


class FrozenPostBlock(Block):
    """A post-activation block at a recorded point, as `FrozenBlock` is a pre-activation one.

    Args:
        bits: of its ReLUs in the order of the forward pass, the join's last.
    """

    def __init__(self, block: Block, bits: Sequence[Tensor]) -> None:
        super().__init__()
        form = block.post_activation_form()
        if form is None or len(form.convs) != len(bits):
            raise ValueError("bits: expected one tensor for each ReLU of a block that has a post-activation form")
        self.form, self.bits, self.skip_connection = form, bits, block.skip

    def skip(self, x: Tensor) -> Tensor:
        return self.skip_connection(x)

    def residual(self, x: Tensor) -> Tensor:
        for position, (conv, bn) in enumerate(zip(self.form.convs, self.form.bns, strict=True)):
            x = bn(conv(x * self.bits[position - 1].to(x.dtype) if position else x))
        return x

    def join(self, z: Tensor) -> Tensor:
        return z * self.bits[-1].to(z.dtype)


def freeze(net: ResidualNet, bits: Sequence[Sequence[Tensor]]) -> ResidualNet:
    """The network as the affine map that it is around one recorded batch, in float64.

    The reference walks on it in place of the network when it judges another engine's walk: on the bits that
    the other engine recorded, since one flipped bit would otherwise outweigh all rounding.

    Args:
        net: in evaluation mode, every block with a form that fused engines know.
        bits: the recorded ReLU bits, ``bits[block][unit]``, bool [B, C, H, W].
    """
    net = copy.deepcopy(net).double()
    blocks = [
        FrozenBlock(block, own) if block.post_activation_form() is None else FrozenPostBlock(block, own)
        for block, own in zip(net, bits, strict=True)
    ]
    return ResidualNet(net.stem, blocks, net.head)
