"""Check an engine against the reference, once per process and set of block forms, before first use.

The check runs the kernels that the network itself will run, on a small network of the network's distinct blocks with
random weights. It needs little memory: it uses a few images, smaller than the network's if they run the same kernels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from pathnet import scaling
from pathnet.engines.engine import Engine, Job, Prepared, Walk
from pathnet.engines.forms import post_activation
from pathnet.engines.reference import ReferenceEngine, freeze
from pathnet.models.residual_net import Block, Form, ResidualNet
from pathnet.recording import BatchNormMode, Precision, snapshot
from pathnet.scaling import ScaledGradient

__all__ = ["FusedEngine", "Precompile", "disagreement", "trial_run"]

TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Maximum relative error of a sample's norm."""

MIN_VALUES = 45
"""Minimum number of values per channel in BN mode ``batch``; with fewer, the gradient is mostly rounding error."""

MAX_PIXELS = 128
"""Maximum number of pixels in a tile. Kernels whose tiles hold several small images are compiled for the images'
number of pixels, rounded up to a power of two."""

Precompile = Callable[[Callable[[], object]], object]
"""A function that compiles the kernels a callable will launch, without running them; see
`pathnet.engines.triton.ahead.compile_for`."""

_reasons: dict[Hashable, str | None] = {}
"""The outcomes of this process's checks, by engine, block forms, image shape, BN mode, precision and device."""


class FusedWalk(Walk, Protocol):
    """A record that keeps the ReLU bits."""

    def bits(self) -> list[list[Tensor]]:
        """Return the recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; for post-activation blocks
        the join's bits come last."""


class FusedPrepared(Prepared, Protocol):
    def record(self, y0: Tensor) -> tuple[Tensor, FusedWalk]: ...


class FusedEngine(Engine, Protocol):
    """An engine with its own kernels, which is checked on the ReLU bits that its records keep."""

    def prepare(self, job: Job) -> FusedPrepared: ...


@dataclass(frozen=True)
class _Trial:
    """The input of a check, on the CPU.

    Attributes:
        net: in float32.
        y0: [B, C_0, H_0, W_0]
        start: the scaled gradient at ``y_n``.
        routing: [4, n, 2]
    """

    net: ResidualNet
    bn: BatchNormMode
    y0: Tensor
    start: ScaledGradient
    routing: Tensor


@dataclass(frozen=True)
class _Results:
    """An engine's results on a trial: norms and gradients along routings, forward passes, and ReLU bits."""

    y: Tensor
    bits: list[list[Tensor]]
    norms: Tensor
    gradients: ScaledGradient
    outputs: Tensor


def disagreement(
    engine: FusedEngine, job: Job, precompile: Precompile | None = None, small: bool = True
) -> str | None:
    """Return how the engine disagrees with the reference on the job's block forms, or None; cached per process.

    Args:
        job: the job whose blocks are copied.
        precompile: compiles the engine's kernels before the check runs them.
        small: whether images smaller than the network's may run the same kernels.
    """
    blocks = _distinct(job.net)
    channels, height, width = job.y0_shape
    shape = _small_shape(blocks, job.y0_shape) if small else (channels, height, width)
    key = engine.name, tuple(map(_key_of, blocks)), shape, job.bn, job.precision, job.device
    if key not in _reasons:
        _reasons[key] = _check(engine, _trial(blocks, job.bn, shape), job, precompile)
    return _reasons[key]


def trial_run(engine: FusedEngine, job: Job) -> Callable[[], object]:
    """Return the engine's half of the check as a callable, to compile its kernels ahead of time."""
    blocks = _distinct(job.net)
    trial = _trial(blocks, job.bn, _small_shape(blocks, job.y0_shape))
    return lambda: _run(engine, trial, job)


def _distinct(net: ResidualNet) -> list[Block]:
    """Return the network's blocks, without those that keep the shape and repeat the form of an earlier block."""
    blocks: list[Block] = []
    before: set[Hashable] = set()
    for block in net:
        key, convs = _key_of(block), _form_of(block).convs
        keeps_shape = convs[0].in_channels == convs[-1].out_channels and all(conv.stride[0] == 1 for conv in convs)
        # The first of post-activation blocks has no ReLU before it.
        if not blocks or key not in before or not keeps_shape:
            blocks.append(block)
            if len(blocks) > 1 or not post_activation(net):
                before.add(key)
    return blocks


def _form_of(block: Block) -> Form:
    form = block.form()
    assert form is not None
    return form


def _key_of(block: Block) -> Hashable:
    form = _form_of(block)
    projection = None if form.projection is None else _sizes(form.projection)
    return type(form).__name__, *map(_sizes, form.convs), projection, form.pad, form.pad_before


def _sizes(conv: nn.Conv2d) -> Hashable:
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding


