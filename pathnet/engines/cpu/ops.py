"""The cpu engine's native ops as typed functions, each with its fake."""

from __future__ import annotations

import torch
from torch import Tensor

from pathnet.engines.tables import Tables
from pathnet.native import LOADED, interruptible, new_sizes
from pathnet.recording import BatchNormMode

__all__ = [
    "cpu_backward_batch",
    "cpu_backward_running",
    "cpu_forward_batch",
    "cpu_forward_running",
    "cpu_pack",
    "cpu_sums_by_length_batch",
    "cpu_sums_by_length_running",
    "pack_arguments",
]


@interruptible
def cpu_pack(tables: Tables, backward: bool, bn: BatchNormMode, bf16: bool) -> Tensor:
    """Pack a network for one kind of pass, as the cpu kernels of the selected instruction set read it.

    A plan holds the tables, the packed weights and checksums. Each op accepts only plans that were packed for it,
    and compares the checksum of the tables. The weights' checksum is computed here only, since they take megabytes.

    Args:
        tables: on the CPU. A projection has neither scales nor ReLU bits. In BN mode ``batch`` blocks may be closed:
            their first unit has no scales, and a row of kernel 0 follows that of the last unit, and that of the
            projection, for the batch normalisation that ends the branch.
        backward: whether the plan is for the backward pass along paths and the sums by length, or for forward passes.
        bn: the BN mode of the pass. The backward pass of mode ``running`` has the scales multiplied into the weights,
            that of mode ``batch`` takes those of the record.
        bf16: whether the backward pass may round to bfloat16, on processors that multiply such numbers faster.

    Returns:
        uint8 [bytes]

    Raises:
        RuntimeError: a table has another type or shape, or the tables contradict one another.
    """
    return torch.as_tensor(torch.ops.pathnet.cpu_pack(*pack_arguments(tables, backward, bn, bf16)))


def pack_arguments(
    tables: Tables, backward: bool, bn: BatchNormMode, bf16: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, bool]:
    """Return the arguments of the op itself; ``walk`` has the values of ``WalkKind`` in csrc/cpu/packed_plan.h."""
    walk = (0 if backward else 2) + (bn == "batch")
    addends = tables.biases if bn == "running" else tables.epsilons
    return tables.blocks, tables.units, tables.weights, tables.scales, tables.shifts, addends, walk, bf16


def _fake_cpu_pack(
    blocks: Tensor,
    units: Tensor,
    weights: Tensor,
    scales: Tensor,
    shifts: Tensor,
    addends: Tensor,
    walk: int,
    bf16: bool,
) -> Tensor:
    return blocks.new_empty(new_sizes(1), dtype=torch.uint8)


