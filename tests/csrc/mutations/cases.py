"""The networks on which mutated kernels are judged, with float64 truths: few, small, of every form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.engines.cuda import _padded_affine
from pathnet.engines.tables import tables
from pathnet.models import PostactBlock, PreactBlock, ResidualNet

# widths: channels of y0 and of y after each block; skip: where the shape changes, by default projection;
# size: height, width, batch; post: post-activation blocks, y being their sums. With the shared memory below, thread
# blocks own several samples, the last of them fewer, images are resident or windowed, and weights are copied whole,
# by columns and by taps.
CASES: list[dict[str, Any]] = [
    {"widths": [16, 16, 32, 32, 64, 64], "strides": [1, 2, 1, 2, 1], "size": (9, 11, 3)},
    {"widths": [7, 7, 24, 30, 30], "strides": [1, 2, 1, 1], "skip": "pad_around", "size": (10, 5, 3)},
    {"widths": [32, 32, 48, 48], "strides": [1, 1, 1], "size": (12, 7, 3)},
    {"widths": [16, 16, 16], "strides": [2, 1], "skip": "pad", "size": (17, 24, 5)},
    {"widths": [64, 64], "strides": [1], "size": (8, 8, 5)},
    {"widths": [32, 32], "strides": [1], "size": (16, 16, 3)},
    {"widths": [16, 20], "strides": [2], "size": (9, 1, 2)},
    {"widths": [16, 16, 16, 27, 27], "strides": [1, 1, 2, 1], "skip": "pad_around", "size": (9, 11, 3), "post": True},
    {"widths": [12, 20, 20, 20, 40], "strides": [2, 1, 1, 1], "size": (17, 10, 3), "post": True},
    {"widths": [16, 16, 24], "strides": [1, 2], "size": (21, 9, 2)},
    {"widths": [20, 20, 40], "strides": [1, 2], "skip": "pad", "size": (18, 6, 3), "post": True},
    {"widths": [33, 33], "strides": [1], "skip": "pad", "size": (11, 9, 3)},
    {"widths": [16, 16, 24], "strides": [1, 2], "size": (21, 9, 2)},
]
H100 = 232_448
# Shared memory of a thread block: backward with one and with two terms per number, and forward.
SHARED = [
    [64_000, 124_000, H100],
    [36_000, 70_000, H100],
    [140_000, 232_448, H100],
    [64_000, 124_000, H100],
    [92_000, 180_000, H100],
    [124_000, 180_000, H100],
    [36_000, 70_000, H100],
    [64_000, 124_000, H100],
    [124_000, 222_000, H100],
    [24_000, 50_000, 18_000],
    [33_000, 36_000, 28_000],
    [33_000, 56_000, 39_000],
    [45_000, 58_000, 44_000],
]


def write(file: Path) -> None:
    """Write all cases and their truths to one .npz file."""
    arrays: dict[str, Any] = {"count": len(CASES)}
    for i, (case, shared) in enumerate(zip(CASES, SHARED, strict=True)):
        for key, value in _case(i, case, shared).items():
            arrays[f"{i}/{key}"] = value
    np.savez(file, **arrays)


def _case(seed: int, case: dict[str, Any], shared: list[int]) -> dict[str, Any]:
    torch.manual_seed(seed)
    widths = case["widths"]
    post = case.get("post", False)
    kind = PostactBlock if post else PreactBlock
    blocks = [
        kind(before, (3, 3), (after, after), stride, case.get("skip", "projection"))  # type: ignore[arg-type]
        for before, after, stride in zip(widths[:-1], widths[1:], case["strides"], strict=True)
    ]
    for block in blocks:
        for bn in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, 0, 0.3)
            nn.init.normal_(bn.running_mean, 0, 0.3)
            nn.init.uniform_(bn.running_var, 0.5, 2.0)
        for conv in block.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net = ResidualNet(nn.Identity(), blocks, nn.Identity()).eval()
    height, width, batch = case["size"]
    y0, n = torch.randn(batch, widths[0], height, width), len(blocks)
    plan = tables(net, "running", y0.shape[1:])
    result: dict[str, Any] = {
        "blocks": plan.blocks.numpy(),
        "units": plan.units.numpy(),
        "weights": plan.weights.numpy(),
        "scales": plan.scales.numpy(),
        "affine": _padded_affine(plan).numpy(),
        "shared_bytes": np.array(shared),
        "y0": y0.numpy(),
    }
    net.double()
    forward_routing = torch.randn(3, n, 2)
    forward_routing[0, :, 1] = 0
    forward_routing[1, ::2, 1] = 0
    forward_routing[2, 1::2, 0] = 0
    with torch.no_grad():
        y, masks = y0.double(), []
        for index, block in enumerate(blocks):
            if post:
                # The network's input passes unmasked.
                first = y if index else torch.ones_like(y)
                second = block.bns[0](block.convs[0](_entering(index, y)))
            else:
                first = block.bns[0](y)
                second = block.bns[1](block.convs[0](first.relu()))
            for unit, z in enumerate((first, second)):
                result[f"bits_{index}_{unit}"] = (z > 0).numpy()
                result[f"sure_{index}_{unit}"] = (z.abs() > 1e-3 * z.abs().mean()).numpy()
            masks.append([(first > 0).double(), (second > 0).double()])
            x = _entering(index, y) if post else y
            y = block.skip(x) + block.residual(x)
        result["recorded"] = y.numpy()
        outputs = [_forward(blocks, post, y0.double(), routing) for routing in forward_routing.double()]
    result["forward_routing"] = forward_routing.numpy()
    result["outputs"] = torch.stack(outputs).numpy()
    grad, exponent = torch.randn(y.shape), torch.arange(batch, dtype=torch.int32) * 7 - 9
    routing = torch.randn(5, n, 2)
    codes = torch.randint(0, 2, (2, n)).float()
    routing[0] = torch.stack([torch.ones(n), torch.zeros(n)], 1)
    routing[1:3] = torch.stack([1 - codes, codes], 2)
    routing[3, ::2, 1] = 0
    gradients = [_backward(blocks, post, masks, y0, grad.double(), path) for path in routing.double()]
    result["grad"], result["exponent"], result["routing"] = grad.numpy(), exponent.numpy(), routing.numpy()
    result["gradients"] = torch.stack(gradients).numpy() * 2.0 ** exponent.double().numpy()[:, None, None, None]
    shapes = any(block.pad or block.projection is not None for block in blocks)
    result["changed"] = ((routing != torch.tensor([1.0, 0.0])).flatten(1).any(1) | shapes | post).numpy()
    return result


def _entering(index: int, y: Tensor) -> Tensor:
    """Return a post-activation block's input, given the sum before it."""
    return y.relu() if index else y


