"""The native library: its ops as typed functions, and the facts of its build.

Importing this module never fails: where the library is not built, `LOADED` is False and `WHY_NOT` says so.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LOADED", "WHY_NOT", "build_facts", "pack_bits", "routed_backward"]


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


if LOADED:
    torch.library.register_fake("pathnet::pack_bits")(_fake_pack_bits)
    torch.library.register_fake("pathnet::routed_backward")(_fake_routed_backward)
