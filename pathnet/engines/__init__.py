"""The engines, fastest first, and which of them serves a given job. An engine changes nothing but the time."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor

from pathnet.engines.cpu import CpuEngine
from pathnet.engines.reference import ReferenceEngine
from pathnet.models.residual_net import ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision

__all__ = ["ENGINES", "Engine", "available", "choose"]


class Engine(Protocol):
    """One way to walk gradients back through recorded blocks."""

    name: str

    def unavailable(self) -> str | None:
        """Why the engine cannot be used in this process, or None."""

    def unsupported(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, device: torch.device
    ) -> str | None:
        """What of the job the engine has no form for, or None."""

    def record(self, net: ResidualNet, y0: Tensor) -> tuple[Tensor, BlockRecord]:
        """``y_n`` and what the walks back need, from ``y_0`` [B, C_0, H_0, W_0]."""

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, once for every routing.

        Args:
            grad, exponent: the scaled gradient at ``y_n``: [B, ...] and int32 [B] or [1].
            routing: [P, n, 2], the (a, c) of every block.

        Returns:
            The scaled gradients at ``y_0``: [P, B, ...] and int32 [P, B] or [P, 1].
        """


ENGINES: tuple[Engine, ...] = (CpuEngine(), ReferenceEngine())


def available() -> dict[str, str | None]:
    """Every engine's name, fastest first, with None where it is usable here and otherwise the reason."""
    return {engine.name: engine.unavailable() for engine in ENGINES}


def choose(name: str, net: ResidualNet, bn: BatchNormMode, precision: Precision, device: torch.device) -> Engine:
    """The engine of that name, or for ``auto`` the fastest that serves the job (with a warning if it is not the
    fastest there is).

    Raises:
        ValueError: there is no such engine, or it cannot serve this job.
    """
    names = [engine.name for engine in ENGINES]
    if name != "auto" and name not in names:
        raise ValueError(f"engine: expected auto, {', '.join(names)}, got {name!r}")
    refusals: list[str] = []
    for engine in ENGINES:
        if name not in ("auto", engine.name):
            continue
        reason = engine.unavailable() or engine.unsupported(net, bn, precision, device)
        if reason is None:
            if refusals and precision != "float64":
                warnings.warn(
                    f"engine {engine.name} serves, since {'; '.join(refusals)}", RuntimeWarning, stacklevel=3
                )
            return engine
        refusals.append(f"{engine.name}: {reason}")
    raise ValueError(f"engine: {name!r} cannot serve this job ({'; '.join(refusals)})")
