"""The triton engine: BN-ReLU-conv and post-activation blocks of any width, both BN modes, on GPUs that Triton serves.

`plan` compacts routings into rows, `routed_backward` and `routed_forward` launch one kernel a unit for them (`dgrad`,
`forward`), `sums`, `folding`, `statistics` and `endings` finish what batch normalisation needs of a whole batch,
`arrivals` takes gradients and norms out. Kernels are compiled for a network's channels, kernels and strides on their
first use, half a minute for a new network, and kept on disk by Triton; they serve images and batches of any size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.chunks import in_chunks
from pathnet.engines import unfused
from pathnet.engines.self_check import disagreement
from pathnet.engines.tables import blocks_of, post_activation, unsupported_block, unsupported_form
from pathnet.engines.triton.network import TritonNetwork, network_of
from pathnet.engines.triton.state import Kept
from pathnet.models.residual_net import ResidualNet
from pathnet.record import BatchNormMode, BlockRecord, Precision, Prepared

__all__ = [
    "MOST_ELEMENTS",
    "TritonEngine",
    "TritonPrepared",
    "TritonRecord",
    "check_sides",
    "on_device",
    "unsupported_side",
]

ROOM = 4 << 30
"""Bytes for the gradients of one walk: some hundred routings of a CIFAR network at batch 128."""

MOST_ELEMENTS = (1 << 31) - (1 << 16)
"""Of an activation: kernels number its places in int32, those beside it in the last tile too."""

MOST_PIXELS = 1 << 19
"""Of an image's side, for which `tiles.quotient` is exact."""


@dataclass(frozen=True)
class TritonPrepared:
    """A packed network, and its recording passes by the size of the batch."""

    network: TritonNetwork
    recordings: dict[int, Callable[[Tensor], tuple[Tensor, Kept]]] = field(default_factory=dict)


