"""The cuda engine: BN mode ``running``, basic blocks, pre-activation or post-activation, a whole path in one kernel.

This layer only packs tables and weights, and returns norms, gradients or outputs. The kernels, and the arithmetic of
their limits, are in csrc/cuda; on CPU tensors their twin runs, so they can be tested on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet import native
from pathnet.engines import fallback
from pathnet.engines.cuda import ops
from pathnet.engines.engine import Job
from pathnet.engines.forms import post_activation, unsupported_form
from pathnet.engines.magnitudes import Magnitudes, divided, multiplied
from pathnet.engines.self_check import disagreement
from pathnet.engines.tables import BlockColumn, Skip, Tables, UnitColumn, tables
from pathnet.engines.transfers import to_device
from pathnet.models.context import Context
from pathnet.recording import BatchNormMode, Precision
from pathnet.scaling import ScaledGradient

__all__ = ["CudaEngine", "CudaPrepared", "CudaWalk", "Program", "refusal"]

MIN_SHARED_BYTES = 101376
"""Shared memory that a thread block may have on every GPU from compute capability 8.0 on: 99 KB."""


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
        return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", MIN_SHARED_BYTES)

    def unavailable(self) -> str | None:
        if not native.LOADED:
            return native.WHY_NOT
        without = native.build_facts()["without_cuda"]
        if without:
            return str(without)
        if not torch.cuda.is_available():
            return "this process sees no CUDA device"
        return None

    def unsupported(self, job: Job) -> str | None:
        if job.device.type != "cuda":
            return f"the network is on {job.device}"
        if job.bn != "running":
            return f'no bn="{job.bn}"'
        if job.precision in ("float64", "network"):
            return f'no precision="{job.precision}"'
        capability = torch.cuda.get_device_capability(job.device)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(job.device)
            return f"expected compute capability 8.0 or later, got {capability[0]}.{capability[1]} ({name})"
        reason = unsupported_form(job.net, job.bn) or refusal(job, self.shared_bytes(job.device))
        # Not on smaller images: those may fit shared memory and run other kernels.
        return reason or disagreement(self, job, small=False)

    def prepare(self, job: Job) -> CudaPrepared:
        forward = tables(job.net, "running", job.y0_shape)
        backward, shared_bytes = divided(forward), self.shared_bytes(job.device)
        return CudaPrepared(
            *_programs(forward, backward.tables, job.precision, shared_bytes, job.device),
            _padded_affine(forward).to(job.device),
            _channels(forward),
            backward.tables,
            job.precision,
            post_activation(job.net),
            backward.magnitudes,
            shared_bytes,
        )


def refusal(job: Job, shared_bytes: int) -> str | None:
    """Return why the kernels cannot run a network that has tables: a width, a kernel, large images; or None.

    Args:
        shared_bytes: shared memory that a thread block may have.
    """
    try:
        whole = tables(job.net, "running", job.y0_shape)
        _programs(whole, whole, job.precision, shared_bytes, torch.device("cpu"))
    except RuntimeError as error:
        return str(error).splitlines()[0].rpartition("blocks: ")[2]
    return None


@dataclass(frozen=True)
class Program:
    """The program of a backward or forward pass for the host, and with packed weights for the device."""

    host: Tensor
    """int32, on the CPU."""
    device: Tensor
    """uint8: a copy of the program and the packed weights."""


def _programs(
    forward: Tables, backward: Tables, precision: Precision, shared_bytes: int, device: torch.device
) -> tuple[Program, Program]:
    """Return the programs of the backward and of the forward pass."""
    parts = 1 if precision == "bfloat16" else 2
    plans = [
        ops.cuda_pack(half.blocks, half.units, half.weights, half.scales, back, terms, shared_bytes)
        for half, back, terms in ((backward, True, parts), (forward, False, 2))
    ]
    back, ahead = (Program(program, packed.to(device)) for program, packed in plans)
    return back, ahead


@dataclass(frozen=True)
class Step:
    """The backward pass through one block alone; ``bits`` are the bytes of its ReLU bits in a sample's row."""

    program: Program
    bits: slice


