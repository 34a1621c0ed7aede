"""The native library: its ops as typed functions, and the facts of its build.

Importing this module never fails: where the library is not built, `LOADED` is False and `WHY_NOT` says so.

In the main thread the functions of the cpu engine answer signals while they compute, several times a second: Ctrl-C
ends them with its KeyboardInterrupt, and so does whatever else a signal's handler raises. A handler that returns only
delays them. (Of `torch.ops.pathnet` itself the exception is a RuntimeError.)
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "LOADED",
    "WHY_NOT",
    "CudaForm",
    "batch_backward",
    "batch_forward",
    "batch_sums_by_length",
    "build_facts",
    "cpu_pack",
    "cuda_bits_bytes",
    "cuda_form",
    "cuda_plan",
    "cuda_routed_backward",
    "cuda_routed_forward",
    "cuda_unpack_bits",
    "routed_backward",
    "routed_forward",
    "sums_by_length",
]


LIBRARY = Path(__file__).with_name("_ops.so")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _load() -> str:
    """Why the library could not be loaded; empty where it was."""
    if not LIBRARY.exists():
        return "the native library is not built (make install builds it)"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        functions = ctypes.PyDLL(str(LIBRARY))
        functions.pathnet_answer_signals(ctypes.c_ulong(threading.main_thread().ident or 0))
    except (OSError, AttributeError) as error:  # The latter of an older build, without that function.
        return f"the native library does not load ({str(error).splitlines()[0]})"
    return ""


WHY_NOT = _load()
LOADED = not WHY_NOT


def _interruptible(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Raise what a signal's handler raised in place of the error of the op that it ended."""

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except RuntimeError:
            # Does nothing where no handler has raised.
            ctypes.PyDLL(str(LIBRARY)).pathnet_raise_interruption()
            raise

    return call


def build_facts() -> dict[str, str | list[str]]:
    """What the build holds: compiler, the torch that it was compiled against and the one whose ABI it asks for, CUDA
    architectures or why there are none, instruction sets.

    Raises:
        RuntimeError: the library is not built, or PATHNET_ISA names an instruction set that is not there.
    """
    if not LOADED:
        raise RuntimeError(WHY_NOT)
    build = importlib.import_module("pathnet._build")
    return {
        "compiler": build.compiler,
        "torch_version": build.torch_version,
        "torch_target": build.torch_target,
        "cuda_compiler": build.cuda_compiler,
        "cuda_architectures": build.cuda_architectures.split(),
        "without_cuda": build.without_cuda,
        "instruction_sets": build.instruction_sets(),
        "selected_instruction_set": build.selected_instruction_set(),
    }


@_interruptible
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
        fold_scales: whether the factors are multiplied into the weights: for `routed_backward`.
        bf16: whether the walk back may round to bfloat16, on processors that multiply such numbers faster.

    Returns:
        uint8 [bytes]

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    return torch.as_tensor(torch.ops.pathnet.cpu_pack(blocks, units, weights, scales, backward, fold_scales, bf16))


