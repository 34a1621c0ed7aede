"""An engine's check of itself, before its first use on a network of some form in a process: against the reference.

It runs the kernels that the network itself will run: on a small network of the network's distinct blocks, one after
the other, with weights of its own and few images, small ones where that changes no kernel, so that it needs less
memory than the network does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pathnet import scaling
from pathnet.engines.forms import blocks_of, post_activation
from pathnet.engines.reference import ReferenceEngine, freeze
from pathnet.models.residual_net import Block, FusedForm, PostActivationForm, ResidualNet
from pathnet.recording import BatchNormMode, Precision, snapshot

if TYPE_CHECKING:
    from pathnet.engines import Engine

__all__ = ["Ahead", "disagreement", "trial_run"]

TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far a sample's norm may lie from the reference's."""

LEAST_VALUES = 45
"""Of a channel, where statistics are a batch's: of fewer, what they leave of a gradient is rounding."""

MOST_PIXELS = 128
"""Kernels whose tiles hold several small images are compiled for the images' pixels, as a power of two; this is the
most that a tile holds."""

Ahead = Callable[[Callable[[], object]], object]
"""Takes a piece of work and gets ready what it needs, see `pathnet.engines.triton.ahead.compile_for`."""

_found: dict[Hashable, str | None] = {}


@dataclass(frozen=True)
class _Trial:
    """What an engine is tried on, on the CPU.

    Attributes:
        net: in float32.
        y0: [B, C_0, H_0, W_0]
        grad, exponent: the scaled gradient at ``y_n``.
        routing: [4, n, 2]
    """

    net: ResidualNet
    bn: BatchNormMode
    y0: Tensor
    grad: Tensor
    exponent: Tensor
    routing: Tensor


@dataclass(frozen=True)
class _Results:
    """What an engine makes of a trial: norms and gradients along routings, forward passes, and ReLU bits."""

    y: Tensor
    bits: list[list[Tensor]]
    norms: Tensor
    gradients: tuple[Tensor, Tensor]
    outputs: Tensor


def disagreement(
    engine: Engine,
    net: ResidualNet,
    bn: BatchNormMode,
    precision: Precision,
    y0_shape: Sequence[int],
    device: torch.device,
    ahead: Ahead | None = None,
    small: bool = True,
) -> str | None:
    """What is wrong with an engine whose record has ``bits()`` on blocks of the network's forms, or None; found out
    once a process for the same forms.

    Args:
        net: of which blocks are copied.
        y0_shape: (C_0, H_0, W_0)
        ahead: gets ready what a piece of the engine's work needs, before it is done.
        small: whether smaller images than the network's may take the same kernels.
    """
    blocks = _distinct(net)
    channels, height, width = y0_shape
    shape = _small_shape(blocks, y0_shape) if small else (channels, height, width)
    key = engine.name, tuple(map(_form_of, blocks)), shape, bn, precision, device
    if key not in _found:
        _found[key] = _check(engine, _trial(blocks, bn, shape), precision, device, ahead)
    return _found[key]


def trial_run(
    engine: Engine,
    net: ResidualNet,
    bn: BatchNormMode,
    precision: Precision,
    y0_shape: Sequence[int],
    device: torch.device,
) -> Callable[[], object]:
    """The engine's part of its check, of which nothing is judged: what it launches can be compiled ahead."""
    blocks = _distinct(net)
    trial = _trial(blocks, bn, _small_shape(blocks, y0_shape))
    return lambda: _run(engine, trial, precision, device)


def _distinct(net: ResidualNet) -> list[Block]:
    """The network's blocks, without those that leave the shape as it is and have come before in the same form."""
    blocks: list[Block] = []
    before: set[Hashable] = set()
    for block in blocks_of(net):
        form = _form_of(block)
        convs = _module_of(block)
        keeps_shape = convs[0].in_channels == convs[-1].out_channels and _stride(block) == 1
        # The first block of post-activation ones has no ReLU before it.
        if not blocks or form not in before or not keeps_shape:
            blocks.append(block)
            if len(blocks) > 1 or not post_activation(net):
                before.add(form)
    return blocks


def _form_of(block: Block) -> Hashable:
    form = _form(block)
    projection = None if form.projection is None else _sizes(form.projection)
    return type(form).__name__, *map(_sizes, _module_of(block)), projection, form.pad


def _form(block: Block) -> FusedForm | PostActivationForm:
    form = block.post_activation_form() or block.fused_form()
    assert form is not None
    return form


def _module_of(block: Block) -> list[nn.Conv2d]:
    form = _form(block)
    return list(form.convs) if isinstance(form, PostActivationForm) else [unit.conv for unit in form.units]


def _sizes(conv: nn.Conv2d) -> Hashable:
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding


def _stride(block: Block) -> int:
    return math.prod(conv.stride[0] for conv in _module_of(block))


