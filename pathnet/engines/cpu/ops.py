"""The cpu engine's native ops as typed functions, each beside its fake."""

from __future__ import annotations

import torch
from torch import Tensor

from pathnet.native import LOADED, interruptible, new_sizes

__all__ = [
    "cpu_backward_batch",
    "cpu_backward_running",
    "cpu_forward_batch",
    "cpu_forward_running",
    "cpu_pack",
    "cpu_sums_by_length_batch",
    "cpu_sums_by_length_running",
]


@interruptible
def cpu_pack(
    blocks: Tensor, units: Tensor, weights: Tensor, scales: Tensor, backward: bool, fold_scales: bool, bf16: bool
) -> Tensor:
    """A network's weights as the cpu kernels of the selected instruction set read them.

    Args:
        blocks: int64 [n, 10]: first unit, number of units, skip (0 identity, 1 projection, 2 padding; 3 identity and
            4 padding behind the first unit's ReLU), unit of the projection or -1, channels, height and width of the
            input, and of the output.
        units: int64 [U, 12]: channels, height and width of the input, and of the output; kernel, stride, padding;
            offsets of the weights, of the scales (elements) and of the bits (bytes in a row). No batch normalisation
            stands before a convolution whose scales are -1, and no ReLU where the bits are: neither before a
            projection. In BN mode ``batch`` blocks may be closed: no scales in their first unit, and behind the last
            one's row, and the projection's, a row of kernel 0 for the batch normalisation that ends the branch.
        weights: float32, every convolution's [out, in, kernel, kernel] one after the other.
        scales: float32, the factors of each unit's batch normalisation.
        backward: for the walk back, or forward.
        fold_scales: whether the factors are multiplied into the weights: for `cpu_backward_running`.
        bf16: whether the walk back may round to bfloat16, on processors that multiply such numbers faster.

    Returns:
        uint8 [bytes]

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    return torch.as_tensor(torch.ops.pathnet.cpu_pack(blocks, units, weights, scales, backward, fold_scales, bf16))


def _fake_cpu_pack(
    blocks: Tensor, units: Tensor, weights: Tensor, scales: Tensor, backward: bool, fold_scales: bool, bf16: bool
) -> Tensor:
    return blocks.new_empty(new_sizes(1), dtype=torch.uint8)


@interruptible
def cpu_backward_running(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, for every routing and sample.

    A unit is ``y = conv(relu(s * x + t))``, with batch normalisation by running statistics as the affine map. A
    gradient whose largest magnitude leaves 2^-20 to 2^20 is multiplied by a power of two, which is counted apart;
    what is denormal in ``grad`` itself counts as zero.

    Args:
        grad: float32 [B, C_n, H_n, W_n], at the output of the last block; its value is ``grad * 2**exponent``.
        exponent: int32 [B]
        routing: float32 [P, n, 2], the (a, c) of every block.
        blocks, units: see `cpu_pack`.
        packed: of `cpu_pack`, for the walk back, factors folded in.
        relu_bits: uint8 [B, bytes], as `cpu_forward_running` records them: of each unit [H, W, groups of 16
            channels], two
            bytes each, the first channel lowest.
        gradients: whether the gradients are wanted beside their norms.

    Returns:
        The samples' norms, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their exponents,
        int32 [P, B], or none of them (P = 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_backward_running(
        grad, exponent, routing, blocks, units, packed, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_backward_running(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, routing, relu_bits, gradients)


@interruptible
def cpu_backward_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cpu_backward_running` where each batch normalisation took the batch's own statistics (Ioffe and Szegedy 2015).

    Args:
        grad, routing, blocks, units, gradients: as for `cpu_backward_running`.
        exponent: int32 [1]; the batch has one.
        packed: of `cpu_pack`, for the walk back, factors left out.
        relu_bits, normalized, scales: of `cpu_forward_batch`.

    Returns:
        The norms of the samples' slices, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their
        exponents, int32 [P, 1], or none of them (P = 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_backward_batch(
        grad, exponent, routing, blocks, units, packed, relu_bits, normalized, scales, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_backward_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, routing, relu_bits, gradients)


@interruptible
def cpu_sums_by_length_running(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients by powers of x of the product of ``a J_skip^T + x c J_residual^T`` over the blocks.

    Args:
        routing: float32 [n, 2], the (a, c) of every block.
        grad, exponent, blocks, units, packed, relu_bits, gradients: as for `cpu_backward_running`.

    Returns:
        The samples' norms, float64 [n + 1, B]; the gradients, float32 [n + 1, B, C_0, H_0, W_0], and their exponents,
        int32 [n + 1, B], or none of them (of length 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_sums_by_length_running(
        grad, exponent, routing, blocks, units, packed, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_sums_by_length_running(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # As many as there are routings of `cpu_backward_running`: one more than blocks.
    return _fake_backward(grad, exponent, routing.new_empty((routing.shape[0] + 1, 0)), relu_bits, gradients)


@interruptible
def cpu_sums_by_length_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cpu_sums_by_length_running` where each batch normalisation took the batch's own statistics.

    Args:
        routing: as for `cpu_sums_by_length_running`; the others as for `cpu_backward_batch`.

    Returns:
        The norms of the samples' slices, float64 [n + 1, B]; the gradients, float32 [n + 1, B, C_0, H_0, W_0], and
        their exponents, int32 [n + 1, 1], or none of them (of length 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cpu_sums_by_length_batch(
        grad, exponent, routing, blocks, units, packed, relu_bits, normalized, scales, gradients
    )
    return norms, grad_input, exponent_input


def _fake_cpu_sums_by_length_batch(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    normalized: Tensor,
    scales: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(grad, exponent, routing.new_empty((routing.shape[0] + 1, 0)), relu_bits, gradients)


@interruptible
def cpu_forward_running(
    y0: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    scales: Tensor,
    shifts: Tensor,
    biases: Tensor,
    packed: Tensor,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """``y <- a s(y) + c f(y)`` from the first block to the last, for every routing and sample, in float32 precision.

    Args:
        y0: float32 [B, C_0, H_0, W_0]
        routing: float32 [P, n, 2]; one, with no residual module left out, where the walk is recorded.
        blocks, units: see `cpu_pack`.
        scales, shifts: float32, factors and shifts of each unit's batch normalisation.
        biases: float32, of each unit's convolution [out], one after the other: those of a module's last one and of
            projections are added, others belong into ``shifts``; empty for none.
        packed: of `cpu_pack`, for the walk forward.
        record: whether the ReLU bits are wanted.

    Returns:
        float32 [P, B, C_n, H_n, W_n], and the ReLU bits, uint8 [B, bytes], or none of them ([0, bytes]).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    output, relu_bits = torch.ops.pathnet.cpu_forward_running(
        y0, routing, blocks, units, scales, shifts, biases, packed, record
    )
    return output, relu_bits