@_interruptible
def routed_backward(
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
        relu_bits: uint8 [B, bytes], as `routed_forward` records them: of each unit [H, W, groups of 16 channels], two
            bytes each, the first channel lowest.
        gradients: whether the gradients are wanted beside their norms.

    Returns:
        The samples' norms, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their exponents,
        int32 [P, B], or none of them (P = 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.routed_backward(
        grad, exponent, routing, blocks, units, packed, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


@_interruptible
def sums_by_length(
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
        grad, exponent, blocks, units, packed, relu_bits, gradients: as for `routed_backward`.

    Returns:
        The samples' norms, float64 [n + 1, B]; the gradients, float32 [n + 1, B, C_0, H_0, W_0], and their exponents,
        int32 [n + 1, B], or none of them (of length 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.sums_by_length(
        grad, exponent, routing, blocks, units, packed, relu_bits, gradients
    )
    return norms, grad_input, exponent_input


@_interruptible
def routed_forward(
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
    output, relu_bits = torch.ops.pathnet.routed_forward(
        y0, routing, blocks, units, scales, shifts, biases, packed, record
    )
    return output, relu_bits


@_interruptible
def batch_backward(
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
    """`routed_backward` where each batch normalisation took the batch's own statistics (Ioffe and Szegedy 2015).

    Args:
        grad, routing, blocks, units, gradients: as for `routed_backward`.
        exponent: int32 [1]; the batch has one.
        packed: of `cpu_pack`, for the walk back, factors left out.
        relu_bits, normalized, scales: of `batch_forward`.

    Returns:
        The norms of the samples' slices, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their
        exponents, int32 [P, 1], or none of them (P = 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.batch_backward(
        grad, exponent, routing, blocks, units, packed, relu_bits, normalized, scales, gradients
    )
    return norms, grad_input, exponent_input


@_interruptible
def batch_sums_by_length(
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
    """`sums_by_length` where each batch normalisation took the batch's own statistics.

    Args:
        routing: as for `sums_by_length`; the others as for `batch_backward`.

    Returns:
        The norms of the samples' slices, float64 [n + 1, B]; the gradients, float32 [n + 1, B, C_0, H_0, W_0], and
        their exponents, int32 [n + 1, 1], or none of them (of length 0).

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.batch_sums_by_length(
        grad, exponent, routing, blocks, units, packed, relu_bits, normalized, scales, gradients
    )
    return norms, grad_input, exponent_input


@_interruptible
def batch_forward(
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
    """`routed_forward` where each batch normalisation takes the statistics of the batch, per routing its own.

    Args:
        y0, routing, blocks, units, packed, record: as for `routed_forward`.
        scales, shifts: float32, weight and bias of each unit's batch normalisation.
        epsilons: float32 [U], what it adds to the variance.

    Returns:
        float32 [P, B, C_n, H_n, W_n]; where recorded (otherwise with no elements) the ReLU bits, uint8 [B, bytes];
        the normalised inputs before weight and bias, float32, row after row [B, H, W, C filled up to groups of 16];
        and the factors weight / deviation, as ``scales`` lie.

    Raises:
        RuntimeError: an argument has another type or shape, or the tables contradict one another.
    """
    output, relu_bits, normalized, batch_scales = torch.ops.pathnet.batch_forward(
        y0, routing, blocks, units, scales, shifts, epsilons, packed, record
    )
    return output, relu_bits, normalized, batch_scales


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
        blocks, units, weights, scales: as `cpu_pack` has them, on the CPU; offsets of bits are not used.
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


class CudaForm(NamedTuple):
    """How a whole-path kernel makes do with the shared memory of a thread block.

    Attributes:
        samples: of a thread block, which share every copy of the weights.
        windows: through which a convolution sees an image, at most; 0 where images are resident in shared memory.
        slices: in which the weights of sixteen channels are copied, at most.
        shared_bytes: of a thread block.
    """

    samples: int
    windows: int
    slices: int
    shared_bytes: int


def cuda_form(program: Tensor) -> CudaForm:
    """Return the form of a program of `cuda_plan`."""
    return CudaForm(*torch.ops.pathnet.cuda_form(program))


def cuda_bits_bytes(program: Tensor) -> int:
    """Bytes of a sample's row of ReLU bits.

    Args:
        program: of the walk back.

    Raises:
        RuntimeError: it is none.
    """
    return int(torch.ops.pathnet.cuda_bits_bytes(program))


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
    starts: Tensor,
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
        grad: float32 [G, B, C_n, H_n, W_n], gradients that walks may start from; their values are
            ``grad * 2**exponent``.
        exponent: int32 [G, B]
        starts: int32 [P], the gradient (0 to G - 1) that each path starts from.
        routing: float32 [P, n, 2]
        order: int32 [P], the order in which the paths are taken; a path that is left out is not walked.
        program: int32, of `cuda_plan`, on the CPU; ``device_program`` its copy where the other tensors are.
        weights: uint8, of `cuda_plan`.
        relu_bits: uint8 [B, bytes], as `cuda_routed_forward` records them; of some blocks alone, a slice of those
            columns.
        gradients: whether the gradients are wanted beside their norms.

    Returns:
        The samples' norms, float64 [P, B]; the gradients, float32 [P, B, C_0, H_0, W_0], and their exponents,
        int32 [P, B], or none of them (P = 0).

    Raises:
        RuntimeError: an argument has another type, shape or device; the twin found a race.
    """
    norms, grad_input, exponent_input = torch.ops.pathnet.cuda_routed_backward(
        grad, exponent, starts, routing, order, program, device_program, weights, relu_bits, gradients
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
        affine: float32: of each block's two units, BN's factors and then its shifts; then what is added behind the
            block's last convolution and behind its projection; channels filled up with zeros to 16.
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


# Shapes that are data (a table's or program's own numbers) a fake tensor does not have.


def _new_sizes(count: int) -> list[int | torch.SymInt]:
    context = torch.library.get_ctx()
    return [context.new_dynamic_size() for _ in range(count)]


def _fake_cpu_pack(
    blocks: Tensor, units: Tensor, weights: Tensor, scales: Tensor, backward: bool, fold_scales: bool, bf16: bool
) -> Tensor:
    return blocks.new_empty(_new_sizes(1), dtype=torch.uint8)


def _fake_routed_backward(
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


def _fake_batch_backward(
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


def _fake_batch_sums_by_length(
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


def _fake_backward(
    grad: Tensor, exponent: Tensor, routing: Tensor, relu_bits: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    routings, batch = routing.shape[0], relu_bits.shape[0]
    given = routings if gradients else 0
    return (
        grad.new_empty((routings, batch), dtype=torch.float64),
        grad.new_empty((given, batch, *_new_sizes(3))),
        exponent.new_empty((given, exponent.shape[0])),
    )


def _fake_sums_by_length(
    grad: Tensor,
    exponent: Tensor,
    routing: Tensor,
    blocks: Tensor,
    units: Tensor,
    packed: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # As many as there are routings of `routed_backward`: one more than blocks.
    return _fake_backward(grad, exponent, routing.new_empty((routing.shape[0] + 1, 0)), relu_bits, gradients)


def _fake_routed_forward(
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
    output = y0.new_empty((routing.shape[0], y0.shape[0], *_new_sizes(3)))
    return output, y0.new_empty((y0.shape[0] if record else 0, *_new_sizes(1)), dtype=torch.uint8)


def _fake_batch_forward(
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
    output, relu_bits = _fake_routed_forward(y0, routing, blocks, units, scales, shifts, shifts, packed, record)
    normalized = y0.new_empty(_new_sizes(1) if record else (0,))
    return output, relu_bits, normalized, scales.new_empty((scales.shape[0] if record else 0,))


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
    starts: Tensor,
    routing: Tensor,
    order: Tensor,
    program: Tensor,
    device_program: Tensor,
    weights: Tensor,
    relu_bits: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    paths, batch = routing.shape[0], grad.shape[1]
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
    torch.library.register_fake("pathnet::cpu_pack")(_fake_cpu_pack)
    torch.library.register_fake("pathnet::routed_backward")(_fake_routed_backward)
    torch.library.register_fake("pathnet::sums_by_length")(_fake_sums_by_length)
    torch.library.register_fake("pathnet::routed_forward")(_fake_routed_forward)
    torch.library.register_fake("pathnet::batch_backward")(_fake_batch_backward)
    torch.library.register_fake("pathnet::batch_sums_by_length")(_fake_batch_sums_by_length)
    torch.library.register_fake("pathnet::batch_forward")(_fake_batch_forward)
