"""The cuda engine's native ops as typed functions, each with its fake.

On CPU tensors the passes run the kernels' twin, which is slow and finds races between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pathnet.native import LOADED, new_sizes

__all__ = [
    "CudaForm",
    "cuda_backward_running",
    "cuda_bits_bytes",
    "cuda_form",
    "cuda_forward_running",
    "cuda_pack",
    "cuda_unpack_bits",
]


def cuda_pack(
    blocks: Tensor,
    units: Tensor,
    weights: Tensor,
    scales: Tensor,
    backward: bool,
    parts: int,
    shared_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Pack a network for the whole-path kernels of one direction.

    Args:
        blocks, units, weights, scales: those of `pathnet.engines.tables.Tables`, on the CPU; the kernels use their
            own offsets of the ReLU bits.
        backward: whether to pack for the backward pass along paths, or for forward passes.
        parts: bf16 terms per number: 1, or 2 for float32 precision (forward passes take 2).
        shared_bytes: shared memory that a thread block may have.

    Returns:
        The program, int32 numbers that only the kernels read, which stays on the CPU; and for the device uint8
        [bytes], a copy of the program followed by the weights.

    Raises:
        RuntimeError: the kernels have no form for a block (the message names it), or the tables contradict one
            another.
    """
    program, packed = torch.ops.pathnet.cuda_pack(blocks, units, weights, scales, backward, parts, shared_bytes)
    return program, packed


def _fake_cuda_pack(
    blocks: Tensor, units: Tensor, weights: Tensor, scales: Tensor, backward: bool, parts: int, shared_bytes: int
) -> tuple[Tensor, Tensor]:
    numbers, packed = new_sizes(2)
    return blocks.new_empty((numbers,), dtype=torch.int32), blocks.new_empty((packed,), dtype=torch.uint8)


class CudaForm(NamedTuple):
    """A whole-path kernel's use of the shared memory of a thread block.

    Attributes:
        samples: samples of a thread block, which share every copy of the weights.
        windows: largest number of windows through which a convolution sees an image; 0 where images are resident in
            shared memory.
        slices: largest number of slices in which the weights of sixteen channels are copied.
        shared_bytes: shared memory of a thread block.
    """

    samples: int
    windows: int
    slices: int
    shared_bytes: int


def cuda_form(program: Tensor) -> CudaForm:
    """Return the form of a program of `cuda_pack`."""
    return CudaForm(*torch.ops.pathnet.cuda_form(program))


def cuda_bits_bytes(program: Tensor) -> int:
    """Return the bytes of a sample's row of ReLU bits.

    Args:
        program: that of the backward pass.

    Raises:
        RuntimeError: it is another program, or none.
    """
    return int(torch.ops.pathnet.cuda_bits_bytes(program))


def cuda_unpack_bits(relu_bits: Tensor, program: Tensor, block: int, unit: int) -> Tensor:
    """Return the ReLU bits of one unit, uint8 [B, C, H, W] of zeros and ones; C is a multiple of 16.

    Args:
        relu_bits: uint8 [B, bytes], as `cuda_forward_running` records them, on the CPU.
        program: that of the backward pass.
        block, unit: counted from 0.

    Raises:
        RuntimeError: an argument has another type or shape.
    """
    return torch.as_tensor(torch.ops.pathnet.cuda_unpack_bits(relu_bits, program, block, unit))


def _fake_cuda_unpack_bits(relu_bits: Tensor, program: Tensor, block: int, unit: int) -> Tensor:
    return relu_bits.new_empty((relu_bits.shape[0], *new_sizes(3)))


def cuda_backward_running(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    schedule: Tensor,
    program: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, per routing and sample.

    Args:
        grad: float32 [G, B, C_n, H_n, W_n], gradients that paths may start from; their values are
            ``grad * 2**exponent``.
        exponent: int32 [G, B]
        routing: float32 [P, n, 2]
        schedule: int32 [2, P]: the order in which the kernel takes the paths, where a path that is left out is not
            computed; and the gradient (0 to G - 1) that each path starts from.
        program: int32, of `cuda_pack` for the backward pass, on the CPU.
        packed: uint8, of the same call, where the other tensors are. The twin compares its copy of the program; a
            GPU does not, since that would synchronise.
        relu_bits: uint8 [B, bytes], as `cuda_forward_running` records them; for a program of some blocks alone, the
            columns of those blocks.
        gradients: whether to return the gradients, not only their norms.

    Returns:
        The samples' norms, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their exponents,
        int32 [P, B]; both with a first dimension of 0 unless ``gradients``.

    Raises:
        RuntimeError: an argument has another type, shape or device; the twin found a race.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cuda_backward_running(
        grad, exponent, routing, schedule, program, packed, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cuda_backward_running(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    schedule: Tensor,
    program: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    paths, batch = routing.shape[0], grad.shape[1]
    rows = paths if gradients else 0
    return (
        grad.new_empty((paths, batch), dtype=torch.float64),
        grad.new_empty((rows, batch, *new_sizes(3))),
        exponent.new_empty((rows, batch)),
    )


def cuda_forward_running(
    y0: Tensor, routing: Tensor, order: Tensor, program: Tensor, packed: Tensor, affine: Tensor, record: bool
) -> tuple[Tensor, Tensor]:
    """Compute ``y <- a s(y) + c f(y)`` from the first block to the last, per routing and sample.

    Args:
        y0: float32 [B, C_0, H_0, W_0]
        routing: float32 [P, n, 2]; to record, exactly one routing.
        order: int32 [P], the order in which the kernel takes the routings.
        program, packed: as for `cuda_backward_running`, of `cuda_pack` for forward passes.
        affine: float32: for each block's two units, BN's factors and then its shifts; then the biases after the
            block's last convolution and after its projection; channels zero-padded to 16.
        record: whether to return the ReLU bits.

    Returns:
        float32 [P, B, C_n, H_n, W_n], and the ReLU bits, uint8 [B, bytes], or [0, bytes] unless ``record``.

    Raises:
        RuntimeError: an argument has another type, shape or device; the twin found a race.
    """
    output, relu_bits = torch.ops.pathnet.cuda_forward_running(y0, routing, order, program, packed, affine, record)
    return output, relu_bits


def _fake_cuda_forward_running(
    y0: Tensor, routing: Tensor, order: Tensor, program: Tensor, packed: Tensor, affine: Tensor, record: bool
) -> tuple[Tensor, Tensor]:
    paths, batch = routing.shape[0], y0.shape[0]
    channels, height, width, bits = new_sizes(4)
    return (
        y0.new_empty((paths, batch, channels, height, width)),
        y0.new_empty((batch if record else 0, bits), dtype=torch.uint8),
    )


if LOADED:
    torch.library.register_fake("pathnet::cuda_pack")(_fake_cuda_pack)
    torch.library.register_fake("pathnet::cuda_unpack_bits")(_fake_cuda_unpack_bits)
    torch.library.register_fake("pathnet::cuda_backward_running")(_fake_cuda_backward_running)
    torch.library.register_fake("pathnet::cuda_forward_running")(_fake_cuda_forward_running)
