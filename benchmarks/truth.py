"""The float64 backward pass that timed code is checked against; it shares no code with any engine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pathnet
from pathnet import scaling
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine, freeze
from pathnet.models import ResidualNet
from pathnet.walks import routed_backward_norms

__all__ = ["Errors", "errors", "gradients", "gradients_through_statistics", "lesioned_outputs", "sample_error"]


def gradients(tape: pathnet.Tape, routing: Tensor) -> Tensor:
    """Return the gradients under routings [P, n, 2] with the tape's ReLU bits and start, float64 [P, B, ...].

    Uses autograd through one block at a time. For fixed bits the network is affine, so any point will do.
    """
    record = tape._record
    bits: list[list[Tensor]] = record.walk.bits()  # type: ignore[attr-defined]
    blocks = list(freeze(record.net, bits).blocks)
    points = [torch.zeros_like(record.y0, dtype=torch.float64)]
    with torch.no_grad():
        for block in blocks[:-1]:
            points.append(torch.zeros_like(block(points[-1])))
    start = scaling.value(record.start.mantissa[None], record.start.exponent[None])[0]
    grads = [start] * len(routing)
    for i in reversed(range(len(blocks))):
        x = points[i].requires_grad_()
        skip, residual = blocks[i].branches(x)  # type: ignore[operator]
        for p, (a, c) in enumerate(routing[:, i].tolist()):
            parts = [
                k * torch.autograd.grad(branch, x, grads[p], retain_graph=True)[0]
                for k, branch in ((a, skip), (c, residual))
                if k != 0
            ]
            grads[p] = sum(parts[1:], parts[0]) if parts else torch.zeros_like(x)
    return torch.stack(grads).detach()


@dataclass(frozen=True)
class Errors:
    """Largest relative errors among paths: those of the batch's norm, of a sample's norm, of a batch's gradient."""

    batch_norm: float
    sample_norm: float
    gradient: float


def errors(tape: pathnet.Tape, routing: Tensor) -> Errors:
    """Compare a tape's norms and gradients under routings [P, n, 2] with float64 backward passes on the same
    record."""
    expected, measured = gradients(tape, routing), tape.routed_gradients(routing)
    expected_norms, norms = expected.flatten(2).norm(dim=2), measured.flatten(2).norm(dim=2)
    batch_norms = expected_norms.norm(dim=1)
    return Errors(
        batch_norm=float((norms.norm(dim=1) / batch_norms - 1).abs().max()),
        sample_norm=float((norms / expected_norms - 1).abs().max()),
        gradient=float(((measured - expected).flatten(1).norm(dim=1) / batch_norms).max()),
    )


def sample_error(tape: pathnet.Tape, routing: Tensor) -> float:
    """Return the largest relative error of a sample's norm, against the reference engine in float64 on the same
    record.

    It works in both BN modes; `gradients` does not, since BN mode ``batch`` is not affine around a record.
    """
    record = tape._record
    expected = gradients_through_statistics(tape, routing).flatten(2).norm(dim=2)
    measured = routed_backward_norms(record, routing)
    return float((measured / expected - 1).abs().max())


def gradients_through_statistics(tape: pathnet.Tape, routing: Tensor) -> Tensor:
    """Return the result of `gradients` by the reference engine, which also differentiates batch statistics."""
    record = tape._record
    recorded: Any = record.walk
    frozen, y0 = freeze(record.net, recorded.bits()), record.y0.double()
    _, reference = ReferenceEngine().prepare(Job(frozen, recorded.bn, "float64", y0.shape[1:], y0.device)).record(y0)
    start = record.start._replace(mantissa=record.start.mantissa.double())
    return scaling.value(*reference.routed_backward(start, routing.double()))


@torch.no_grad()
def lesioned_outputs(net: ResidualNet, images: Tensor, routing: Tensor) -> Tensor:
    """Return outputs of plain forward passes under routings [P, n, 2], float64 [P, B, classes].

    Leaves the network in float64.
    """
    net = net.double().eval()
    outputs = []
    for coefficients in routing.tolist():
        y = net.stem(images.double())
        for block, (a, c) in zip(net.blocks, coefficients, strict=True):
            y = block.join(a * block.skip(y) + c * block.residual(y))  # type: ignore[operator]
        outputs.append(net.head(y))
    return torch.stack(outputs)
