"""The native library: its ops as typed functions, and the facts of its build.

Importing this module never fails: where the library is not built, `LOADED` is False and `WHY_NOT` says so.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "LOADED",
    "WHY_NOT",
    "build_facts",
    "cuda_plan",
    "cuda_routed_backward",
    "cuda_routed_forward",
    "cuda_unpack_bits",
    "pack_bits",
    "routed_backward",
]


def _load() -> str:
    """Why the library could not be loaded; empty where it was."""
    library = Path(__file__).with_name("_ops.so")
    if not library.exists():
        return "the native library is not built (make install builds it)"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the native library does not load ({str(error).splitlines()[0]})"
    return ""


WHY_NOT = _load()
LOADED = not WHY_NOT


def build_facts() -> dict[str, str | list[str]]:
    """What the build holds: compiler, CUDA architectures or why there are none, instruction sets.

    Raises:
        RuntimeError: the library is not built, or PATHNET_ISA names an instruction set that is not there.
    """
    if not LOADED:
        raise RuntimeError(WHY_NOT)
    build = importlib.import_module("pathnet._build")
    return {
        "compiler": build.compiler,
        "torch_target": build.torch_target,
        "cuda_compiler": build.cuda_compiler,
        "cuda_architectures": build.cuda_architectures.split(),
        "without_cuda": build.without_cuda,
        "instruction_sets": build.instruction_sets(),
        "selected_instruction_set": build.selected_instruction_set(),
    }


def pack_bits(x: Tensor) -> Tensor:
    """ReLU bits: bit ``j & 7`` of byte ``j >> 3`` of a row is set where element j of the sample is positive.

    Args:
        x: float32 [B, ...], contiguous, M elements a sample; on the CPU, or a CUDA device.

    Returns:
        uint8 [B, ceil(M / 8)], the last byte filled up with zeros.

    Raises:
        RuntimeError: ``x`` is not such a tensor.
    """
    return torch.as_tensor(torch.ops.pathnet.pack_bits(x))


def routed_backward(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    weights: Tensor,
    scales: Tensor,
    relu_bits: Tensor,
) -> tuple[Tensor, Tensor]:
    """``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, for every routing and sample.

    A unit is ``y = conv(relu(s * x + t))``, with batch normalisation by running statistics as the affine map.
    After every block that changes the gradient, an exact power of two brings its largest magnitude into [1/2, 1).

    Args:
        grad: float32 [B, C_n, H_n, W_n], at the output of the last block; its value is ``grad * 2**exponent``.
        exponent: int32 [B]
        routing: float32 [P, n, 2], the (a, c) of every block.
        blocks: int64 [n, 10]: first unit, number of units, skip (0 identity, 1 projection, 2 padding), unit of the
            projection or -1, channels, height and width of the input, and of the output.
        units: int64 [U, 12]: channels, height and width of the input, and of the output; kernel, stride, padding;
            offsets of the weights, of the scales (elements) and of the bits (bytes in a row), -1 for a projection.
        weights: float32, every convolution's [out, in, kernel, kernel] one after the other.
        scales: float32, the factors s.
        relu_bits: uint8 [B, bytes], `pack_bits` of what enters each unit's ReLU.

    Returns:
        float32 [P, B, C_0, H_0, W_0] and its exponents, int32 [P, B].

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    grad_input, exponent_input = torch.ops.pathnet.routed_backward(
        grad, exponent, routing, blocks, units, weights, scales, relu_bits
    )
    return grad_input, exponent_input


def cuda_plan(
    blocks: Tensor,
    units: Tensor,
    weights: Tensor,
    scales: Tensor,
    backward: bool,
    parts: int,
    shared_bytes: int,
) -> tuple[Tensor, Tensor]:
    """What the whole-path kernels need of a network for the walk back or forward: its program and packed weights.

    Args:
        blocks, units, weights, scales: as `routed_backward` has them, on the CPU; offsets of bits are not used.
        backward: for the walk back, or forward.
        parts: bf16 terms a number: 1, or 2 for float32 precision (the forward takes 2).
        shared_bytes: of shared memory that a thread block may ask for.

    Returns:
        int32 numbers that only the kernels read, and uint8 weights.

    Raises:
        RuntimeError: the kernels have no form for a block (the message names it), or the tables contradict one
            another.
    """
    program, packed = torch.ops.pathnet.cuda_plan(blocks, units, weights, scales, backward, parts, shared_bytes)
    return program, packed


def cuda_unpack_bits(relu_bits: Tensor, program: Tensor, block: int, unit: int) -> Tensor:
    """The ReLU bits of one unit, uint8 [B, C, H, W] of zeros and ones; C is a multiple of 16.

    Args:
        relu_bits: uint8 [B, bytes], as `cuda_routed_forward` records them, on the CPU.
        program: of the walk back.
        block, unit: counted from 0.

    Raises:
        RuntimeError: an argument has another type or shape.
    """
    return torch.as_tensor(torch.ops.pathnet.cuda_unpack_bits(relu_bits, program, block, unit))


