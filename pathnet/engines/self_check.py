"""An engine's check of itself, before its first use on a device in a process: small inputs, against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.reference import ReferenceEngine, freeze
from pathnet.models import preact_resnet, resnet
from pathnet.models.residual_net import ResidualNet
from pathnet.record import BatchNormMode, Precision, snapshot

if TYPE_CHECKING:
    from pathnet.engines import Engine

__all__ = ["disagreement"]

TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far a sample's norm may lie from the reference's."""

_found: dict[tuple[str, BatchNormMode, Precision, torch.device, bool], str | None] = {}


def disagreement(
    engine: Engine, bn: BatchNormMode, precision: Precision, device: torch.device, post: bool = False
) -> str | None:
    """What is wrong with an engine whose record has ``bits()``, or None; found out once a process.

    Args:
        post: whether it is to be tried on post-activation blocks, on pre-activation ones otherwise.
    """
    key = engine.name, bn, precision, device, post
    if key not in _found:
        _found[key] = _check(engine, bn, precision, device, post)
    return _found[key]


def _check(engine: Engine, bn: BatchNormMode, precision: Precision, device: torch.device, post: bool) -> str | None:
    try:
        error = _largest_error(engine, bn, precision, device, post)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:
        return f"its check of itself failed ({(str(failure).splitlines() or [type(failure).__name__])[0]})"
    if not error <= TOLERANCE[precision]:
        return f"it disagrees with the reference on a small input (relative error {error:.1g} in {precision})"
    return None


def _largest_error(
    engine: Engine, bn: BatchNormMode, precision: Precision, device: torch.device, post: bool
) -> float:
    """Of samples' norms and gradients along random routings, and of forward passes; NaN where there is one."""
    generator, errors = torch.Generator().manual_seed(0), []
    for shortcut in ("projection", "pad"):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            net = snapshot((resnet if post else preact_resnet)(20, shortcut=shortcut), bn, torch.float32)
            # Zero at first, which would hide what adds them.
            for name, own in net.named_parameters():
                if name.startswith("blocks.") and name.endswith("bias"):
                    own.normal_(0, 0.3)
        width = net.stem_weight().shape[0]
        # Statistics of a batch want some values a channel, or what they leave of a gradient is rounding.
        batch, side = (5, 12) if bn == "batch" else (3, 8)
        shapes = {
            "y0": (batch, width, side, side),
            "grad": (batch, 4 * width, side // 4, side // 4),
            "routing": (4, net.n, 2),
        }
        y0, grad, routing = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes.values()
        )
        routing[0], routing[1, ::2, 1] = 1.0, 0.0
        if post:
            # Of a skip alone, which is above zero, the sum's ReLU would leave nothing to compare.
            routing[..., 0].abs_()
        errors += _errors(engine, net, bn, (y0, grad, routing), precision, device)
    return float(torch.stack(errors).max())


def _errors(
    engine: Engine,
    net: ResidualNet,
    bn: BatchNormMode,
    given: tuple[Tensor, Tensor, Tensor],
    precision: Precision,
    device: torch.device,
) -> list[Tensor]:
    y0, grad, routing = given
    exponent = torch.zeros(len(y0) if bn == "running" else 1, dtype=torch.int32, device="cpu")
    prepared = engine.prepare(net.to(device), bn, precision, y0.shape[1:])
    y, blocks = engine.record(prepared, y0.to(device))
    start = blocks, grad.to(device), exponent.to(device), routing
    norms, walked = engine.routed_backward_norms(*start).cpu(), engine.routed_backward(*start)
    outputs = engine.routed_forward(prepared, y0.to(device), routing).cpu()

    reference = ReferenceEngine()
    frozen = freeze(net.cpu(), [[bit.cpu() for bit in own] for own in blocks.bits()])  # type: ignore[attr-defined]
    expected_y, inputs = reference.record(reference.prepare(frozen, bn, "float64", y0.shape[1:]), y0.double())
    expected = scaling.norms(*reference.routed_backward(inputs, grad.double(), exponent, routing.double()))
    exact = reference.prepare(net.double(), bn, "float64", y0.shape[1:])
    expected_outputs = reference.routed_forward(exact, y0.double(), routing.double())
    return [
        ((norms - expected).abs() / expected).max(),
        ((scaling.norms(*walked).cpu() - expected).abs() / expected).max(),
        (y.cpu() - expected_y).norm() / expected_y.norm(),
        ((outputs - expected_outputs).flatten(1).norm(dim=1) / expected_outputs.flatten(1).norm(dim=1)).max(),
    ]
