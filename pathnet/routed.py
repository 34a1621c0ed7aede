"""The primitive: gradients routed through skips and residual modules with two coefficients a block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pathnet.engines import Engine
from pathnet.record import Record

__all__ = ["check_routing", "routed_backward"]

CHUNK_BYTES = 256 << 20


def check_routing(routing: Tensor, n: int) -> None:
    """Raises ValueError unless ``routing`` is a finite floating-point tensor [P, n, 2]."""
    if not isinstance(routing, Tensor) or not routing.is_floating_point():
        raise ValueError(f"routing: expected a floating-point tensor, got {_kind(routing)}")
    if routing.ndim != 3 or routing.shape[1:] != (n, 2):
        raise ValueError(f"routing: expected shape [P, {n}, 2] for {n} blocks, got {list(routing.shape)}")
    if not torch.isfinite(routing).all():
        raise ValueError("routing: expected finite coefficients, got NaN or infinity")


def check_paths(paths: Tensor, n: int) -> None:
    """Raises ValueError unless ``paths`` is an integer or bool tensor [P, n] of zeros and ones."""
    if not isinstance(paths, Tensor) or paths.is_floating_point() or paths.is_complex():
        raise ValueError(f"paths: expected an integer tensor of zeros and ones, got {_kind(paths)}")
    if paths.ndim != 2 or paths.shape[1] != n:
        raise ValueError(f"paths: expected shape [P, {n}] for {n} blocks, got {list(paths.shape)}")
    if not ((paths == 0) | (paths == 1)).all():
        raise ValueError(f"paths: expected zeros and ones, got values {paths.min()} to {paths.max()}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def routed_backward(engine: Engine, record: Record, routing: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The loss gradient at ``y_0`` under every routing, ``g <- a J_skip^T g + c J_residual^T g`` a block.

    Work is cut into chunks of routings, never of samples, so that memory does not grow with their number.

    Args:
        routing: [P, n, 2], the (a, c) of every block, from input to output.

    Yields:
        Which routings; their scaled gradients [p, B, C, H, W] and exponents int32 [p, B] (BN mode ``running``)
        or [p, 1] (``batch``).
    """
    routing = routing.to(record.grad)
    widest = max(tensor.numel() for tensor in (record.y0, record.grad))
    size = max(1, CHUNK_BYTES // max(1, widest * record.grad.element_size()))
    for start in range(0, len(routing), size):
        part = slice(start, min(start + size, len(routing)))
        yield part, *engine.routed_backward(record.blocks, record.grad, record.exponent, routing[part])