@interruptible
def cpu_backward_running(
    grad: Tensor, exponent: Tensor, routing: Tensor, plan: Tensor, relu_bits: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, per routing and sample.

    A unit is ``y = conv(relu(s * x + t))``, with batch normalisation by running statistics as the affine map. A
    gradient whose largest magnitude leaves 2^-20 to 2^20 is multiplied by a power of two, which its exponent keeps;
    denormals in ``grad`` are treated as zero.

    Args:
        grad: float32 [B, C_n, H_n, W_n], at the output of the last block; its value is ``grad * 2**exponent``.
        exponent: int32 [B]
        routing: float32 [P, n, 2], the (a, c) of every block.
        plan: uint8, from `cpu_pack` for this kind of pass.
        relu_bits: uint8 [B, bytes], as `cpu_forward_running` records them: for each unit [H, W, groups of 16
            channels], two bytes each, the first channel lowest.
        gradients: whether to return the gradients, not only their norms.

    Returns:
        The samples' norms, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their exponents,
        int32 [P, B]; both with a first dimension of 0 unless ``gradients``.

    Raises:
        RuntimeError: an argument has another type or shape, or the plan is for another kind of pass, for another
            instruction set, or not as it was packed.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_backward_running(
        grad, exponent, routing, plan, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_backward_running(
    grad: Tensor, exponent: Tensor, routing: Tensor, plan: Tensor, relu_bits: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, relu_bits, routing.shape[0], gradients)


@interruptible
def cpu_sums_by_length_running(
    grad: Tensor, exponent: Tensor, routing: Tensor, plan: Tensor, relu_bits: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the coefficients by powers of x of the product of ``a J_skip^T + x c J_residual^T`` over the blocks.

    Args:
        routing: float32 [n, 2], the (a, c) of every block.
        grad, exponent, plan, relu_bits, gradients: as for `cpu_backward_running`, whose plan this op shares.

    Returns:
        The samples' norms, float64 [n + 1, B]; the gradients, float32 [n + 1, B, C_0, H_0, W_0], and their exponents,
        int32 [n + 1, B]; both with a first dimension of 0 unless ``gradients``.

    Raises:
        RuntimeError: as `cpu_backward_running`.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_sums_by_length_running(
        grad, exponent, routing, plan, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_sums_by_length_running(
    grad: Tensor, exponent: Tensor, routing: Tensor, plan: Tensor, relu_bits: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, relu_bits, routing.shape[0] + 1, gradients)


@interruptible
def cpu_forward_running(y0: Tensor, routing: Tensor, plan: Tensor, record: bool) -> tuple[Tensor, Tensor]:
    """Compute ``y <- a s(y) + c f(y)`` from the first block to the last, per routing and sample, in float32.

    The tables' ``scales`` and ``shifts`` are factors and shifts of each unit's batch normalisation. ``biases``
    are added for the last convolution of a module and for projections; fold all others into ``shifts``.

    Args:
        y0: float32 [B, C_0, H_0, W_0]
        routing: float32 [P, n, 2]; to record, exactly one routing, with every residual module on.
        plan: uint8, from `cpu_pack` for this kind of pass.
        record: whether to return the ReLU bits.

    Returns:
        float32 [P, B, C_n, H_n, W_n], and the ReLU bits, uint8 [B, bytes], or [0, bytes] unless ``record``.

    Raises:
        RuntimeError: as `cpu_backward_running`.
    """
    output, relu_bits = torch.ops.pathnet.cpu_forward_running(y0, routing, plan, record)
    return output, relu_bits


def _fake_cpu_forward_running(y0: Tensor, routing: Tensor, plan: Tensor, record: bool) -> tuple[Tensor, Tensor]:
    output = y0.new_empty((routing.shape[0], y0.shape[0], *new_sizes(3)))
    return output, y0.new_empty((y0.shape[0] if record else 0, *new_sizes(1)), dtype=torch.uint8)


@interruptible
def cpu_backward_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    plan: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `cpu_backward_running` does, in BN mode ``batch`` (Ioffe and Szegedy 2015).

    Args:
        grad, routing, gradients: as for `cpu_backward_running`.
        exponent: int32 [1], one for the batch.
        plan: uint8, from `cpu_pack` for this kind of pass.
        relu_bits, normalized, scales: the record of `cpu_forward_batch`.

    Returns:
        The norms of the samples' slices, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their
        exponents, int32 [P, 1]; both with a first dimension of 0 unless ``gradients``.

    Raises:
        RuntimeError: as `cpu_backward_running`.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_backward_batch(
        grad, exponent, routing, plan, relu_bits, normalized, scales, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_backward_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    plan: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, relu_bits, routing.shape[0], gradients)


@interruptible
def cpu_sums_by_length_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    plan: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `cpu_sums_by_length_running` does, in BN mode ``batch``.

    Args:
        routing: as for `cpu_sums_by_length_running`.
        grad, exponent, plan, relu_bits, normalized, scales, gradients: as for `cpu_backward_batch`, whose plan this
            op shares.

    Returns:
        The norms of the samples' slices, float64 [n + 1, B]; the gradients, float32 [n + 1, B, C_0, H_0, W_0], and
        their exponents, int32 [n + 1, 1]; both with a first dimension of 0 unless ``gradients``.

    Raises:
        RuntimeError: as `cpu_backward_running`.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_sums_by_length_batch(
        grad, exponent, routing, plan, relu_bits, normalized, scales, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_sums_by_length_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    plan: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, relu_bits, routing.shape[0] + 1, gradients)


@interruptible
def cpu_forward_batch(
    y0: Tensor, routing: Tensor, plan: Tensor, record: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `cpu_forward_running` does, in BN mode ``batch``: each routing has its own batch statistics.

    The tables' ``scales`` and ``shifts`` are weight and bias of each unit's batch normalisation; ``epsilons`` are
    added to its variance.

    Args:
        y0, routing, record: as for `cpu_forward_running`.
        plan: uint8, from `cpu_pack` for this kind of pass.

    Returns:
        float32 [P, B, C_n, H_n, W_n]; and the record, which has no elements unless ``record``: the ReLU bits, uint8
        [B, bytes]; the normalised inputs before weight and bias, float32, row after row [B, H, W, C padded to
        groups of 16]; and the factors weight / deviation, in the order of the tables' ``scales``.

    Raises:
        RuntimeError: as `cpu_backward_running`.
    """
    output, relu_bits, normalized, scales = torch.ops.pathnet.cpu_forward_batch(y0, routing, plan, record)
    return output, relu_bits, normalized, scales


def _fake_cpu_forward_batch(
    y0: Tensor, routing: Tensor, plan: Tensor, record: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, relu_bits = _fake_cpu_forward_running(y0, routing, plan, record)
    normalized, scales = (y0.new_empty(new_sizes(1) if record else (0,)) for _ in range(2))
    return output, relu_bits, normalized, scales


def _fake_backward(
    grad: Tensor, exponent: Tensor, relu_bits: Tensor, results: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows = relu_bits.shape[0], results if gradients else 0
    return (
        grad.new_empty((results, batch), dtype=torch.float64),
        grad.new_empty((rows, batch, *new_sizes(3))),
        exponent.new_empty((rows, exponent.shape[0])),
    )


if LOADED:
    torch.library.register_fake("pathnet::cpu_pack")(_fake_cpu_pack)
    torch.library.register_fake("pathnet::cpu_backward_running")(_fake_cpu_backward_running)
    torch.library.register_fake("pathnet::cpu_sums_by_length_running")(_fake_cpu_sums_by_length_running)
    torch.library.register_fake("pathnet::cpu_forward_running")(_fake_cpu_forward_running)
    torch.library.register_fake("pathnet::cpu_backward_batch")(_fake_cpu_backward_batch)
    torch.library.register_fake("pathnet::cpu_sums_by_length_batch")(_fake_cpu_sums_by_length_batch)
    torch.library.register_fake("pathnet::cpu_forward_batch")(_fake_cpu_forward_batch)
