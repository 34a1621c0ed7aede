"""The cuda engine: BN mode ``running``, basic blocks, pre-activation or post-activation, a whole path in one kernel.

Thin: tables and packed weights go in, norms or gradients come out. The kernels, and the arithmetic of their limits,
are in csrc/cuda; on CPU tensors their twin runs, which is how they are tested on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet import native
from pathnet.engines import fallback
from pathnet.engines.cuda import ops
from pathnet.engines.forms import PROJECTION, Tables, post_activation, tables, unsupported_form
from pathnet.engines.magnitudes import Magnitudes, divided, multiplied
from pathnet.engines.self_check import disagreement
from pathnet.engines.transfers import to_device
from pathnet.models.residual_net import ResidualNet
from pathnet.recording import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["CudaEngine", "CudaNetwork", "CudaRecord"]

LEAST_SHARED_BYTES = 101376
"""Shared memory that a thread block may have on every GPU from compute capability 8.0 on: 99 KB."""


@dataclass(frozen=True)
class Walk:
    """One direction's program, and the bytes on the device that `cuda_pack` gives with it."""

    program: Tensor
    packed: Tensor


@dataclass(frozen=True)
class Step:
    """One block's walk back by itself; ``bits`` says where its ReLU bits lie in a sample's row."""

    walk: Walk
    bits: slice


@dataclass(frozen=True)
class CudaNetwork:
    """A network packed for the kernels.

    Attributes:
        backward, forward: the programs and weights of the two walks.
        affine: float32, of each block's units the factors and shifts of their BN, and the biases behind its last
            convolution and its projection, channels filled up to 16.
        channels: of each block's two units' inputs, before they were filled up.
        tables, precision: what the walk back was packed from.
        post: whether the blocks are post-activation ones, which the kernels take from sum to sum.
        magnitudes: what was taken out of the factors of the walk back; None where nothing was.
        shared_bytes: of a thread block, for which the programs were planned.
    """

    backward: Walk
    forward: Walk
    affine: Tensor
    channels: Sequence[Sequence[int]]
    tables: Tables
    precision: Precision
    post: bool
    magnitudes: Magnitudes | None
    shared_bytes: int

    @cached_property
    def steps(self) -> Sequence[Step]:
        """Each block's own walk back, for all its gradients at once; packed on first use."""
        return list(_steps(self.tables, self.precision, self.shared_bytes, self.affine.device))

    @property
    def tensors(self) -> Sequence[Tensor]:
        walks = (self.backward, self.forward)
        return [self.affine, *(t for walk in walks for t in (walk.program, walk.packed))]


@dataclass(frozen=True)
class CudaRecord:
    """What one forward pass leaves.

    Attributes:
        relu_bits: uint8 [B, bytes], the ReLU bits in the kernels' own order.
        last: of a post-activation network, the bits of the last join's ReLU, bool [B, C, H, W].
    """

    network: CudaNetwork
    relu_bits: Tensor
    last: Tensor | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [self.relu_bits, *([] if self.last is None else [self.last]), *self.network.tensors]

    @property
    def bn(self) -> BatchNormMode:
        return "running"

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; of post-activation blocks the join's last."""
        packed, program = self.relu_bits.cpu(), self.network.backward.program
        units = [
            [
                ops.cuda_unpack_bits(packed, program, block, unit)[:, :count].bool().to(self.relu_bits.device)
                for unit, count in enumerate(counts)
            ]
            for block, counts in enumerate(self.network.channels)
        ]
        if self.last is None:
            return units
        joins = [*(bits[0] for bits in units[1:]), self.last]
        return [[*bits[1:], join] for bits, join in zip(units, joins, strict=True)]

    def through_last_join(self, grad: Tensor) -> Tensor:
        """Return what the walks back begin with, of the gradient [B, C, H, W] at ``y_n``."""
        return grad if self.last is None else grad.where(self.last, 0.0)


