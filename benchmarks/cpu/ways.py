"""The ways to write one unit's step back in plain PyTorch, and which of them is the fastest here.

A unit is BN-ReLU-convolution. Its way back takes a gradient [b, C', H', W'] of the convolution's output to
[b, C, H, W] of the BN's input, both channels_last and of one type.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines import Convolution

__all__ = ["Kept", "Way", "fastest", "ways"]

REPEATS = 5


@dataclass(frozen=True)
class Kept:
    """What a unit's forward pass left.

    Attributes:
        mask: [b, C, H, W], ones where the ReLU let through, in the walk's type; its memory is channels_last.
        normalized: the same shape, in BN mode ``batch`` what BN made of its input before weight and bias.
        scale: float32 [C], in BN mode ``batch`` BN's weight / deviation; in ``running`` it is in the convolution.
    """

    mask: Tensor
    normalized: Tensor | None = None
    scale: Tensor | None = None

    def samples(self, count: int) -> list[Kept]:
        """The same in slices of ``count`` samples; in BN mode ``batch`` the batch cannot be taken apart."""
        if self.normalized is not None:
            return [self]
        return [Kept(mask) for mask in self.mask.split(count)]


Way = Callable[[Tensor, Kept], Tensor]


def ways(convolution: Convolution, batch_statistics: bool, compiled: Way | None) -> dict[str, Way]:
    """All ways that are worth a try, by name; ``compiled`` is `normalize` by torch.compile, where that is wanted."""
    found: dict[str, Way] = {}
    forms = dict(zip(("backward", "transposed", "correlated"), convolution.forms(), strict=False))
    for name, form in forms.items():
        if not batch_statistics:
            found[name] = lambda grad, kept, form=form: form(grad).mul_(kept.mask)  # type: ignore[misc]
            continue
        found[f"{name}, native"] = lambda grad, kept, form=form: _native(form(grad).mul_(kept.mask), kept)  # type: ignore[misc]
        found[f"{name}, by hand"] = lambda grad, kept, form=form: normalize(form(grad).mul_(kept.mask), kept)  # type: ignore[misc]
        if compiled is not None:
            found[f"{name}, compiled"] = lambda grad, kept, form=form: compiled(form(grad), kept)  # type: ignore[misc]
    if convolution.stride == 1 and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        fused = _fused(convolution)
        found["fused product"] = (
            (lambda grad, kept: _native(fused(grad, kept), kept)) if batch_statistics else fused  # noqa: E731
        )
    return found


def _fused(convolution: Convolution) -> Way:
    """One oneDNN primitive for the convolution and the product with the mask."""
    weight = convolution.flipped()
    padding = [weight.shape[2] - 1 - convolution.padding] * 2

    def way(grad: Tensor, kept: Kept) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            grad, kept.mask, weight, None, padding, [1, 1], [1, 1], 1, "mul", 1.0, None, [], None
        )

    return way


def _native(grad: Tensor, kept: Kept) -> Tensor:
    """PyTorch's own kernel; the input is normalised already, hence of mean 0 and deviation 1."""
    assert kept.normalized is not None and kept.scale is not None
    zeros, ones = torch.zeros_like(kept.scale), torch.ones_like(kept.scale)
    return torch.ops.aten.native_batch_norm_backward(
        grad, kept.normalized, kept.scale, None, None, zeros, ones, True, 0.0, [True, False, False]
    )[0]


def normalize(grad: Tensor, kept: Kept) -> Tensor:
    """The two reductions and the correction, on rows [b H W, C]; the sums are float32."""
    assert kept.normalized is not None and kept.scale is not None
    rows, normalized = _rows(grad), _rows(kept.normalized)
    mean = rows.sum(0, dtype=torch.float32) / len(rows)
    share = rows.mul(normalized).sum(0, dtype=torch.float32) / len(rows)
    moved = torch.addcmul((-mean * kept.scale).to(rows.dtype), rows, kept.scale.to(rows.dtype))
    moved.addcmul_(normalized, (share * kept.scale).to(rows.dtype), value=-1)
    return _images(moved, grad.shape)


def compiled_normalize() -> Way:
    """The mask, the two reductions and the correction as torch.compile fuses them, summed in float32."""
    import torch._dynamo

    # A shape and type each is a compilation of its own, and beyond the limit torch goes on uncompiled.
    torch._dynamo.config.recompile_limit = 64

    @torch.compile(dynamic=False)
    def fused(rows: Tensor, mask: Tensor, normalized: Tensor, scale: Tensor) -> Tensor:
        wide, other = rows.float() * mask, normalized.float()
        corrected = wide - wide.mean(0) - other * (wide * other).mean(0)
        return (corrected * scale).to(rows.dtype)

    def way(grad: Tensor, kept: Kept) -> Tensor:
        assert kept.normalized is not None and kept.scale is not None
        return _images(fused(_rows(grad), _rows(kept.mask), _rows(kept.normalized), kept.scale), grad.shape)

    return way


def _rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: Tensor, shape: Sequence[int]) -> Tensor:
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def fastest(works: dict[str, Callable[[], object]]) -> str:
    """The name of the quickest work by the best of a few interleaved repeats; what PyTorch refuses is left out."""
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