@dataclass(frozen=True)
class CudaPrepared:
    """A network packed for the kernels.

    Attributes:
        backward, forward: the programs of the two directions.
        affine: float32, for each block the factors and shifts of its units' BN, and the biases after its last
            convolution and its projection, channels padded to a multiple of 16.
        channels: of the inputs of each block's two units, before padding.
        tables, precision: the backward pass's tables and precision, from which `steps` are packed.
        post: whether the blocks are post-activation ones, whose boundaries are at the additions.
        magnitudes: the powers of two that the backward pass's factors were divided by; None if nothing was divided.
        shared_bytes: bytes of shared memory of a thread block, for which the programs were planned.
    """

    backward: Program
    forward: Program
    affine: Tensor
    channels: Sequence[Sequence[int]]
    tables: Tables
    precision: Precision
    post: bool
    magnitudes: Magnitudes | None
    shared_bytes: int

    @cached_property
    def steps(self) -> Sequence[Step]:
        """Each block's backward pass, for all its gradients at once; packed on first use."""
        return list(self._steps())

    def _steps(self) -> Iterator[Step]:
        begin = 0
        for row in self.tables.blocks:
            first, projection = int(row[BlockColumn.FIRST]), int(row[BlockColumn.PROJECTION])
            count = int(row[BlockColumn.COUNT])
            block, units = row.clone(), self.tables.units[first : first + count]
            block[BlockColumn.FIRST] = 0
            if row[BlockColumn.SKIP] == Skip.PROJECTION:
                block[BlockColumn.PROJECTION] = count
                units = torch.cat([units, self.tables.units[projection : projection + 1]])
            alone = replace(self.tables, blocks=block[None], units=units)
            program, _ = _programs(alone, alone, self.precision, self.shared_bytes, self.affine.device)
            end = begin + ops.cuda_bits_bytes(program.host)
            yield Step(program, slice(begin, end))
            begin = end

    @property
    def tensors(self) -> Sequence[Tensor]:
        programs = (self.backward, self.forward)
        return [self.affine, *(t for program in programs for t in (program.host, program.device))]

    def bound(self, context: Context) -> CudaPrepared:
        return self

    def max_routings(self, y0: Tensor) -> int | None:
        return None

    def record(self, y0: Tensor) -> tuple[Tensor, CudaWalk]:
        ones = y0.new_ones(1, len(self.channels), 2)
        y, relu_bits = self._forward(y0, ones, record=True)
        if not self.post:
            return y[0], CudaWalk(self, relu_bits)
        return y[0].relu(), CudaWalk(self, relu_bits, last=y[0] > 0)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        y = self._forward(y0, routing, record=False)[0]
        return y.relu_() if self.post else y

    def _forward(self, y0: Tensor, routing: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        return ops.cuda_forward_running(
            y0.contiguous(),
            to_device(routing, y0.device).contiguous(),
            to_device(_longest_first(routing), y0.device),
            self.forward.host,
            self.forward.device,
            self.affine,
            record,
        )


@dataclass(frozen=True)
class CudaWalk:
    """The record of one forward pass.

    Attributes:
        relu_bits: uint8 [B, bytes], the ReLU bits in the kernels' own order.
        last: the bits of the last join's ReLU in a post-activation network, bool [B, C, H, W].
    """

    network: CudaPrepared
    relu_bits: Tensor
    last: Tensor | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [self.relu_bits, *([] if self.last is None else [self.last]), *self.network.tensors]

    def max_routings(self) -> int | None:
        return None

    @property
    def bn(self) -> BatchNormMode:
        return "running"

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        return ScaledGradient(*self._backward(start, routing, gradients=True)[1:])

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return self._backward(start, routing, gradients=False)[0]

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        return fallback.sums_by_length(self._through_block, self._before_last_join(start), routing)

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        return fallback.norms_of(self.sums_by_length(start, routing))

    def _backward(self, start: ScaledGradient, routing: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `pathnet.engines.cuda.ops.cuda_backward_running` does: norms, mantissas, exponents."""
        magnitudes, shifts = self.network.magnitudes, None
        if magnitudes is not None:
            routing, shifts = magnitudes.of_routing(routing)
        starts = torch.zeros(len(routing), dtype=torch.int32, device=routing.device)
        mantissa, exponent = self._before_last_join(start)
        grads = ScaledGradient(mantissa[None], exponent[None])
        walked = _launch(self.network.backward, self.relu_bits, grads, routing, starts, gradients)
        return walked if shifts is None else multiplied(*walked, to_device(shifts, mantissa.device)[:, None])

    def _through_block(
        self, index: int, grads: ScaledGradient, coefficients: Sequence[tuple[float, ...]]
    ) -> ScaledGradient:
        """Take each of the scaled gradients [g, B, C, H, W] back through one block by its (a, c), in one launch."""
        step, magnitudes, (mantissas, exponents) = self.network.steps[index], self.network.magnitudes, grads
        if magnitudes is not None:
            coefficients, shifts = magnitudes.of_block(index, coefficients)
            exponents = exponents + to_device(shifts, exponents.device)[:, None]
        routing, starts = torch.tensor(coefficients)[:, None], torch.arange(len(coefficients), dtype=torch.int32)
        bits, grads = self.relu_bits[:, step.bits], ScaledGradient(mantissas, exponents)
        return ScaledGradient(*_launch(step.program, bits, grads, routing, starts, gradients=True)[1:])

    def _before_last_join(self, start: ScaledGradient) -> ScaledGradient:
        """Return the scaled gradient at the sum that the last join reads."""
        return start if self.last is None else start._replace(mantissa=start.mantissa.where(self.last, 0.0))

    def bits(self) -> list[list[Tensor]]:
        """Return the recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; for post-activation blocks
        the join's bits come last."""
        packed, program = self.relu_bits.cpu(), self.network.backward.host
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


def _launch(
    program: Program, relu_bits: Tensor, grads: ScaledGradient, routing: Tensor, starts: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `ops.cuda_backward_running` does, from scaled gradients [G, B, ...] and int32 [G, B].

    The schedule is computed on the routing's device: on the host it takes microseconds, on a GPU it does not
    synchronise.
    """
    (mantissas, exponents), device = grads, grads.mantissa.device
    schedule = to_device(torch.stack([_longest_first(routing), starts]), device)
    return ops.cuda_backward_running(
        mantissas.contiguous(),
        exponents.contiguous(),
        to_device(routing, device).contiguous(),
        schedule,
        program.host,
        program.device,
        relu_bits,
        gradients,
    )


def _longest_first(routing: Tensor) -> Tensor:
    """Return int32 [P], the longest paths first: all multiprocessors then end at about the same time."""
    lengths = (routing[:, :, 1] != 0).sum(1)
    return torch.argsort(lengths, descending=True, stable=True).int()


def _padded_affine(tables: Tables) -> Tensor:
    """Return float32, the factors, shifts and biases as csrc/cuda/routed_forward.h orders them."""
    units, parts = tables.units.tolist(), []
    ends = tables.units[:, UnitColumn.OUT_CHANNELS].cumsum(0).tolist()
    for block in tables.blocks.tolist():
        last, projection = block[BlockColumn.FIRST] + block[BlockColumn.COUNT] - 1, block[BlockColumn.PROJECTION]
        for unit in units[block[BlockColumn.FIRST] : last + 1]:
            affine = slice(unit[UnitColumn.SCALES], unit[UnitColumn.SCALES] + unit[UnitColumn.CHANNELS])
            parts += [values[affine] for values in (tables.scales, tables.shifts)]
        for row in (last, *([projection] if projection >= 0 else [])):
            channels, end = units[row][UnitColumn.OUT_CHANNELS], ends[row]
            parts.append(tables.biases[end - channels : end] if len(tables.biases) else torch.zeros(channels))
    return torch.cat([F.pad(values, (0, -len(values) % 16)) for values in parts])


def _channels(tables: Tables) -> list[list[int]]:
    blocks = tables.blocks[:, [BlockColumn.FIRST, BlockColumn.COUNT]].tolist()
    return [tables.units[first : first + count, UnitColumn.CHANNELS].tolist() for first, count in blocks]