class CudaEngine:
    """Native code for NVIDIA GPUs from sm_80 on."""

    name = "cuda"
    device_type: str | None = "cuda"
    twin_shared_bytes = 232448
    """Shared memory of a thread block that the twin imitates; here an H100's 227 KB."""

    def shared_bytes(self, device: torch.device) -> int:
        """Return the bytes of shared memory that a thread block may have."""
        if device.type != "cuda":
            return self.twin_shared_bytes
        return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", LEAST_SHARED_BYTES)

    def unavailable(self) -> str | None:
        if not native.LOADED:
            return native.WHY_NOT
        without = native.build_facts()["without_cuda"]
        if without:
            return str(without)
        if not torch.cuda.is_available():
            return "this process sees no CUDA device"
        return None

    def unsupported(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int], device: torch.device
    ) -> str | None:
        if device.type != "cuda":
            return f"the network is on {device}"
        if bn != "running":
            return f'no bn="{bn}"'
        if precision == "float64":
            return f'no precision="{precision}"'
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(device)
            return f"{name} is of compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
        shared_bytes = self.shared_bytes(device)
        reason = unsupported_form(net, bn) or refusal(net, y0_shape, precision, shared_bytes)
        # Smaller images would lie in shared memory, and other kernels walk those.
        return reason or disagreement(self, net, bn, precision, y0_shape, device, small=False)

    def prepare(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]
    ) -> CudaNetwork:
        own, device = tables(net, "running", y0_shape), next(net.parameters()).device
        back, shared_bytes = divided(own), self.shared_bytes(device)
        backward, forward = (_walk(*plan, device) for plan in _plans(own, back.tables, precision, shared_bytes))
        affine = _padded_affine(own).to(device)
        return CudaNetwork(
            backward,
            forward,
            affine,
            _channels(own),
            back.tables,
            precision,
            post_activation(net),
            back.magnitudes,
            shared_bytes,
        )

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, CudaRecord]:
        assert isinstance(prepared, CudaNetwork)
        everything = y0.new_ones(1, len(prepared.channels), 2)
        y, relu_bits = self._forward(prepared, y0, everything, record=True)
        if not prepared.post:
            return y[0], CudaRecord(prepared, relu_bits)
        return y[0].relu(), CudaRecord(prepared, relu_bits, last=y[0] > 0)

    def sums_by_length(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(blocks, CudaRecord)
        start = blocks.through_last_join(grad)
        return fallback.sums_by_length(partial(_through_block, blocks), start, exponent, routing)

    def sums_by_length_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return fallback.norms_of(*self.sums_by_length(blocks, grad, exponent, routing))

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(prepared, CudaNetwork)
        y = self._forward(prepared, y0, routing, record=False)[0]
        return y.relu_() if prepared.post else y

    def _forward(self, network: CudaNetwork, y0: Tensor, routing: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        walk = network.forward
        return ops.cuda_forward_running(
            y0.contiguous(),
            to_device(routing, y0.device).contiguous(),
            to_device(_longest_first(routing), y0.device),
            walk.program,
            walk.packed,
            network.affine,
            record,
        )

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, gradient, exponents = _backward(blocks, grad, exponent, routing, gradients=True)
        return gradient, exponents

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return _backward(blocks, grad, exponent, routing, gradients=False)[0]


def refusal(net: ResidualNet, y0_shape: Sequence[int], precision: Precision, shared_bytes: int) -> str | None:
    """Return why the kernels have no form for a network that has tables: a width, a kernel, large images; or None.

    Args:
        shared_bytes: shared memory that a thread block may have.
    """
    try:
        whole = tables(net, "running", y0_shape)
        _plans(whole, whole, precision, shared_bytes)
    except RuntimeError as error:
        return str(error).splitlines()[0].rpartition("blocks: ")[2]
    return None


def _plans(forward: Tables, backward: Tables, precision: Precision, shared_bytes: int) -> list[tuple[Tensor, Tensor]]:
    """Program and weights, on the CPU, of the walk back and of the walk forward."""
    parts = 1 if precision == "bfloat16" else 2
    return [
        ops.cuda_pack(half.blocks, half.units, half.weights, half.scales, back, terms, shared_bytes)
        for half, back, terms in ((backward, True, parts), (forward, False, 2))
    ]


def _walk(program: Tensor, packed: Tensor, device: torch.device) -> Walk:
    return Walk(program, packed.to(device))


def _steps(own: Tables, precision: Precision, shared_bytes: int, device: torch.device) -> Iterator[Step]:
    begin = 0
    for row in own.blocks:
        first, count, skip, projection = row[:4].tolist()
        block, units = row.clone(), own.units[first : first + count]
        block[0] = 0
        if skip == PROJECTION:
            block[3] = count
            units = torch.cat([units, own.units[projection : projection + 1]])
        alone = replace(own, blocks=block[None], units=units)
        (program, packed), _ = _plans(alone, alone, precision, shared_bytes)
        end = begin + ops.cuda_bits_bytes(program)
        yield Step(_walk(program, packed, device), slice(begin, end))
        begin = end


def _through_block(
    record: CudaRecord, index: int, grads: Tensor, exponents: Tensor, coefficients: Sequence[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    """Return each of the scaled gradients [g, B, C, H, W] walked by its (a, c), in one launch."""
    step, magnitudes = record.network.steps[index], record.network.magnitudes
    if magnitudes is not None:
        coefficients, shifts = magnitudes.of_block(index, coefficients)
        exponents = exponents + to_device(shifts, exponents.device)[:, None]
    routing, starts = torch.tensor(coefficients)[:, None], torch.arange(len(coefficients), dtype=torch.int32)
    bits = record.relu_bits[:, step.bits]
    return _launched(step.walk, bits, (grads, exponents), routing, starts, gradients=True)[1:]


def _backward(
    blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(blocks, CudaRecord)
    magnitudes, shifts = blocks.network.magnitudes, None
    if magnitudes is not None:
        routing, shifts = magnitudes.of_routing(routing)
    start = blocks.through_last_join(grad)[None], exponent[None]
    starts = torch.zeros(len(routing), dtype=torch.int32, device=routing.device)
    walked = _launched(blocks.network.backward, blocks.relu_bits, start, routing, starts, gradients)
    return walked if shifts is None else multiplied(*walked, to_device(shifts, grad.device)[:, None])


def _launched(
    walk: Walk,
    relu_bits: Tensor,
    grads: tuple[Tensor, Tensor],
    routing: Tensor,
    starts: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `ops.cuda_backward_running` gives, from scaled gradients [G, B, ...] and int32 [G, B].

    The order is made where the routing is: on the host it takes microseconds, on a GPU it waits for nothing.
    """
    (mantissas, exponents), device = grads, grads[0].device
    schedule = to_device(torch.stack([_longest_first(routing), starts]), device)
    return ops.cuda_backward_running(
        mantissas.contiguous(),
        exponents.contiguous(),
        to_device(routing, device).contiguous(),
        schedule,
        walk.program,
        walk.packed,
        relu_bits,
        gradients,
    )


def _longest_first(routing: Tensor) -> Tensor:
    """int32 [P]: with the longest paths taken first, all multiprocessors end at about the same time."""
    lengths = (routing[:, :, 1] != 0).sum(1)
    return torch.argsort(lengths, descending=True, stable=True).int()


def _padded_affine(own: Tables) -> Tensor:
    """float32, the factors, shifts and biases as csrc/cuda/routed_forward.h orders them."""
    units, parts = own.units.tolist(), []
    ends = own.units[:, 3].cumsum(0).tolist()
    for first, count, _, projection in own.blocks[:, :4].tolist():
        for channels, *_, offset, _ in units[first : first + count]:
            parts += [values[offset : offset + channels] for values in (own.scales, own.shifts)]
        for unit in (first + count - 1, *([projection] if projection >= 0 else [])):
            channels, end = units[unit][3], ends[unit]
            parts.append(own.biases[end - channels : end] if len(own.biases) else torch.zeros(channels))
    return torch.cat([F.pad(values, (0, -len(values) % 16)) for values in parts])


def _channels(own: Tables) -> list[list[int]]:
    return [own.units[first : first + count, 0].tolist() for first, count in own.blocks[:, :2].tolist()]
