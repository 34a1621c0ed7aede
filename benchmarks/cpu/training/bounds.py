"""The operations and the memory traffic of a training step, and the processor's rates for both."""

from __future__ import annotations

import time

import torch

from benchmarks.cases import module_flops
from benchmarks.cpu.peaks import Peaks
from benchmarks.outcome import Findings
from pathnet.models import ResidualNet

__all__ = ["bounds"]

CONVOLUTIONS = 3
"""Convolutions of a step for each of the forward pass: the output, the input gradient and the weight gradient."""
PASSES = 17
"""Times that a fused block with an identity skip reads or writes an activation; counted in
csrc/cpu/training/backward.h."""
COPIED_BYTES = 1 << 28
COPIES = 5


def bounds(net: ResidualNet, images: int, side: int, seconds: float) -> Findings:
    """Return operations and bytes of a step through fused blocks, and peak rates in operations and bytes a second.

    Operations are those of the blocks' direct convolutions; minimal filtering needs fewer. Bytes are those of a
    block's activations in float32, as if all blocks had identity skips; in bfloat16 they are half as many.

    Args:
        images: number of images of the batch.
        side: side of the blocks' inputs.
        seconds: time to measure each rate for.
    """
    flops = sum(residual + skip for residual, skip in module_flops(net, side))
    peaks = Peaks.compile()
    return {
        "operations": CONVOLUTIONS * flops * images,
        "bytes": PASSES * 4 * images * _activations(net, side),
        "peak_flops_per_s": None if peaks.fma is None else peaks.fma(seconds),
        "copied_bytes_per_s": _copying_rate(seconds),
    }


def _activations(net: ResidualNet, side: int) -> int:
    """Return the number of elements of all blocks' outputs for one image."""
    elements = 0
    for block in net:
        form = block.form()
        assert form is not None
        for conv in form.convs:
            side = -(-side // conv.stride[0])
        elements += form.convs[-1].out_channels * side * side
    return elements


def _copying_rate(seconds: float) -> float:
    """Return bytes read and written a second by the fastest copy of an array beyond the caches."""
    # The rehearsal copies little.
    source = torch.ones(int(COPIED_BYTES * min(1.0, 2 * seconds)), dtype=torch.uint8)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * source.numel() / fastest