def cuda_routed_backward(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    order: Tensor,
    program: Tensor,
    device_program: Tensor,
    weights: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`routed_backward` by the whole-path kernel; on CPU tensors by the same kernel's twin, which is slow.

    Args:
        grad: float32 [B, C_n, H_n, W_n]; its value is ``grad * 2**exponent``.
        exponent: int32 [B]
        routing: float32 [P, n, 2]
        order: int32 [P], the order in which the paths are taken; a path that is left out is not walked.
        program: int32, of `cuda_plan`, on the CPU; ``device_program`` its copy where the other tensors are.
        weights: uint8, of `cuda_plan`.
        relu_bits: uint8 [B, bytes], as `cuda_routed_forward` records them.
        gradients: whether the gradients are wanted beside their norms.

    Returns:
        The samples' norms, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their exponents,
        int32 [P, B], or none of them (P = 0).

    Raises:
        RuntimeError: an argument has another type, shape or device; the twin found a race.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cuda_routed_backward(
        grad, exponent, routing, order, program, device_program, weights, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


def cuda_routed_forward(
    y0: Tensor,
    routing: Tensor,
    order: Tensor,
    program: Tensor,
    device_program: Tensor,
    weights: Tensor,
    affine: Tensor,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """``y <- a s(y) + c f(y)`` from the first block to the last, for every routing and sample.

    Args:
        y0: float32 [B, C_0, H_0, W_0]
        routing: float32 [P, n, 2]; one where bits are recorded.
        order, program, device_program, weights: as for `cuda_routed_backward`, of the walk forward.
        affine: float32: of each unit, BN's factors and then its shifts, channels filled up with zeros to 16.
        record: whether the ReLU bits are wanted.

    Returns:
        float32 [P, B, C_n, H_n, W_n], and the ReLU bits, uint8 [B, bytes], or none of them ([0, bytes]).

    Raises:
        RuntimeError: an argument has another type, shape or device; the twin found a race.
    """
    output, relu_bits = torch.ops.pathnet.cuda_routed_forward(
        y0, routing, order, program, device_program, weights, affine, record
    )
    return output, relu_bits


def _fake_pack_bits(x: Tensor) -> Tensor:
    elements = math.prod(x.shape[1:])
    return x.new_empty((x.shape[0], (elements + 7) // 8), dtype=torch.uint8)


def _fake_routed_backward(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    weights: Tensor,
    scales: Tensor,
    relu_bits: Tensor,
) -> tuple[Tensor, Tensor]:
    # The input's shape is data (the first row of `blocks`), which a fake tensor does not have.
    context = torch.library.get_ctx()
    channels, height, width = (context.new_dynamic_size() for _ in range(3))
    routings, batch = routing.shape[0], relu_bits.shape[0]
    return grad.new_empty((routings, batch, channels, height, width)), exponent.new_empty((routings, batch))


# Shapes that are data (a program's own numbers) a fake tensor does not have.


def _new_sizes(count: int) -> list[int | torch.SymInt]:
    context = torch.library.get_ctx()
    return [context.new_dynamic_size() for _ in range(count)]


def _fake_cuda_plan(
    blocks: Tensor, units: Tensor, weights: Tensor, scales: Tensor, backward: bool, parts: int, shared_bytes: int
) -> tuple[Tensor, Tensor]:
    numbers, packed = _new_sizes(2)
    return blocks.new_empty((numbers,), dtype=torch.int32), blocks.new_empty((packed,), dtype=torch.uint8)


def _fake_cuda_unpack_bits(relu_bits: Tensor, program: Tensor, block: int, unit: int) -> Tensor:
    return relu_bits.new_empty((relu_bits.shape[0], *_new_sizes(3)))


def _fake_cuda_routed_backward(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    order: Tensor,
    program: Tensor,
    device_program: Tensor,
    weights: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    paths, batch = routing.shape[0], grad.shape[0]
    given = paths if gradients else 0
    return (
        grad.new_empty((paths, batch), dtype=torch.float64),
        grad.new_empty((given, batch, *_new_sizes(3))),
        exponent.new_empty((given, batch)),
    )


def _fake_cuda_routed_forward(
    y0: Tensor,
    routing: Tensor,
    order: Tensor,
    program: Tensor,
    device_program: Tensor,
    weights: Tensor,
    affine: Tensor,
    record: bool,
) -> tuple[Tensor, Tensor]:
    paths, batch = routing.shape[0], y0.shape[0]
    channels, height, width, bits = _new_sizes(4)
    return (
        y0.new_empty((paths, batch, channels, height, width)),
        y0.new_empty((batch if record else 0, bits), dtype=torch.uint8),
    )


if LOADED:
    torch.library.register_fake("pathnet::cuda_plan")(_fake_cuda_plan)
    torch.library.register_fake("pathnet::cuda_unpack_bits")(_fake_cuda_unpack_bits)
    torch.library.register_fake("pathnet::cuda_routed_backward")(_fake_cuda_routed_backward)
    torch.library.register_fake("pathnet::cuda_routed_forward")(_fake_cuda_routed_forward)
    torch.library.register_fake("pathnet::pack_bits")(_fake_pack_bits)
    torch.library.register_fake("pathnet::routed_backward")(_fake_routed_backward)
