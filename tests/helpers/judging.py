"""Judgement of an engine's passes by the reference, on the same record; random networks for the cuda engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pathnet
from helpers.cases import random_shortcut, shaken
from helpers.oracles import relative_error
from helpers.tolerances import (
    BFLOAT16_BATCH_NORM,
    BFLOAT16_GRADIENT,
    BFLOAT16_SAMPLE_NORM,
    FLOAT32_BATCH_NORM,
    FLOAT32_SAMPLE_NORM,
)
from pathnet import scaling
from pathnet.engines.engine import Job, Walk
from pathnet.engines.reference import ReferenceEngine, freeze
from pathnet.models import PostactBlock, PreactBlock, ResidualNet
from pathnet.scaling import ScaledGradient

TOLERANCES = {
    "float32": (FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM, FLOAT32_SAMPLE_NORM),
    "bfloat16": (BFLOAT16_BATCH_NORM, BFLOAT16_SAMPLE_NORM, BFLOAT16_GRADIENT),
}
"""Tolerances of a batch's norm, a sample's norm, and a sample's gradient, by precision."""


def reference_walk(tape: pathnet.Tape) -> tuple[Walk, ScaledGradient]:
    """Return the reference's record with the tape's ReLU bits, in float64, and the tape's gradient at ``y_n``."""
    record = tape._record
    recorded: Any = record.walk
    frozen, y0 = freeze(record.net, recorded.bits()), record.y0.double()
    _, walk = ReferenceEngine().prepare(Job(frozen, recorded.bn, "float64", y0.shape[1:], y0.device)).record(y0)
    return walk, record.start._replace(mantissa=record.start.mantissa.double())


def truth(tape: pathnet.Tape, routing: Tensor) -> ScaledGradient:
    """Return the reference's scaled pass on the tape's ReLU bits and incoming gradient."""
    walk, start = reference_walk(tape)
    return walk.routed_backward(start, routing.to(tape._record.start.mantissa).double())


def truth_sums(tape: pathnet.Tape, routing: Tensor) -> ScaledGradient:
    """Return the scaled sums by length under one routing [n, 2].

    For small networks they are sums over all paths; for others the reference runs on the tape's record.
    """
    if tape.n > 6:
        walk, start = reference_walk(tape)
        return walk.sums_by_length(start, routing.double())
    codes = pathnet.paths.enumerate_all(tape.n)
    grad, exponent = truth(tape, pathnet.paths.routing(codes) * routing.double().cpu())
    every, lengths = scaling.value(grad, exponent), codes.sum(1)
    sums = torch.stack([every[lengths == k].sum(0) for k in range(tape.n + 1)])
    return ScaledGradient(sums, exponent.new_zeros(len(sums), exponent.shape[1]))


def check_sums(tape: pathnet.Tape, routing: Tensor, precision: str) -> None:
    """Check each sample's sum of each length as a vector, and its norm, with the tolerance of the paths."""
    walk, start, tolerance = tape._record.walk, tape._record.start, TOLERANCES[precision][2]
    routing_here = routing.to(start.mantissa)
    sums, norms = walk.sums_by_length(start, routing_here), walk.sums_by_length_norms(start, routing_here)
    torch.testing.assert_close(norms, scaling.norms(*sums), rtol=1e-6, atol=0)
    actual, expected = scaling.value(*sums), scaling.value(*truth_sums(tape, routing))
    assert actual.shape[0] == tape.n + 1
    for measured, true in zip(actual.flatten(0, 1), expected.flatten(0, 1), strict=True):
        # Of a size whose squares stay in range.
        size = true.abs().max().where(true.any(), 1.0)
        assert relative_error(measured / size, true / size) < tolerance


def check(tape: pathnet.Tape, routing: Tensor, precision: str, gradients: bool = True) -> tuple[Tensor, Tensor]:
    """Check norms and, with ``gradients``, gradients of every sample; return the norms and the expected norms."""
    grad, exponent = truth(tape, routing)
    expected = scaling.norms(grad, exponent)
    _, sample_tolerance, gradient_tolerance = TOLERANCES[precision]
    walk, start = tape._record.walk, tape._record.start
    norms = walk.norms(start, routing.to(start.mantissa))
    torch.testing.assert_close(norms, expected, rtol=sample_tolerance, atol=0)
    if not gradients:
        return norms, expected
    walked = walk.routed_backward(start, routing.to(start.mantissa))
    torch.testing.assert_close(scaling.norms(*walked), norms, rtol=1e-6, atol=0)
    # As mantissas, whose squares stay in range.
    measured = scaling.value(walked.mantissa, walked.exponent - exponent)
    for measured_grad, true_grad in zip(measured.flatten(0, 1), grad.flatten(0, 1), strict=True):
        assert relative_error(measured_grad, true_grad) < gradient_tolerance
    return norms, expected


def random_basic_net(seed: int, smallest: int = 1, post: bool = False) -> tuple[ResidualNet, Tensor, Tensor]:
    """Return one to five basic blocks with any width up to 64, strides and skips; images; labels.

    Sides begin at ``smallest``, and tiles divide few of them; thread blocks of one to eight samples do not divide the
    batches.

    Args:
        post: whether they are post-activation blocks, whose first input comes out of a ReLU or does not.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels = int(rng.choice([1, 8, 16, 17, 32, 33, 48]))
    stem: nn.Module = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    if post and seed % 2:
        stem = nn.Sequential(stem, nn.ReLU())
    kind, blocks = PostactBlock if post else PreactBlock, []
    for _ in range(rng.integers(1, 6)):
        out = channels if rng.random() < 0.5 else min(64, channels + int(rng.integers(0, 40)))
        stride = 2 if rng.random() < 0.35 else 1
        shortcut = random_shortcut(rng, 0.4)
        blocks.append(kind(channels, (3, 3), (out, out), stride, shortcut))  # type: ignore[arg-type]
        channels = out
    activation = [] if post else [nn.BatchNorm2d(channels), nn.ReLU()]
    head = nn.Sequential(*activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    largest = 19 if channels <= 32 else 11
    height, width = (int(side) for side in rng.integers(smallest, largest + 1, 2))
    batch = int(rng.choice([1, 2, 3, 9 if height * width <= 80 else 5]))
    images = torch.randn(batch, 3, height, width)
    return shaken(ResidualNet(stem, blocks, head)).eval(), images, torch.randint(0, 5, (batch,))


def random_routings(n: int, seed: int) -> Tensor:
    """Return float64 [5, n, 2]: the paths of length 0 and n, a random path, and general coefficients."""
    rng = np.random.default_rng(seed)
    codes = np.stack([np.zeros(n), np.ones(n), rng.integers(0, 2, n)])
    routing = np.concatenate([np.stack([1 - codes, codes], 2), rng.normal(size=(2, n, 2))])
    routing[3, ::2, 1] = 0
    return torch.from_numpy(routing)


@torch.no_grad()
def reference_outputs(net: ResidualNet, images: Tensor, routing: Tensor) -> list[Tensor]:
    outputs = []
    for path in routing.double().tolist():
        y = net.stem(images.double())
        for block, (a, c) in zip(net.blocks, path, strict=True):
            y = block.join(a * block.skip(y) + c * block.residual(y))
        outputs.append(net.head(y))
    return outputs
