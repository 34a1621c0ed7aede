"""The reference engine: autograd through each block, for any model and device, in float32 or float64.

It is the truth that the other engines are held to, so it is as plain as can be: one vector-Jacobian product
per path and branch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet import chunks, scaling
from pathnet.engines import fallback
from pathnet.engines.engine import Job
from pathnet.models.coefficients import Coefficient
from pathnet.models.context import Context
from pathnet.models.residual_net import Block, FusedForm, PostActivationForm, ResidualNet
from pathnet.scaling import ScaledGradient

__all__ = ["FrozenBlock", "ReferenceEngine", "ReferencePrepared", "ReferenceWalk", "freeze"]


class ReferenceEngine:
    """Passes by ``torch.autograd.grad`` through one block at a time, recomputing its branches."""

    name = "reference"
    device_type: str | None = None

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, job: Job) -> str | None:
        return f'no precision="{job.precision}"' if job.precision in ("bfloat16", "network") else None

    def prepare(self, job: Job) -> ReferencePrepared:
        return ReferencePrepared(list(job.net))


@dataclass(frozen=True)
class ReferencePrepared:
    """The network's blocks, unchanged."""

    blocks: Sequence[Block]

    def bound(self, context: Context) -> ReferencePrepared:
        blocks = [block.bound(context) for block in self.blocks]
        return self if blocks == list(self.blocks) else replace(self, blocks=blocks)

    def max_routings(self, y0: Tensor) -> int | None:
        return None

    def record(self, y0: Tensor) -> tuple[Tensor, ReferenceWalk]:
        inputs, y = [], y0
        with torch.no_grad():
            for block in self.blocks:
                inputs.append(y)
                y = block(y.clone())
        return y, ReferenceWalk(self.blocks, inputs, y.nbytes)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        return fallback.routed_forward(self.blocks, y0, routing)


