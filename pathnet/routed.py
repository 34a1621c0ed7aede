"""The primitive: gradients, or a forward pass, routed through skips and residuals by two coefficients a block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pathnet.chunks import in_chunks
from pathnet.engines import Engine
from pathnet.record import Prepared, Record

__all__ = ["check_paths", "check_routing", "routed_backward", "routed_backward_norms", "routed_forward"]


def check_routing(routing: Tensor, n: int, parts: int = 2) -> None:
    """Raises ValueError unless ``routing`` is a finite floating-point tensor [P, n, 2], or [P, n, parts]."""
    if not isinstance(routing, Tensor) or not routing.is_floating_point():
        raise ValueError(f"routing: expected a floating-point tensor, got {_kind(routing)}")
    if routing.ndim != 3 or routing.shape[1] != n or routing.shape[2] not in (2, parts):
        shapes = " or ".join(f"[P, {n}, {columns}]" for columns in sorted({2, parts}))
        raise ValueError(f"routing: expected shape {shapes} for {n} blocks, got {list(routing.shape)}")
    if not torch.isfinite(routing.float()).all():
        raise ValueError(
            "routing: expected coefficients that are finite in float32, got NaN, infinity or larger ones"
        )


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
    routing = routing.to(record.grad.dtype)
    for part, (grad, exponent) in in_chunks(
        len(routing),
        max(record.y0_shape.numel() * record.grad.element_size(), record.grad.nbytes),
        lambda part: engine.routed_backward(record.blocks, record.grad, record.exponent, routing[part]),
    ):
        yield part, grad, exponent


def routed_backward_norms(engine: Engine, record: Record, routing: Tensor) -> Tensor:
    """float64 [P, B], on the record's device: the norms of the samples' slices of what `routed_backward` yields.

    Args:
        routing: [P, n, 2], the (a, c) of every block, from input to output.
    """
    routing, batch = routing.to(record.grad.dtype), len(record.grad)
    result = torch.empty(len(routing), batch, dtype=torch.float64, device=record.grad.device)
    for part, samples in in_chunks(
        len(routing),
        batch * result.element_size(),
        lambda part: engine.routed_backward_norms(record.blocks, record.grad, record.exponent, routing[part]),
    ):
        result[part] = samples
    return result


def routed_forward(engine: Engine, prepared: Prepared, y0: Tensor, routing: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The blocks' output under every routing, ``y <- join(a skip(y) + c residual(y))`` a block.

    Work is cut into chunks of routings, never of samples: in BN mode ``batch`` the batch is one object.

    Args:
        y0: [B, C_0, H_0, W_0]
        routing: [P, n, 2], the (a, c) of every block, from input to output.

    Yields:
        Which routings; their [p, B, *y_n.shape[1:]].
    """
    routing = routing.to(y0.dtype)
    return in_chunks(len(routing), y0.nbytes, lambda part: engine.routed_forward(prepared, y0, routing[part]))
