"""The cuda engine: BN mode ``running``, basic blocks, a whole path in one kernel.

Thin: tables and packed weights go in, norms or gradients come out. The kernels, and the arithmetic of their limits,
are in csrc/cuda; on CPU tensors their twin runs, which is how they are tested on machines without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet import native, scaling
from pathnet.engines.reference import ReferenceEngine, freeze
from pathnet.engines.tables import Tables, tables, unsupported_form
from pathnet.models import preact_resnet
from pathnet.models.residual_net import ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["CudaEngine", "CudaNetwork", "CudaRecord"]

H100_SHARED_BYTES = 232448
"""Shared memory of a thread block of an H100, which the twin imitates."""

TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far a sample's norm may lie from the reference's in the engine's check of itself."""


@dataclass(frozen=True)
class Walk:
    """One direction's program, its copy on the device, and the packed weights."""

    program: Tensor
    device_program: Tensor
    weights: Tensor


@dataclass(frozen=True)
class CudaNetwork:
    """A network packed for the kernels.

    Attributes:
        backward, forward: the programs and weights of the two walks.
        affine: float32, of each unit the factors and shifts of its BN, channels filled up to 16.
        channels: of each block's two units' inputs, before they were filled up.
    """

    backward: Walk
    forward: Walk
    affine: Tensor
    channels: Sequence[Sequence[int]]

    @property
    def tensors(self) -> Sequence[Tensor]:
        walks = (self.backward, self.forward)
        return [self.affine, *(t for walk in walks for t in (walk.program, walk.device_program, walk.weights))]


@dataclass(frozen=True)
class CudaRecord:
    """The ReLU bits of one forward pass, uint8 [B, bytes] in the kernels' own order, and the network."""

    network: CudaNetwork
    relu_bits: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [self.relu_bits, *self.network.tensors]

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][unit]``, bool [B, C, H, W]."""
        packed, program = self.relu_bits.cpu(), self.network.backward.program
        return [
            [
                native.cuda_unpack_bits(packed, program, block, unit)[:, :count].bool().to(self.relu_bits.device)
                for unit, count in enumerate(counts)
            ]
            for block, counts in enumerate(self.network.channels)
        ]


class CudaEngine:
    """Native code for NVIDIA GPUs from sm_80 on."""

    name = "cuda"
    device_type: str | None = "cuda"

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
        return unsupported_form(net, bn) or refusal(net, y0_shape, precision) or _disagreement(device)

    def prepare(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]
    ) -> CudaNetwork:
        own, device = tables(net, "running", y0_shape), next(net.parameters()).device
        backward, forward = (
            Walk(program, program.to(device), weights.to(device))
            for program, weights in _plans(own, precision, device)
        )
        return CudaNetwork(backward, forward, _padded_affine(own).to(device), _channels(own))

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, CudaRecord]:
        assert isinstance(prepared, CudaNetwork)
        everything = y0.new_ones(1, len(prepared.channels), 2)
        y, relu_bits = self._forward(prepared, y0, everything, record=True)
        return y[0], CudaRecord(prepared, relu_bits)

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        assert isinstance(prepared, CudaNetwork)
        return self._forward(prepared, y0, routing, record=False)[0]

    def _forward(self, network: CudaNetwork, y0: Tensor, routing: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        routing, walk = routing.contiguous(), network.forward
        return native.cuda_routed_forward(
            y0.contiguous(),
            routing,
            _longest_first(routing),
            walk.program,
            walk.device_program,
            walk.weights,
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


def refusal(net: ResidualNet, y0_shape: Sequence[int], precision: Precision) -> str | None:
    """Why the kernels have no form for a network that has tables: a width, a kernel, images too large; or None."""
    try:
        _plans(tables(net, "running", y0_shape), precision, next(net.parameters()).device)
    except RuntimeError as error:
        return str(error).splitlines()[0].rpartition("blocks: ")[2]
    return None


def _plans(own: Tables, precision: Precision, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Program and weights, on the CPU, of the walk back and of the walk forward."""
    shared = H100_SHARED_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    parts = 1 if precision == "bfloat16" else 2
    given = own.blocks, own.units, own.weights, own.scales
    return [native.cuda_plan(*given, True, parts, shared), native.cuda_plan(*given, False, 2, shared)]


