"""The forms of one unit's VJP in plain PyTorch, and the choice of the fastest on this machine.

A unit is BN-ReLU-convolution. Its VJP takes a gradient [b, C', H', W'] of the convolution's output to the gradient
[b, C, H, W] of the BN's input, both channels_last and of one dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.composed import Convolution

__all__ = ["SavedUnit", "UnitVjp", "fastest", "unit_forms"]

REPEATS = 5


@dataclass(frozen=True)
class SavedUnit:
    """The tensors that a unit's forward pass saves.

    Attributes:
        mask: [b, C, H, W], one where the ReLU is active, in the gradients' dtype and channels_last.
        normalized: [b, C, H, W], the input normalised by BN, before weight and bias; only in BN mode ``batch``.
        scale: float32 [C], BN's weight / deviation; only in BN mode ``batch``, in ``running`` the convolution has it.
    """

    mask: Tensor
    normalized: Tensor | None = None
    scale: Tensor | None = None

    def samples(self, count: int) -> list[SavedUnit]:
        """Split the tensors into slices of ``count`` samples; in BN mode ``batch`` the batch cannot be split."""
        if self.normalized is not None:
            return [self]
        return [SavedUnit(mask) for mask in self.mask.split(count)]


UnitVjp = Callable[[Tensor, SavedUnit], Tensor]
"""Function of the output's gradient and the saved tensors; returns the input's gradient."""


def unit_forms(convolution: Convolution, batch_statistics: bool, compiled: UnitVjp | None) -> dict[str, UnitVjp]:
    """Return all forms worth trying, by name; ``compiled`` is `normalize` by torch.compile, or None."""
    vjps: dict[str, UnitVjp] = {}
    forms = dict(zip(("backward", "transposed", "correlated"), convolution.forms(), strict=False))
    for name, form in forms.items():
        if not batch_statistics:
            vjps[name] = lambda grad, saved, form=form: form(grad).mul_(saved.mask)  # type: ignore[misc]
            continue
        vjps[f"{name}, native"] = lambda grad, saved, form=form: _native(form(grad).mul_(saved.mask), saved)  # type: ignore[misc]
        vjps[f"{name}, by hand"] = lambda grad, saved, form=form: normalize(form(grad).mul_(saved.mask), saved)  # type: ignore[misc]
        if compiled is not None:
            vjps[f"{name}, compiled"] = lambda grad, saved, form=form: compiled(form(grad), saved)  # type: ignore[misc]
    if convolution.stride == 1 and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        fused = _fused(convolution)
        vjps["fused product"] = (
            (lambda grad, saved: _native(fused(grad, saved), saved)) if batch_statistics else fused  # noqa: E731
        )
    return vjps


def _fused(convolution: Convolution) -> UnitVjp:
    """Return the form with one oneDNN primitive for the convolution and the product with the mask."""
    weight = convolution.flipped()
    padding = [weight.shape[2] - 1 - convolution.padding] * 2

    def vjp(grad: Tensor, saved: SavedUnit) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            grad, saved.mask, weight, None, padding, [1, 1], [1, 1], 1, "mul", 1.0, None, [], None
        )

    return vjp


def _native(grad: Tensor, saved: SavedUnit) -> Tensor:
    """Apply PyTorch's kernel of BN's backward pass; its input is normalised already, with mean 0 and deviation 1."""
    assert saved.normalized is not None and saved.scale is not None
    zeros, ones = torch.zeros_like(saved.scale), torch.ones_like(saved.scale)
    return torch.ops.aten.native_batch_norm_backward(
        grad, saved.normalized, saved.scale, None, None, zeros, ones, True, 0.0, [True, False, False]
    )[0]


def normalize(grad: Tensor, saved: SavedUnit) -> Tensor:
    """Apply BN's backward pass by two reductions and a correction, on rows [b H W, C], with float32 sums."""
    assert saved.normalized is not None and saved.scale is not None
    rows, normalized = _rows(grad), _rows(saved.normalized)
    mean = rows.sum(0, dtype=torch.float32) / len(rows)
    projection = rows.mul(normalized).sum(0, dtype=torch.float32) / len(rows)
    corrected = torch.addcmul((-mean * saved.scale).to(rows.dtype), rows, saved.scale.to(rows.dtype))
    corrected.addcmul_(normalized, (projection * saved.scale).to(rows.dtype), value=-1)
    return _images(corrected, grad.shape)


def compiled_normalize() -> UnitVjp:
    """Return mask, reductions and correction fused by torch.compile, with float32 sums."""
    import torch._dynamo

    # Each shape and dtype is compiled separately, and beyond the limit torch continues uncompiled.
    torch._dynamo.config.recompile_limit = 64

    @torch.compile(dynamic=False)
    def fused(rows: Tensor, mask: Tensor, normalized: Tensor, scale: Tensor) -> Tensor:
        wide, other = rows.float() * mask, normalized.float()
        corrected = wide - wide.mean(0) - other * (wide * other).mean(0)
        return (corrected * scale).to(rows.dtype)

    def vjp(grad: Tensor, saved: SavedUnit) -> Tensor:
        assert saved.normalized is not None and saved.scale is not None
        return _images(fused(_rows(grad), _rows(saved.mask), _rows(saved.normalized), saved.scale), grad.shape)

    return vjp


def _rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: Tensor, shape: Sequence[int]) -> Tensor:
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def fastest(works: dict[str, Callable[[], object]]) -> str:
    """Return the name of the fastest work by the best of a few interleaved repeats, without those that PyTorch
    refuses."""
    best: dict[str, float] = {}
    for name, work in works.items():
        try:
            work()
        except RuntimeError:
            continue
        best[name] = float("inf")
    for _ in range(REPEATS):
        for name in best:
            start = time.perf_counter()
            works[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=lambda name: best[name])