@dataclass(frozen=True)
class ReferenceWalk:
    """The blocks and their inputs.

    Attributes:
        tensors: ``y_0`` to ``y_{n-1}``.
        output_bytes: bytes of ``y_n``, which the record does not keep.
    """

    blocks: Sequence[Block]
    tensors: Sequence[Tensor]
    output_bytes: int

    def max_routings(self) -> int | None:
        return max(1, chunks.CHUNK_BYTES // max(1, self.output_bytes, *(tensor.nbytes for tensor in self.tensors)))

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        grads = ScaledGradient(*(tensor.expand(len(routing), *tensor.shape) for tensor in start))
        coefficients = routing.tolist()
        for i in reversed(range(len(self.blocks))):
            grads = self._through_block(i, grads, [of_routing[i] for of_routing in coefficients])
        return grads

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return scaling.norms(*self.routed_backward(start, routing))

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        return fallback.sums_by_length(self._through_block, start, routing)

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return fallback.norms_of(self.sums_by_length(start, routing))

    def _through_block(
        self, i: int, grads: ScaledGradient, coefficients: Sequence[Sequence[float]]
    ) -> ScaledGradient:
        return _through(self.blocks[i], self.tensors[i], grads, coefficients)


LIFT = {torch.float32: 100, torch.float64: 900}
"""The power of two that lifts a gradient which a block would take out of its type's range."""


def _through(
    block: Block, x: Tensor, grads: ScaledGradient, coefficients: Sequence[Sequence[float]]
) -> ScaledGradient:
    """Return one block's routed vector-Jacobian products, from its output to its input.

    Inside the block nothing is rescaled. A gradient that nearly vanishes, or is not finite, goes through once more,
    lifted or lowered by a power of two: a block may shrink it by 2^200 in float32.

    Args:
        grads: scaled gradients at the output: mantissa [P, B, ...], exponent int32 [P, B] or [P, 1].
        coefficients: a row of a routing for each of the P gradients, see `Block.coefficients`.

    Returns:
        Scaled gradients at the input, the largest magnitudes scaled to [1/2, 1).
    """
    mantissas, exponents = grads
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        # Copies, since a branch or a join may begin with an in-place ReLU.
        branches = block.parts(x.clone())
        z = block.summed(branches).detach().requires_grad_()
        y = block.join(z.clone())
    rows = [block.coefficients(row) for row in coefficients]

    def product(grad: Tensor, factors: Sequence[Coefficient]) -> Tensor:
        (grad,) = torch.autograd.grad(y, z, grad, retain_graph=True)
        parts = [
            factor * torch.autograd.grad(branch, x, grad, retain_graph=True)[0]
            for factor, branch in zip(factors, branches, strict=True)
            if factor != 0 and branch is not None
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(x)

    if len(mantissas) == 0:
        return ScaledGradient(mantissas.new_zeros(0, *x.shape), exponents)
    products = torch.stack([product(*pair) for pair in zip(mantissas, rows, strict=True)])
    lift = LIFT[mantissas.dtype]
    largest = scaling.largest(products, exponents)
    lost = (largest < 2.0 ** (-lift // 2)) & (scaling.largest(mantissas, exponents) > 0)
    lifts = torch.where(torch.isfinite(largest), lift * lost.int(), -lift)
    for path in lifts.any(1).nonzero().flatten().tolist():
        lifted = scaling.times_power_of_two(mantissas[path], scaling.beside(lifts[path], mantissas[path]))
        again = product(lifted, rows[path])
        better = torch.isfinite(scaling.largest(again[None], exponents[path : path + 1]))[0]
        lifts[path] = lifts[path].where(better, 0)
        products[path] = torch.where(scaling.beside(lifts[path], again) != 0, again, products[path])
    return scaling.rescale(products.detach(), exponents - lifts)


class FrozenBlock(Block):
    """A fused block at a recorded point: ReLU is a multiplication by its bits, BN an affine map.

    Args:
        block: a block whose `form` is a `FusedForm`, BN in evaluation mode.
        bits: for each unit the recorded ReLU bits, bool [B, C, H, W].
    """

    def __init__(self, block: Block, bits: Sequence[Tensor]) -> None:
        super().__init__()
        form = block.form()
        if not isinstance(form, FusedForm) or len(form.units) != len(bits):
            raise ValueError("bits: expected one tensor for each unit of a block that has a fused form")
        self.frozen, self.bits = form, bits

    def _unit(self, position: int, x: Tensor) -> Tensor:
        unit = self.frozen.units[position]
        return torch.as_tensor(unit.bn(x)) * self.bits[position].to(x.dtype)

    def skip(self, x: Tensor) -> Tensor:
        if self.frozen.projection is not None:
            return torch.as_tensor(self.frozen.projection(self._unit(0, x)))
        if not self.frozen.pad:
            return x
        stride = math.prod(unit.conv.stride[0] for unit in self.frozen.units)
        extra_channels = self.frozen.units[-1].conv.out_channels - x.shape[1]
        before = self.frozen.pad_before
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, extra_channels - before))

    def residual(self, x: Tensor) -> Tensor:
        for position, unit in enumerate(self.frozen.units):
            x = unit.conv(self._unit(position, x))
        return x


class FrozenPostBlock(Block):
    """A post-activation block at a recorded point, as `FrozenBlock` is a pre-activation one.

    Args:
        bits: the bits of its ReLUs in the order of the forward pass, the join's last.
    """

    def __init__(self, block: Block, bits: Sequence[Tensor]) -> None:
        super().__init__()
        form = block.form()
        if not isinstance(form, PostActivationForm) or len(form.convs) != len(bits):
            raise ValueError("bits: expected one tensor for each ReLU of a block that has a post-activation form")
        self.frozen, self.bits, self.skip_connection = form, bits, block.skip

    def skip(self, x: Tensor) -> Tensor:
        return self.skip_connection(x)

    def residual(self, x: Tensor) -> Tensor:
        for position, (conv, bn) in enumerate(zip(self.frozen.convs, self.frozen.bns, strict=True)):
            x = bn(conv(x * self.bits[position - 1].to(x.dtype) if position else x))
        return x

    def join(self, z: Tensor) -> Tensor:
        return z * self.bits[-1].to(z.dtype)


def freeze(net: ResidualNet, bits: Sequence[Sequence[Tensor]]) -> ResidualNet:
    """Return the network as the affine map that it is around one recorded batch, in float64.

    The reference runs on it in place of the network when it judges another engine, with the ReLU bits that the other
    engine recorded, since one flipped bit would otherwise outweigh all rounding.

    Args:
        net: a network in evaluation mode, every block with a form that fused engines know.
        bits: the recorded ReLU bits, ``bits[block][unit]``, bool [B, C, H, W].
    """
    net = copy.deepcopy(net).double()
    blocks = [
        (FrozenPostBlock if isinstance(block.form(), PostActivationForm) else FrozenBlock)(block, bits_of_block)
        for block, bits_of_block in zip(net, bits, strict=True)
    ]
    return ResidualNet(net.stem, blocks, net.head)
