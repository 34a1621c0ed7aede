"""The engines, fastest first, and which of them serves a given job. An engine changes nothing but the time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pathnet.checks import check_integers, described, one_of
from pathnet.engines.cpu import CpuEngine
from pathnet.engines.cuda import CudaEngine
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.triton import TritonEngine
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.recording import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = ["ENGINES", "Engine", "available", "check_engine", "choose"]


class Engine(Protocol):
    """One way to walk gradients back through recorded blocks, and batches forward through routed ones."""

    name: str
    device_type: str | None
    """``cpu`` or ``cuda`` where the engine is made for networks on such a device; None for any."""

    def unavailable(self) -> str | None:
        """Why the engine cannot be used in this process, or None."""

    def unsupported(
        self,
        net: ResidualNet,
        bn: BatchNormMode,
        precision: Precision,
        y0_shape: Sequence[int],
        device: torch.device,
    ) -> str | None:
        """What of the job the engine has no form for, or None. ``y0_shape`` is (C_0, H_0, W_0)."""

    def prepare(self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]) -> Prepared:
        """What all passes need of a network that will not change any more, for inputs of blocks of that shape."""

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, BlockRecord]:
        """``y_n`` and what the walks back need, from ``y_0`` [B, C_0, H_0, W_0]."""

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, once for every routing.

        Args:
            grad, exponent: the scaled gradient at ``y_n``: [B, ...] and int32 [B] or [1].
            routing: [P, n, 2], the (a, c) of every block, on any device.

        Returns:
            The scaled gradients at ``y_0``: [P, B, ...] and int32 [P, B] or [P, 1].
        """

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        """float64 [P, B]: the norms of the samples' slices of what `routed_backward` gives, in bounded memory."""

    def sums_by_length(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The coefficients by powers of x of ``prod_i (a_i J_skip^T + x c_i J_residual^T) g``, in one walk.

        With ones, coefficient k is the sum of the gradients of all paths of length k.

        Args:
            grad, exponent: as for `routed_backward`.
            routing: [n, 2], the (a, c) of every block, on any device.

        Returns:
            The scaled coefficients at ``y_0``: [n + 1, B, ...] and int32 [n + 1, B] or [n + 1, 1].
        """

    def sums_by_length_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        """float64 [n + 1, B]: the norms of the samples' slices of what `sums_by_length` gives."""

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        """``y <- join(a skip(y) + c residual(y))`` from the first block to the last, once for every routing.

        Args:
            y0: [B, C_0, H_0, W_0]
            routing: [P, n, 2] with P >= 1, the (a, c) of every block, on any device.

        Returns:
            [P, B, *y_n.shape[1:]]
        """


ENGINES: tuple[Engine, ...] = (CudaEngine(), TritonEngine(), CpuEngine(), ReferenceEngine())


def available() -> dict[str, str | None]:
    """Every engine's name, fastest first, with None where it is usable here and otherwise the reason."""
    return {engine.name: engine.unavailable() for engine in ENGINES}


def check_engine(name: str, value: object) -> None:
    """Raise ValueError, which calls the argument ``name``, unless ``value`` is ``auto`` or the name of an engine."""
    names = [engine.name for engine in ENGINES]
    if not isinstance(value, str) or value not in ("auto", *names):
        raise ValueError(f"{name}: expected auto, {', '.join(names)}, got {described(value)}")


def _convolves(net: ResidualNet) -> bool:
    return any(isinstance(module, nn.Conv2d) for block in net for module in block.modules())


def choose(
    name: str,
    net: ResidualNet,
    bn: BatchNormMode,
    precision: Precision,
    y0_shape: Sequence[int],
    device: torch.device,
) -> Engine:
    """The engine of that name, or for ``auto`` the fastest that serves the job.

    With a warning where it is not the fastest there is for the device, and something could be done about that: not of
    networks without convolutions in their blocks (transformers), for which faster engines have no form at all.

    Args:
        y0_shape: (C_0, H_0, W_0) of the first block's input.

    Raises:
        ValueError: there is no such engine, or it cannot serve this job.
    """
    check_engine("name", name)
    check_net(net)
    one_of("bn", bn, BatchNormMode)
    one_of("precision", precision, Precision)
    check_integers("y0_shape", y0_shape, 0)
    if not isinstance(device, torch.device):
        raise ValueError(f"device: expected a torch.device, got {described(device)}")
    refusals: list[str] = []
    expected: list[str] = []
    for engine in ENGINES:
        if name not in ("auto", engine.name):
            continue
        reason = engine.unavailable() or engine.unsupported(net, bn, precision, y0_shape, device)
        if reason is None:
            if expected and precision != "float64" and _convolves(net):
                warnings.warn(
                    f"engine {engine.name} serves, since {'; '.join(expected)}", RuntimeWarning, stacklevel=3
                )
            return engine
        if engine.device_type in (None, device.type):
            expected.append(f"{engine.name}: {reason}")
        refusals.append(f"{engine.name}: {reason}")
    raise ValueError(f"engine: {name!r} cannot serve this job ({'; '.join(refusals)})")
