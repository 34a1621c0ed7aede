"""The engine that runs the residual blocks of a training, and the memory layout that it reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pathnet.checks import described, one_of
from pathnet.models.forms import FusedEngine as Engine
from pathnet.models.residual_net import ResidualNet
from pathnet.models.weights import read_tensors

if TYPE_CHECKING:
    from pathnet.nn import FusedNet

__all__ = ["BlockEngine", "Engine", "block_engine", "recorded_engines"]

VECTOR = 8
"""float32 numbers in a vector of AVX2."""


@dataclass(frozen=True)
class BlockEngine:
    """The engine of a training and the network as it runs it.

    Attributes:
        net: the network with its blocks as the engine runs them. It has the parameters of the network it is made of.
        blocks: the engine of each block: ``cpu``, ``triton``, or ``none`` for PyTorch's operators.
        reason: why the first of the latter is not fused; empty if there is none, or nothing is to be fused.
    """

    net: FusedNet
    blocks: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        """The engine of the blocks that run fused; ``none`` if no block does."""
        return next((engine for engine in self.blocks if engine != "none"), "none")

    @property
    def fused(self) -> int:
        """Number of blocks that run fused."""
        return len(self.blocks) - self.blocks.count("none")

    @property
    def line(self) -> str:
        """Line that says what trains the blocks, and why if some are not fused."""
        why = f" ({self.reason})" if self.reason else ""
        if self.fused == 0:
            return f"PyTorch's operators train all {len(self.blocks)} blocks{why}"
        return f"fused kernels of the {self.name} engine train {self.fused} of {len(self.blocks)} blocks{why}"

    @property
    def facts(self) -> dict[str, Any]:
        """Facts on the engine and its blocks, in JSON types."""
        return {"engine": self.name, "fused_blocks": self.fused, "blocks": len(self.blocks)}

    def lay_out(self) -> torch.memory_format:
        """Bring the weights into the layout that their blocks read, and return the layout of the images."""
        layout = _fastest_layout(self.net) if self.name != "cpu" else torch.channels_last
        self.net.to(memory_format=layout)  # type: ignore[call-overload]
        for block, engine in zip(self.net, self.blocks, strict=True):
            if engine == "cpu":
                block.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return layout


def block_engine(net: ResidualNet, engine: Engine, checkpoint: Path | None = None) -> BlockEngine:
    """Return the engine that trains a network on its device.

    ``auto`` is the engine of the checkpoint's last step, so that training goes on with the same bits; without a
    checkpoint, the one that serves the device. A warning tells if none does although it could run the blocks.

    Args:
        net: the network, on the device where it will be trained.
        engine: the engine's name, or ``auto``.
        checkpoint: the training's checkpoint, which need not exist.

    Raises:
        ValueError: there is no engine of that name, it can run none of the network's blocks there, or the checkpoint
            cannot be read.
    """
    one_of("engine", engine, Engine)
    recorded: list[Engine] = []
    if checkpoint is not None and checkpoint.exists():
        recorded = recorded_engines(read_tensors(checkpoint)[1], checkpoint)
    if engine == "auto" and recorded:
        chosen = _run_by(net, recorded[-1])
        if chosen.name == recorded[-1]:
            return chosen
        warnings.warn(
            f"checkpoint: {checkpoint} was trained by the engine {recorded[-1]}, which cannot run here "
            f"({chosen.reason}); training goes on by another, which rounds differently",
            RuntimeWarning,
            stacklevel=2,
        )
    chosen, device = _run_by(net, engine), next(net.parameters()).device.type
    if engine == "auto" and (missing := _missing(device)) in chosen.net.unfused.values():
        warnings.warn(f"training runs PyTorch's operators: {missing}", RuntimeWarning, stacklevel=2)
    if engine not in ("auto", chosen.name):
        raise ValueError(
            f"engine: expected one that can run a block of this network on {device}, got {engine!r} ({chosen.reason})"
        )
    return chosen


def recorded_engines(metadata: Mapping[str, Any], checkpoint: Path) -> list[Engine]:
    """Return the engines that took the steps up to a checkpoint, in order.

    Raises:
        ValueError: the checkpoint names an unknown engine.
    """
    # Checkpoints from before training was fused name none.
    engines = metadata.get("engines", ["none"])
    if not isinstance(engines, list) or not all(engine in ("cpu", "triton", "none") for engine in engines):
        expected = "a list of cpu, triton and none"
        raise ValueError(f"checkpoint: {checkpoint}: engines: expected {expected}, got {described(engines)}")
    return engines


def _run_by(net: ResidualNet, engine: Engine) -> BlockEngine:
    # The kernels' packages take a fifth of a second to import, and describing a training needs none.
    from pathnet.nn import fuse

    fused = fuse(net, engine)
    reasons = {} if engine == "none" else fused.unfused
    return BlockEngine(fused, fused.engines, next((f"block {i}: {why}" for i, why in reasons.items()), ""))


def _missing(device: str) -> str:
    """Return why no engine runs on a type of device, or nothing if one does."""
    from pathnet.nn.serving import serving

    return serving("auto", device)[1]


def _fastest_layout(net: ResidualNet) -> torch.memory_format:
    """Return channels_last where PyTorch's operators are faster by it: where channels fill whole vectors."""
    convolutions = (module for block in net for module in block.modules() if isinstance(module, nn.Conv2d))
    fill_vectors = all(convolution.in_channels % VECTOR == 0 for convolution in convolutions)
    return torch.channels_last if fill_vectors else torch.contiguous_format