@dataclass(frozen=True)
class TritonRecord:
    """What one forward pass leaves: ReLU bits, in BN mode ``batch`` also normalised activations.

    Attributes:
        last: of a post-activation network, the bits of the last join's ReLU, bool [B, C, H, W].
    """

    network: TritonNetwork
    kept: Kept
    batch: int
    last: Tensor | None = None

    @property
    def bn(self) -> BatchNormMode:
        return self.network.bn

    @property
    def tensors(self) -> Sequence[Tensor]:
        own, kept = self.network, self.kept
        weights = [
            weight
            for block in own.blocks
            for conv in (*block.convolutions, block.projection)
            if conv is not None
            for weight in (conv.weight, conv.transposed, conv.added)
        ]
        everything = kept.bits, kept.normalized, kept.scales, self.last, own.affine, own.statistics, *weights
        return [tensor for tensor in everything if tensor is not None]

    def bits(self) -> list[list[Tensor]]:
        """The recorded ReLU bits, ``[block][ReLU]``, bool [B, C, H, W]; of post-activation blocks the join's last."""
        units = [
            [self._unit_bits(block.first + unit) for unit in range(len(block.convolutions))]
            for block in self.network.blocks
        ]
        if self.last is None:
            return units
        joins = [*(own[0] for own in units[1:]), self.last]
        return [[*own[1:], join] for own, join in zip(units, joins, strict=True)]

    def given(self, grad: Tensor) -> Tensor:
        """What the walks begin with, of the gradient [B, C, H, W] at ``y_n``: what passes the last join."""
        return grad if self.last is None else grad.where(self.last, 0.0)

    def _unit_bits(self, unit: int) -> Tensor:
        given, width = self.network.convolutions[unit].given, -(-self.network.convolutions[unit].given.channels // 8)
        packed = self.kept.unit_bits(unit)[: self.batch * given.pixels * width]
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        whole = bits.reshape(self.batch, given.height, given.width, width * 8)[..., : given.channels]
        return whole.permute(0, 3, 1, 2).bool().contiguous()


class TritonEngine:
    """Triton kernels, compiled at run time."""

    name = "triton"
    device_type: str | None = "cuda"

    def unavailable(self) -> str | None:
        # Kernels are imported on their first use: Triton takes a third of a second.
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            return "this process sees no GPU"
        return None

    def unsupported(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int], device: torch.device
    ) -> str | None:
        if device.type not in ("cuda", "xpu"):
            return f"the network is on {device}"
        if precision == "float64":
            return f'no precision="{precision}"'
        reason = unsupported_form(net, bn) or unsupported_side(net)
        return reason or disagreement(self, bn, precision, device, post=post_activation(net))

    def prepare(
        self, net: ResidualNet, bn: BatchNormMode, precision: Precision, y0_shape: Sequence[int]
    ) -> TritonPrepared:
        return TritonPrepared(network_of(net, bn, precision, y0_shape))

    def record(self, prepared: Prepared, y0: Tensor) -> tuple[Tensor, TritonRecord]:
        from pathnet.engines.triton.recording import recording

        assert isinstance(prepared, TritonPrepared)
        network, batch = prepared.network, len(y0)
        _check_images(network, y0)
        with on_device(y0.device):
            if batch not in prepared.recordings:
                prepared.recordings[batch] = recording(network, y0)
            y, kept = prepared.recordings[batch](y0)
        if not network.post:
            return y, TritonRecord(network, kept, batch)
        return y.relu(), TritonRecord(network, kept, batch, last=y > 0)

    def sums_by_length(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        from pathnet.engines.triton.routed_backward import through_block

        assert isinstance(blocks, TritonRecord)
        magnitudes = blocks.network.magnitudes

        def through(
            index: int, grads: Tensor, exponents: Tensor, ways: Sequence[tuple[float, float]]
        ) -> tuple[Tensor, Tensor]:
            if magnitudes is not None:
                ways, shifts = magnitudes.of_block(index, ways)
                exponents = exponents + shifts.to(exponents.device)[:, None]
            return through_block(blocks.network, blocks.kept, index, grads, exponents, ways)

        with on_device(grad.device):
            return unfused.sums_by_length(through, blocks.given(grad), exponent, routing)

    def sums_by_length_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        return unfused.norms_of(*self.sums_by_length(blocks, grad, exponent, routing))

    def routed_forward(self, prepared: Prepared, y0: Tensor, routing: Tensor) -> Tensor:
        from pathnet.engines.triton.routed_forward import routed_forward

        assert isinstance(prepared, TritonPrepared)
        network = prepared.network
        _check_images(network, y0)
        with on_device(y0.device):
            parts = in_chunks(
                len(routing),
                network.most_states * len(y0) * network.largest * 4,
                lambda part: routed_forward(network, y0, routing[part].tolist()),
                ROOM,
            )
            y = torch.cat([outputs for _, outputs in parts])
        return y.relu_() if network.post else y

    def routed_backward(
        self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor
    ) -> tuple[Tensor, Tensor]:
        from pathnet.engines.triton.routed_backward import routed_backward

        assert isinstance(blocks, TritonRecord)
        routing, shifts = _divided(blocks.network, routing)
        with on_device(grad.device):
            gradients, exponents = routed_backward(
                blocks.network, blocks.kept, blocks.given(grad), exponent, routing.tolist()
            )
        return gradients, exponents if shifts is None else exponents + shifts.to(exponents.device)

    def routed_backward_norms(self, blocks: BlockRecord, grad: Tensor, exponent: Tensor, routing: Tensor) -> Tensor:
        from pathnet.engines.triton.routed_backward import routed_backward_norms

        assert isinstance(blocks, TritonRecord)
        network, kept, grad = blocks.network, blocks.kept, blocks.given(grad)
        norms = torch.empty(len(routing), len(grad), dtype=torch.float64, device=grad.device)
        routing, shifts = _divided(network, routing)
        with on_device(grad.device):
            for part, own in in_chunks(
                len(routing),
                network.most_states * len(grad) * network.largest * network.walk_dtype.itemsize,
                lambda part: routed_backward_norms(network, kept, grad, exponent, routing[part].tolist()),
                ROOM,
            ):
                norms[part] = own
        return (
            norms if shifts is None else scaling.times_power_of_two(norms, shifts.to(norms.device).expand_as(norms))
        )


def _divided(network: TritonNetwork, routing: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the divided network's routing, and int32 [P, 1], the powers of two left out; None where none are."""
    if network.magnitudes is None:
        return routing, None
    routing, shifts = network.magnitudes.of_routing(routing)
    return routing, shifts[:, None]


def unsupported_side(net: ResidualNet) -> str | None:
    """Why the kernels have no form for a network that has tables, or None."""
    for index, block in enumerate(blocks_of(net)):
        form = block.post_activation_form() or block.fused_form()
        reason = None if form is None else unsupported_block(form)
        if reason is not None:
            return f"block {index + 1}: {reason}"
    return None


def _check_images(network: TritonNetwork, y0: Tensor) -> None:
    if len(y0) * network.largest >= MOST_ELEMENTS:
        most = (MOST_ELEMENTS - 1) // network.largest
        raise ValueError(f"images: expected at most {most} for the triton engine, got {len(y0)}")
    check_sides("images", y0)
    pixels = [shape.pixels for shape in network.normalized if shape is not None]
    if network.bn == "batch" and len(y0) == 1 and 1 in pixels:
        raise ValueError("images: expected more than one value a channel for batch statistics, got one")


def check_sides(name: str, images: Tensor) -> None:
    """Refuse images [B, C, H, W] that are too long for the kernels, whatever they are called."""
    if max(images.shape[2:]) > MOST_PIXELS:
        shape = list(images.shape[2:])
        raise ValueError(f"{name}: expected sides of at most {MOST_PIXELS} pixels for the triton engine, got {shape}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
