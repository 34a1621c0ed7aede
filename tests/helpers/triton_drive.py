"""Records, passes and training steps that launch the triton engine's kernels, for `triton_recorder`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from helpers.triton_recorder import RECORDER
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.packing import block_network, network_of, norm_tensors
from pathnet.engines.triton.recording import plan_recording, recorded
from pathnet.engines.triton.routed_backward import routed_backward, routed_backward_norms
from pathnet.engines.triton.routed_forward import routed_forward
from pathnet.engines.triton.steps import steps_backward, steps_forward
from pathnet.engines.triton.training import block_backward, block_forward, saved_for
from pathnet.models import PreactBlock, ResidualNet, preact_resnet, resnet
from pathnet.models.residual_net import Block, FusedForm
from pathnet.recording import BatchNormMode, Precision

__all__ = ["alone", "drive", "record", "walk"]

BATCH = 4

Routing = list[list[tuple[float, float]]]


def drive() -> None:
    """Launch all kernels that are to be compiled.

    In a backward pass, launches in BN mode ``batch`` use the most registers, those that end both branches above all.
    ``deep`` has every form of them for three widths; ``shallow``, without stride-1 blocks after the first stage,
    suffices for the other modes, and single blocks for post-activation ones. A forward pass multiplies float32 in any
    precision, and uses the most registers where it saves x_hat, as in training.
    """
    deep, shallow, pad = preact_resnet(14), preact_resnet(8), preact_resnet(8, shortcut="pad")
    walk(deep, 32, "batch", "bfloat16", both)
    walk(shallow, 32, "batch", "bfloat16", alone)
    walk(deep, 32, "batch", "float32", both)
    walk(shallow, 32, "running", "bfloat16", both)
    walk(last(shallow), 16, "running", "float32", both)
    walk(last(pad), 16, "batch", "bfloat16", both)
    walk(last(pad), 16, "batch", "float32", alone)
    walk(wide(), 56, "batch", "bfloat16", both)
    walk(wide(), 56, "batch", "float32", both)
    route(packed(last(pad), 16, "running", "float32"), both)
    route(packed(last(pad), 16, "running", "float32"), alone)
    route(packed(last(shallow), 16, "batch", "float32"), alone)
    record(last(shallow), 16, "running", "float32")
    walk(last(resnet(14)), 8, "running", "bfloat16", both)
    walk(last(resnet(14)), 8, "running", "float32", both)
    walk(last(resnet(8)), 16, "running", "bfloat16", both)
    route(packed(last(resnet(8)), 16, "running", "float32"), alone)
    record(last(resnet(8, shortcut="projection")), 16, "running", "float32")
    walk(last(resnet(8, shortcut="projection")), 16, "batch", "bfloat16", both)
    walk(last(resnet(8)), 16, "batch", "float32", both)
    route(packed(last(resnet(8)), 16, "batch", "float32"), alone)
    record(last(resnet(8, shortcut="projection")), 16, "batch", "bfloat16")
    train(list(shallow), 32, torch.bfloat16)
    train(list(shallow), 32, torch.float32)
    train(list(last(shallow).eval()), 16, torch.bfloat16)


def last(net: ResidualNet) -> ResidualNet:
    """Return a network of the last block alone."""
    *_, block = net
    return ResidualNet(torch.nn.Conv2d(3, 1, 1), [block], torch.nn.Identity())


def wide() -> ResidualNet:
    """Return blocks as wide as the widest tile, or wider; the second begins ResNet-50's second stage."""
    blocks: list[Block] = [
        PreactBlock(64, (3, 3), (256, 256), 2, "projection"),
        PreactBlock(256, (1, 3, 1), (128, 128, 512), 2, "projection"),
    ]
    return ResidualNet(torch.nn.Conv2d(3, 64, 1), blocks, torch.nn.Identity())


def both(n: int) -> Routing:
    return [[(0.5, 0.7)] * n]


def alone(n: int) -> Routing:
    """Return routings through residual modules alone, and through skips, launched where a block changes its shape."""
    return [[(0.0, 1.0)] * n, [(1.0, 0.0)] * n]


def packed(net: ResidualNet, side: int, bn: BatchNormMode, precision: Precision) -> TritonNetwork:
    return network_of(net, bn, precision, (channels_of(net), side, side))


def channels_of(net: ResidualNet) -> int:
    """Return the channels of ``y_0``."""
    block = next(iter(net))
    form = block.form()
    assert form is not None
    return form.convs[0].in_channels


def record(net: ResidualNet, side: int, bn: BatchNormMode, precision: Precision, batch: int = BATCH) -> None:
    network = packed(net, side, bn, precision)
    y0 = images(network, batch)
    recorded(network, plan_recording(network), y0)


def route(network: TritonNetwork, routing: Callable[[int], Routing]) -> None:
    steps = steps_forward(network.blocks, np.array(routing(len(network.blocks))))
    routed_forward(network, images(network), steps)


def images(network: TritonNetwork, batch: int = BATCH) -> torch.Tensor:
    shape = network.blocks[0].input
    return torch.ones(batch, shape.channels, shape.height, shape.width)


def walk(
    net: ResidualNet,
    side: int,
    bn: BatchNormMode,
    precision: Precision,
    routing: Callable[[int], Routing],
    batch: int = BATCH,
) -> None:
    """Run backward passes, without noting the kernels of the record before them."""
    network = packed(net, side, bn, precision)
    RECORDER.listening = False
    y, saved = recorded(network, plan_recording(network), images(network, batch))
    RECORDER.listening = True
    steps = steps_backward(network.blocks, np.array(routing(len(network.blocks))))
    exponent = torch.zeros(batch if bn == "running" else 1).int()
    routed_backward(network, saved, torch.ones_like(y), exponent, steps)
    routed_backward_norms(network, saved, torch.ones_like(y), exponent, steps)


def train(blocks: list[Block], side: int, dtype: torch.dtype) -> None:
    """Run each block forward, and back to its input and parameters; in evaluation with running statistics."""
    for block in blocks:
        form = block.form()
        assert isinstance(form, FusedForm)
        convolutions = [unit.conv for unit in form.units]
        x = torch.ones(BATCH, convolutions[0].in_channels, side, side, dtype=dtype)
        network = block_network(
            x.shape[1:],
            dtype,
            [conv.weight for conv in convolutions + ([] if form.projection is None else [form.projection])],
            [tensor for unit in form.units for tensor in norm_tensors(unit, block.training)],
            [conv.stride[0] for conv in convolutions],
            [unit.bn.eps for unit in form.units],
        )
        with torch.no_grad():
            result = block_forward(network, x, 1.0, 1.0)
            saved = saved_for(network, BATCH, result.bits, result.normalized, result.scales)
            block_backward(network, saved, result.output, 1.0, 1.0)
        side = result.output.shape[-1]