def _small_shape(blocks: Sequence[Block], y0_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (C_0, H, W) of the smallest images, no larger than the network's, that run the same kernels."""
    channels, full_height, full_width = y0_shape
    strides = [conv.stride[0] for block in blocks for conv in _form_of(block).convs]
    classes = _pixel_classes(strides, full_height, full_width)
    for width in range(1, full_width):
        # Not square: an exchange of rows and columns would not be noticed.
        height = min(full_height, -(-3 * width // 4))
        if _pixel_classes(strides, height, width) == classes:
            return channels, height, width
    return channels, full_height, full_width


def _pixel_classes(strides: Sequence[int], height: int, width: int) -> list[int]:
    """Return the number of pixels that the kernels of each convolution are compiled for."""
    classes = []
    for stride in (1, *strides):
        height, width = -(-height // stride), -(-width // stride)
        classes.append(min(MAX_PIXELS, 1 << (height * width - 1).bit_length()))
    return classes


def _trial(blocks: Sequence[Block], bn: BatchNormMode, shape: tuple[int, int, int]) -> _Trial:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        copies = [_randomize(copy.deepcopy(block).cpu()) for block in blocks]
        net = snapshot(ResidualNet(nn.Identity(), copies, nn.Identity()), bn, torch.float32)
        with torch.no_grad():
            out_shape = net(torch.zeros(2, *shape)).shape[1:]
        batch = max(3, -(-MIN_VALUES // math.prod(out_shape[1:]))) if bn == "batch" else 3
        y0, grad, routing = torch.randn(batch, *shape), torch.randn(batch, *out_shape), torch.randn(4, net.n, 2)
        exponent = torch.zeros(batch if bn == "running" else 1, dtype=torch.int32)
    # Both branches, then each branch of each block alone.
    routing[0] = 1.0
    for parity in (0, 1):
        routing[1 + parity, parity::2, 1] = 0.0
        routing[1 + parity, 1 - parity :: 2, 0] = 0.0
    if post_activation(net):
        # A skip alone is above zero: a negative coefficient would leave nothing to compare after the sum's ReLU.
        routing[..., 0].abs_()
    return _Trial(net, bn, y0, ScaledGradient(grad, exponent), routing)


@torch.no_grad()
def _randomize(block: Block) -> Block:
    """Give the block random weights, and statistics that leave no factor at 0 or 1."""
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


def _check(engine: FusedEngine, trial: _Trial, job: Job, precompile: Precompile | None) -> str | None:
    def work() -> _Results:
        return _run(engine, trial, job)

    try:
        if precompile is not None:
            precompile(work)
        error = _largest_error(trial, work())
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:
        return f"its self-check failed ({(str(failure).splitlines() or [type(failure).__name__])[0]})"
    if not error <= TOLERANCE[job.precision]:
        return f"it disagrees with the reference on a small input (relative error {error:.1g} in {job.precision})"
    return None


def _run(engine: FusedEngine, trial: _Trial, job: Job) -> _Results:
    y0, routing = trial.y0.to(job.device), trial.routing
    net = copy.deepcopy(trial.net).to(job.device)
    prepared = engine.prepare(replace(job, net=net, y0_shape=y0.shape[1:]))
    y, walk = prepared.record(y0)
    start = ScaledGradient(*(tensor.to(job.device) for tensor in trial.start))
    return _Results(
        y,
        walk.bits(),
        walk.norms(start, routing),
        walk.routed_backward(start, routing),
        prepared.routed_forward(y0, routing),
    )


def _largest_error(trial: _Trial, results: _Results) -> float:
    """Return the largest relative error of samples' norms and gradients along the routings, and of forward passes;
    NaN where one is NaN."""
    y0, routing, norms = trial.y0.double(), trial.routing.double(), results.norms.cpu()

    def prepared(net: ResidualNet) -> Prepared:
        return ReferenceEngine().prepare(Job(net, trial.bn, "float64", y0.shape[1:], y0.device))

    frozen = freeze(trial.net, [[bit.cpu() for bit in bits] for bits in results.bits])
    expected_y, walk = prepared(frozen).record(y0)
    start = trial.start._replace(mantissa=trial.start.mantissa.double())
    expected = scaling.norms(*walk.routed_backward(start, routing))
    expected_outputs = prepared(copy.deepcopy(trial.net).double()).routed_forward(y0, routing)
    errors = [
        _relative(norms - expected, expected),
        _relative(scaling.norms(*results.gradients).cpu() - expected, expected),
        _relative(_norms_of((results.y.cpu() - expected_y)[None]), _norms_of(expected_y[None])),
        _relative(_norms_of(results.outputs.cpu() - expected_outputs), _norms_of(expected_outputs)),
    ]
    return float(torch.stack(errors).max())


def _norms_of(tensors: Tensor) -> Tensor:
    """Return [P], the norms of [P, ...]."""
    return torch.as_tensor(tensors.flatten(1).norm(dim=1))


def _relative(difference: Tensor, expected: Tensor) -> Tensor:
    """Return [], the largest relative difference; an absolute one where 0 is expected, as for a sample whose ReLUs
    let nothing through."""
    return (difference.abs() / expected.where(expected > 0, 1.0)).max()
