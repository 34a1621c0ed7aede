"""Coefficients of the branches of blocks, one for the forward pass and one for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pathnet.checks import check_tensor, described

__all__ = ["Coefficient", "check_coefficients", "known_as", "left_out", "of_blocks", "scaled"]

# A number if its value may decide what is computed, else a zero-dimensional tensor.
Coefficient = float | Tensor


def check_coefficients(name: str, coefficients: Any, n: int, parts: int) -> Tensor:
    """Return the coefficients of n blocks as a floating-point tensor [n, 2] or [n, parts].

    Args:
        name: the argument's name in errors.
        coefficients: such a tensor, or nested numbers.

    Raises:
        ValueError: they are neither, or not finite. Values are not checked while `torch.compile` traces.
    """
    try:
        is_tensor = isinstance(coefficients, Tensor)
        tensor: Tensor = coefficients if is_tensor else torch.tensor(coefficients, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: expected a tensor or nested numbers, got {described(coefficients)}") from None
    check_tensor(name, tensor, "floating-point")
    if tensor.ndim != 2 or tensor.shape[0] != n or tensor.shape[1] not in (2, parts):
        shapes = " or ".join(f"[{n}, {columns}]" for columns in sorted({2, parts}))
        raise ValueError(f"{name}: expected shape {shapes} for {n} blocks, got {list(tensor.shape)}")
    if not torch.compiler.is_compiling() and not torch.isfinite(tensor.detach().float()).all():
        raise ValueError(
            f"{name}: expected coefficients that are finite in float32, got NaN, infinity or larger ones"
        )
    return tensor


def of_blocks(coefficients: Tensor) -> Sequence[Sequence[Coefficient]]:
    """Return the coefficients of each block, [n, 2] or [n, parts], as numbers or zero-dimensional tensors.

    They remain tensors if they require gradients, and while `torch.compile` traces: numbers would become constants of
    the compiled program, and every routing would compile one.
    """
    if coefficients.requires_grad or torch.compiler.is_compiling():
        return [row.unbind() for row in coefficients.unbind()]
    rows: list[list[float]] = coefficients.tolist()
    return rows


def left_out(forward: Coefficient, backward: Coefficient) -> bool:
    """Return whether a branch with these coefficients is known to have no effect in either direction."""
    return known_as(forward, 0) and known_as(backward, 0)


def known_as(coefficient: Coefficient, number: float) -> bool:
    """Return whether a coefficient is the given number; False for any tensor, whose value must not be read."""
    return not isinstance(coefficient, Tensor) and coefficient == number


def scaled(x: Tensor, forward: Coefficient, backward: Coefficient) -> Tensor:
    """Return ``forward * x`` with the gradient of ``backward * x``; it can be differentiated any number of times.

    If ``backward`` is the number 0, ``x`` is detached, so no gradient flows to the operations before it.
    """
    if known_as(backward, 0):
        return x.detach() if known_as(forward, 1) else x.detach() * forward
    if forward is backward or (not isinstance(forward, Tensor) and known_as(backward, forward)):
        return x if known_as(forward, 1) else x * forward
    factors = (torch.as_tensor(coefficient, dtype=torch.float64) for coefficient in (forward, backward))
    return torch.as_tensor(_Scale.apply(x, *factors))  # type: ignore[no-untyped-call]


class _Scale(torch.autograd.Function):
    """``a x``, whose gradient for an output gradient g is ``b g`` at x, and ``<g, x>`` at a."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x * a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, a, b = inputs
        ctx.save_for_backward(x if a.requires_grad else None, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, a, b = ctx.saved_tensors
        return grad * b, None if x is None else (grad * x).sum(dtype=a.dtype).to(a.device), None
