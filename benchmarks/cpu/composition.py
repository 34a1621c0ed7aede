"""The best composition of plain PyTorch on a processor, in both BN modes: what the cpu engine is timed against.

Forward once in float32; ReLU masks, and in BN mode ``batch`` normalised activations, kept as tensors; input
gradients of the active modules only, each step in the form that is fastest on this machine. Everything lies
channels_last. Tried and slower everywhere: NCHW, boolean masks (``where``, ``masked_fill_``, a product), sums as
matrix products; several paths in one call only take more memory, as one path's batch keeps all cores busy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import Convolution
from benchmarks.cpu.ways import Kept, Way, compiled_normalize, fastest, ways
from pathnet.models import ResidualNet
from pathnet.models.residual_net import FusedForm
from pathnet.recording import BatchNormMode, snapshot

__all__ = ["Composition"]

SLICES = (64, 32, 16)
"""Samples at a time: fewer keep a walk's gradient in the caches, more pay each call less often."""


class Composition:
    """One network and batch; `forward` records, `walk` takes one path back.

    Args:
        dtype: of the gradients and of what is multiplied with them.
        compiled: whether torch.compile takes part, which takes its time.
    """

    def __init__(
        self,
        net: ResidualNet,
        images: Tensor,
        labels: Tensor,
        bn: BatchNormMode,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        self.net = snapshot(net, bn, torch.float32).to(memory_format=torch.channels_last)
        self.images, self.labels = images.contiguous(memory_format=torch.channels_last), labels
        self.batch_statistics, self.dtype = bn == "batch", dtype
        self.compiled = compiled_normalize() if compiled and self.batch_statistics else None
        self.forms: list[FusedForm] = [block.form() for block in self.net.blocks]  # type: ignore[operator]
        if any(form.pad for form in self.forms):
            raise ValueError("net: the composition has no way back through padding skips")
        self.folded = [_folded(form) for form in self.forms]
        self.chosen: dict[tuple[object, ...], str] = {}
        self.forward()
        self._choose()

    @torch.no_grad()
    def forward(self) -> None:
        """Fills ``kept``, for each block of each of its units, and ``grad`` [B, C, H, W], that of dL/dy_n."""
        self.kept: list[list[Kept]] = []
        y = self.net.stem(self.images)
        for form, folded in zip(self.forms, self.folded, strict=True):
            run = self._block_by_batch if self.batch_statistics else self._block_by_running
            skip, residual, kept = run(form, folded, y)
            self.kept.append(kept)
            y = residual.add_(skip)
        with torch.enable_grad():
            y = y.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(self.net.head(y.clone()), self.labels), y)
        self.grad = grad.to(self.dtype, memory_format=torch.channels_last)

    def _block_by_running(
        self, form: FusedForm, folded: list[tuple[Tensor, Tensor | None]], y: Tensor
    ) -> tuple[Tensor, Tensor, list[Kept]]:
        bn, kept = form.units[0].bn, []
        x = first = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0, bn.eps).relu_()
        for unit, (weight, bias) in zip(form.units, folded, strict=True):
            kept.append(Kept(x.sign().to(self.dtype)))
            x = F.conv2d(x, weight, bias, unit.conv.stride, unit.conv.padding)
            if bias is not None:
                x = x.relu_()
        return (y if form.projection is None else form.projection(first)), x, kept

    def _block_by_batch(
        self, form: FusedForm, _: list[tuple[Tensor, Tensor | None]], y: Tensor
    ) -> tuple[Tensor, Tensor, list[Kept]]:
        kept, x, skip = [], y, y
        for unit in form.units:
            normalized, _mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, unit.bn.eps)
            weight, bias = (own[:, None, None] for own in (unit.bn.weight, unit.bn.bias))
            x = torch.addcmul(bias, normalized, weight).relu_()
            kept.append(Kept(x.sign().to(self.dtype), normalized.to(self.dtype), unit.bn.weight * inverse))
            if form.projection is not None and len(kept) == 1:
                skip = form.projection(x)
            x = unit.conv(x)
        return skip, x, kept

    @torch.no_grad()
    def walk(self, path: Sequence[int]) -> list[Tensor]:
        """dL/dy0 along one path [n], in slices [b, C, H, W] of the batch."""
        return [self._walk(path, grad, kept) for grad, kept in zip(*self._slices(self.samples), strict=True)]

    def norm(self, path: Sequence[int]) -> Tensor:
        """float32 []: the norm of dL/dy0 along one path."""
        parts = [torch.linalg.vector_norm(own, dtype=torch.float32) for own in self.walk(path)]
        return torch.linalg.vector_norm(torch.stack(parts))

    def _slices(self, samples: int) -> tuple[Sequence[Tensor], Sequence[list[list[Kept]]]]:
        if self.batch_statistics:
            return [self.grad], [self.kept]
        split = [[unit.samples(samples) for unit in block] for block in self.kept]
        grads = self.grad.split(samples)
        return grads, [[[unit[k] for unit in block] for block in split] for k in range(len(grads))]

    def _walk(self, path: Sequence[int], grad: Tensor, kept: list[list[Kept]]) -> Tensor:
        for i in reversed(range(len(path))):
            if path[i]:
                for way, own in zip(reversed(self.residual[i]), reversed(kept[i]), strict=True):
                    grad = way(grad, own)
            elif (skip := self.skip[i]) is not None:
                grad = skip(grad, kept[i][0])
        return grad

    @torch.no_grad()
    def _choose(self) -> None:
        """The fastest way of each unit, and in BN mode ``running`` the fastest number of samples at a time."""
        trial = [i % 2 for i in range(len(self.forms))]
        found: dict[str, tuple[int, list[list[Way]], list[Way | None]]] = {}
        batch = len(self.images)
        for samples in (batch,) if self.batch_statistics else (batch, *(own for own in SLICES if own < batch)):
            found[str(samples)] = samples, *self._ways(self._slices(samples)[1][0])

        def walk(own: tuple[int, list[list[Way]], list[Way | None]]) -> list[Tensor]:
            self.samples, self.residual, self.skip = own
            return self.walk(trial)

        best = fastest({name: lambda own=own: walk(own) for name, own in found.items()})  # type: ignore[misc]
        self.samples, self.residual, self.skip = found[best]

    def _ways(self, kept: list[list[Kept]]) -> tuple[list[list[Way]], list[Way | None]]:
        residual: list[list[Way]] = []
        skip: list[Way | None] = []
        for form, own in zip(self.forms, kept, strict=True):
            residual.append([self._way(unit.conv, unit.bn, k) for unit, k in zip(form.units, own, strict=True)])
            projection = form.projection
            skip.append(None if projection is None else self._way(projection, form.units[0].bn, own[0]))
        return residual, skip

    def _way(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, kept: Kept) -> Way:
        weight = conv.weight if self.batch_statistics else conv.weight * _affine(bn)[0][:, None, None]
        weight = weight.to(self.dtype, memory_format=torch.channels_last)
        stride, padding = conv.stride[0], int(conv.padding[0])
        batch, *shape = kept.mask.shape
        convolution = Convolution(weight, stride, padding, tuple(shape))  # type: ignore[arg-type]
        found = ways(convolution, self.batch_statistics, self.compiled)
        # Not of the number of samples: what is fastest for the whole batch is taken for its slices too.
        key = (tuple(weight.shape), stride, *shape)
        if key not in self.chosen:
            sides = [(side + 2 * padding - weight.shape[2]) // stride + 1 for side in shape[1:]]
            grad = torch.randn(batch, len(weight), *sides).to(self.dtype, memory_format=torch.channels_last)
            self.chosen[key] = fastest({name: lambda way=way: way(grad, kept) for name, way in found.items()})  # type: ignore[misc]
        return found[self.chosen[key]]


def _folded(form: FusedForm) -> list[tuple[Tensor, Tensor | None]]:
    """Each unit's convolution with the BN behind it, in BN mode ``running``; the last has none behind it."""
    folded: list[tuple[Tensor, Tensor | None]] = []
    for unit, behind in zip(form.units, form.units[1:], strict=False):
        scale, shift = _affine(behind.bn)
        weight = (unit.conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        folded.append((weight, shift))
    return [*folded, (form.units[-1].conv.weight, None)]


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """float32 [C] twice: factor and shift of a BN by running statistics."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return scale, bn.bias - bn.running_mean * scale