def _small_shape(blocks: Sequence[Block], y0_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C_0, H, W), no larger than the network's own, of the smallest images that take the same kernels throughout."""
    channels, own_height, own_width = y0_shape
    strides = [conv.stride[0] for block in blocks for conv in _module_of(block)]
    classes = _pixel_classes(strides, own_height, own_width)
    for width in range(1, own_width):
        # Not square, or rows and columns could be mixed up.
        height = min(own_height, -(-3 * width // 4))
        if _pixel_classes(strides, height, width) == classes:
            return channels, height, width
    return channels, own_height, own_width


def _pixel_classes(strides: Sequence[int], height: int, width: int) -> list[int]:
    """For which number of pixels kernels are compiled, image after image."""
    classes = []
    for stride in (1, *strides):
        height, width = -(-height // stride), -(-width // stride)
        classes.append(min(MOST_PIXELS, 1 << (height * width - 1).bit_length()))
    return classes


def _trial(blocks: Sequence[Block], bn: BatchNormMode, shape: tuple[int, int, int]) -> _Trial:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        copies = [_drawn_anew(copy.deepcopy(block).cpu()) for block in blocks]
        net = snapshot(ResidualNet(nn.Identity(), copies, nn.Identity()), bn, torch.float32)
        with torch.no_grad():
            made = net(torch.zeros(2, *shape)).shape[1:]
        batch = max(3, -(-LEAST_VALUES // math.prod(made[1:]))) if bn == "batch" else 3
        y0, grad, routing = torch.randn(batch, *shape), torch.randn(batch, *made), torch.randn(4, net.n, 2)
        exponent = torch.zeros(batch if bn == "running" else 1, dtype=torch.int32)
    # Both branches, and of every block each alone.
    routing[0] = 1.0
    for parity in (0, 1):
        routing[1 + parity, parity::2, 1] = 0.0
        routing[1 + parity, 1 - parity :: 2, 0] = 0.0
    if post_activation(net):
        # Of a skip alone, which is above zero, the sum's ReLU would leave nothing to compare.
        routing[..., 0].abs_()
    return _Trial(net, bn, y0, grad, exponent, routing)


@torch.no_grad()
def _drawn_anew(block: Block) -> Block:
    """The block with random weights, and statistics that leave no factor at 0 or 1."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
        elif isinstance(module, nn.BatchNorm2d):
            for spread in (module.weight, module.running_var):
                if spread is not None:
                    spread.uniform_(0.5, 1.5)
            for shift in (module.bias, module.running_mean):
                if shift is not None:
                    shift.normal_(0, 0.3)
    return block


def _check(
    engine: Engine, trial: _Trial, precision: Precision, device: torch.device, ahead: Ahead | None
) -> str | None:
    def work() -> _Results:
        return _run(engine, trial, precision, device)

    try:
        if ahead is not None:
            ahead(work)
        error = _largest_error(trial, work())
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:
        return f"its check of itself failed ({(str(failure).splitlines() or [type(failure).__name__])[0]})"
    if not error <= TOLERANCE[precision]:
        return f"it disagrees with the reference on a small input (relative error {error:.1g} in {precision})"
    return None


def _run(engine: Engine, trial: _Trial, precision: Precision, device: torch.device) -> _Results:
    y0, routing = trial.y0.to(device), trial.routing
    prepared = engine.prepare(copy.deepcopy(trial.net).to(device), trial.bn, precision, y0.shape[1:])
    y, blocks = engine.record(prepared, y0)
    start = blocks, trial.grad.to(device), trial.exponent.to(device), routing
    return _Results(
        y,
        blocks.bits(),  # type: ignore[attr-defined]
        engine.routed_backward_norms(*start),
        engine.routed_backward(*start),
        engine.routed_forward(prepared, y0, routing),
    )


def _largest_error(trial: _Trial, results: _Results) -> float:
    """Of samples' norms and gradients along the routings, and of forward passes; NaN where there is one."""
    bn, y0, routing = trial.bn, trial.y0.double(), trial.routing.double()
    reference, norms = ReferenceEngine(), results.norms.cpu()
    frozen = freeze(trial.net, [[bit.cpu() for bit in bits] for bits in results.bits])
    expected_y, inputs = reference.record(reference.prepare(frozen, bn, "float64", y0.shape[1:]), y0)
    walked = reference.routed_backward(inputs, trial.grad.double(), trial.exponent, routing)
    expected = scaling.norms(*walked)
    exact = reference.prepare(copy.deepcopy(trial.net).double(), bn, "float64", y0.shape[1:])
    expected_outputs = reference.routed_forward(exact, y0, routing)
    errors = [
        _relative(norms - expected, expected),
        _relative(scaling.norms(*results.gradients).cpu() - expected, expected),
        _relative(_sizes_of((results.y.cpu() - expected_y)[None]), _sizes_of(expected_y[None])),
        _relative(_sizes_of(results.outputs.cpu() - expected_outputs), _sizes_of(expected_outputs)),
    ]
    return float(torch.stack(errors).max())


def _sizes_of(tensors: Tensor) -> Tensor:
    """[P], the norms of [P, ...]."""
    return torch.as_tensor(tensors.flatten(1).norm(dim=1))


def _relative(difference: Tensor, expected: Tensor) -> Tensor:
    """[], the largest; where nothing is expected, as of a sample whose ReLUs let nothing through, the difference."""
    return (difference.abs() / expected.where(expected > 0, 1.0)).max()