def _forward(blocks: Sequence[Any], post: bool, y: Tensor, routing: Tensor) -> Tensor:
    for index, (block, (a, c)) in enumerate(zip(blocks, routing, strict=True)):
        x = _entering(index, y) if post else y
        y = a * block.skip(x) + c * block.residual(x)
    return y


def _backward(
    blocks: Sequence[Any], post: bool, masks: list[list[Tensor]], y0: Tensor, grad: Tensor, routing: Tensor
) -> Tensor:
    """Return the input gradient by autograd through the blocks' linear maps at the recorded point."""
    x = torch.zeros(y0.shape, dtype=torch.float64, requires_grad=True)
    y: Tensor = x
    for block, (first, second), (a, c) in zip(blocks, masks, routing, strict=True):
        if post:
            y = entered = y * first
            residual = _scaled(block.bns[1], block.convs[1](_scaled(block.bns[0], block.convs[0](y)) * second))
        else:
            entered = _scaled(block.bns[0], y) * first
            residual = block.convs[1](_scaled(block.bns[1], block.convs[0](entered)) * second)
        if block.projection is not None:
            skip = block.projection(entered)
            skip = _scaled(block.projection_bn, skip) if post else skip
        elif block.pad:
            around = block.pad_before, block.extra_channels - block.pad_before
            skip = F.pad(y[:, :, :: block.stride, :: block.stride], (0, 0, 0, 0, *around))
        else:
            skip = y
        y = a * skip + c * residual
    (grad_input,) = torch.autograd.grad(y, x, grad)
    return grad_input


def _scaled(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert bn.running_var is not None
    return x * (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None]
