"""Coefficients on the branches of blocks: one for the forward pass, and one for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pathnet.checks import check_tensor, described

__all__ = ["Coefficient", "check_coefficients", "known_as", "left_out", "of_blocks", "scaled"]

# A number where its value may decide what is computed; a tensor of no dimensions where it must not.
Coefficient = float | Tensor


def check_coefficients(name: str, given: Any, n: int, parts: int) -> Tensor:
    """The coefficients of n blocks as a floating-point tensor [n, 2], or [n, parts].

    Args:
        name: what an error calls the argument.
        given: such a tensor, or nested numbers.

    Raises:
        ValueError: they are neither. Values are not looked at while `torch.compile` traces.
    """
    try:
        own = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: expected a tensor or nested numbers, got {described(given)}") from None
    check_tensor(name, own, "floating-point")
    if own.ndim != 2 or own.shape[0] != n or own.shape[1] not in (2, parts):
        shapes = " or ".join(f"[{n}, {columns}]" for columns in sorted({2, parts}))
        raise ValueError(f"{name}: expected shape {shapes} for {n} blocks, got {list(own.shape)}")
    if not torch.compiler.is_compiling() and not torch.isfinite(own.detach().float()).all():
        raise ValueError(
            f"{name}: expected coefficients that are finite in float32, got NaN, infinity or larger ones"
        )
    return own


def of_blocks(coefficients: Tensor) -> Sequence[Sequence[Coefficient]]:
    """Row by row. They stay tensors where they are differentiated, and where `torch.compile` traces: numbers would be
    constants of the program, and every routing would need one of its own."""
    if coefficients.requires_grad or torch.compiler.is_compiling():
        return [row.unbind() for row in coefficients.unbind()]
    rows: list[list[float]] = coefficients.tolist()
    return rows


def left_out(forward: Coefficient, backward: Coefficient) -> bool:
    """Whether a branch with these coefficients is known to take no part."""
    return known_as(forward, 0) and known_as(backward, 0)


def known_as(coefficient: Coefficient, number: float) -> bool:
    """Whether a coefficient is that number, and not a tensor, whose value must decide nothing."""
    return not isinstance(coefficient, Tensor) and coefficient == number


def scaled(x: Tensor, forward: Coefficient, backward: Coefficient) -> Tensor:
    """``forward * x``, whose gradient is that of ``backward * x``; differentiable as often as one likes.

    Where ``backward`` is the number 0, nothing of what made ``x`` gets a gradient.
    """
    if known_as(backward, 0):
        return x.detach() if known_as(forward, 1) else x.detach() * forward
    if forward is backward or (not isinstance(forward, Tensor) and known_as(backward, forward)):
        return x if known_as(forward, 1) else x * forward
    own = (torch.as_tensor(each, dtype=torch.float64) for each in (forward, backward))
    return torch.as_tensor(_Apart.apply(x, *own))  # type: ignore[no-untyped-call]


class _Apart(torch.autograd.Function):
    """``a x``, of which the gradient at x is ``b g``, and at a ``<g, x>``."""

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