def _fake_cpu_forward_running(
    y0: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    scales: Tensor,
    shifts: Tensor,
    biases: Tensor,
    packed: Tensor,
    record: bool,
) -> tuple[Tensor, Tensor]:
    output = y0.new_empty((routing.shape[0], y0.shape[0], *new_sizes(3)))
    return output, y0.new_empty((y0.shape[0] if record else 0, *new_sizes(1)), dtype=torch.uint8)


@interruptible
def cpu_forward_batch(
    y0: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    scales: Tensor,
    shifts: Tensor,
    epsilons: Tensor,
    packed: Tensor,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cpu_forward_running` where each batch normalisation takes the statistics of the batch, per routing its own.

    Args:
        y0, routing, blocks, units, packed, record: as for `cpu_forward_running`.
        scales, shifts: float32, weight and bias of each unit's batch normalisation.
        epsilons: float32 [U], what it adds to the variance.

    Returns:
        float32 [P, B, C_n, H_n, W_n]; where recorded (otherwise with no elements) the ReLU bits, uint8 [B, bytes];
        the normalised inputs before weight and bias, float32, row after row [B, H, W, C filled up to groups of 16];
        and the factors weight / deviation, as ``scales`` lie.

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    output, relu_bits, normalized, batch_scales = torch.ops.pathnet.cpu_forward_batch(
        y0, routing, blocks, units, scales, shifts, epsilons, packed, record
    )
    return output, relu_bits, normalized, batch_scales


def _fake_cpu_forward_batch(
    y0: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    scales: Tensor,
    shifts: Tensor,
    epsilons: Tensor,
    packed: Tensor,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, relu_bits = _fake_cpu_forward_running(y0, routing, blocks, units, scales, shifts, shifts, packed, record)
    normalized = y0.new_empty(new_sizes(1) if record else (0,))
    return output, relu_bits, normalized, scales.new_empty((scales.shape[0] if record else 0,))


def _fake_backward(
    grad: Tensor, exponent: Tensor, routing: Tensor, relu_bits: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    routings, batch = routing.shape[0], relu_bits.shape[0]
    given = routings if gradients else 0
    return (
        grad.new_empty((routings, batch), dtype=torch.float64),
        grad.new_empty((given, batch, *new_sizes(3))),
        exponent.new_empty((given, exponent.shape[0])),
    )


if LOADED:
    torch.library.register_fake("pathnet::cpu_pack")(_fake_cpu_pack)
    torch.library.register_fake("pathnet::cpu_backward_running")(_fake_cpu_backward_running)
    torch.library.register_fake("pathnet::cpu_backward_batch")(_fake_cpu_backward_batch)
    torch.library.register_fake("pathnet::cpu_sums_by_length_running")(_fake_cpu_sums_by_length_running)
    torch.library.register_fake("pathnet::cpu_sums_by_length_batch")(_fake_cpu_sums_by_length_batch)
    torch.library.register_fake("pathnet::cpu_forward_running")(_fake_cpu_forward_running)
    torch.library.register_fake("pathnet::cpu_forward_batch")(_fake_cpu_forward_batch)