def _backward(
    blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(blocks, CudaRecord)
    routing, walk = routing.contiguous(), blocks.network.backward
    return native.cuda_routed_backward(
        grad.contiguous(),
        exponent.contiguous(),
        routing,
        _longest_first(routing),
        walk.program,
        walk.device_program,
        walk.weights,
        blocks.relu_bits,
        gradients,
    )


def _longest_first(routing: Tensor) -> Tensor:
    """int32 [P]: with the longest paths taken first, all multiprocessors end at about the same time."""
    lengths = (routing[:, :, 1] != 0).sum(1)
    return torch.argsort(lengths, descending=True, stable=True).int()


def _padded_affine(own: Tables) -> Tensor:
    parts = []
    for first, count in own.blocks[:, :2].tolist():
        for unit in own.units[first : first + count].tolist():
            channels, offset = unit[0], unit[10]
            for values in (own.scales, own.shifts):
                parts.append(F.pad(values[offset : offset + channels], (0, -channels % 16)))
    return torch.cat(parts)


def _channels(own: Tables) -> list[list[int]]:
    return [own.units[first : first + count, 0].tolist() for first, count in own.blocks[:, :2].tolist()]


@functools.cache
def _disagreement(device: torch.device) -> str | None:
    """Checks the engine once a process and device, on small inputs against the reference; None, or what it found."""
    for precision, tolerance in TOLERANCE.items():
        try:
            error = _largest_error(device, precision)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            return f"its check of itself failed ({str(failure).splitlines()[0]})"
        if not error <= tolerance:
            return f"it disagrees with the reference on a small input (relative error {error:.1g} in {precision})"
    return None


def _largest_error(device: torch.device, precision: Precision) -> float:
    """Of samples' norms and gradients along random routings, and of forward passes; NaN where there is one."""
    generator, errors = torch.Generator().manual_seed(0), []
    for shortcut in ("projection", "pad"):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            net = preact_resnet(20, shortcut=shortcut).float().eval()
        shapes = {"y0": (3, 16, 8, 8), "grad": (3, 64, 2, 2), "routing": (4, net.n, 2)}
        y0, grad, routing = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes.values()
        )
        routing[0], routing[1, ::2, 1] = 1.0, 0.0
        errors += _errors(net, y0, grad, routing, precision, device)
    return float(torch.stack(errors).max())


def _errors(
    net: ResidualNet, y0: Tensor, grad: Tensor, routing: Tensor, precision: Precision, device: torch.device
) -> list[Tensor]:
    engine, reference = CudaEngine(), ReferenceEngine()
    prepared = engine.prepare(net.to(device), "running", precision, y0.shape[1:])
    y, blocks = engine.record(prepared, y0.to(device))
    exponent = torch.zeros(len(y0), dtype=torch.int32, device="cpu")
    given = blocks, grad.to(device), exponent.to(device), routing.to(device)
    norms, walked = engine.routed_backward_norms(*given).cpu(), engine.routed_backward(*given)
    outputs = engine.routed_forward(prepared, y0.to(device), routing.to(device)).cpu()

    frozen = freeze(net.cpu(), [[bit.cpu() for bit in own] for own in blocks.bits()])
    exact = reference.prepare(frozen, "running", "float64", y0.shape[1:])
    expected_y, inputs = reference.record(exact, y0.double())
    expected = scaling.norms(*reference.routed_backward(inputs, grad.double(), exponent, routing.double()))
    expected_outputs = reference.routed_forward(
        reference.prepare(net.double(), "running", "float64", y0.shape[1:]), y0.double(), routing.double()
    )
    return [
        ((norms - expected).abs() / expected).max(),
        ((scaling.norms(*walked).cpu() - expected).abs() / expected).max(),
        (y.cpu() - expected_y).norm() / expected_y.norm(),
        ((outputs - expected_outputs).flatten(1).norm(dim=1) / expected_outputs.flatten(1).norm(dim=1)).max(),
    ]
