"""The best composition of plain PyTorch on a processor, in both BN modes: the baseline of the cpu engine.

One forward pass in float32 saves ReLU masks, and in BN mode ``batch`` normalised activations. Backward passes compute
input gradients of active modules only, each unit in the form that is fastest on this machine. All tensors are
channels_last. Tried and slower everywhere: NCHW, boolean masks (``where``, ``masked_fill_``, a product), sums as
matrix products. Several paths in one call only take more memory, since one path's batch keeps all cores busy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.composed import Convolution
from benchmarks.cpu.unit_forms import SavedUnit, UnitVjp, compiled_normalize, fastest, unit_forms
from pathnet.models import ResidualNet
from pathnet.models.residual_net import FusedForm
from pathnet.recording import BatchNormMode, snapshot

__all__ = ["Composition"]

SLICES = (64, 32, 16)
"""Samples at a time: fewer keep the gradient in the caches, more need fewer calls."""


Choice = tuple[int, list[list[UnitVjp]], list[UnitVjp | None]]
"""Samples at a time; for each block the VJPs of its units, and of its skip (None for an identity)."""


class Composition:
    """One network and batch: `forward` records, `gradients` runs the backward pass along one path.

    Args:
        dtype: dtype of the gradients and of their factors.
        compiled: whether to try torch.compile, which takes minutes.
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
            raise ValueError("net: expected no padding skips, which the composition has no VJP for")
        self.folded = [_folded(form) for form in self.forms]
        self.chosen: dict[tuple[object, ...], str] = {}
        self.forward()
        self._choose()

    @torch.no_grad()
    def forward(self) -> None:
        """Set ``saved``, for each block the tensors of its units, and ``grad``, dL/dy_n [B, C, H, W]."""
        self.saved: list[list[SavedUnit]] = []
        y = self.net.stem(self.images)
        for form, folded in zip(self.forms, self.folded, strict=True):
            run = self._block_by_batch if self.batch_statistics else self._block_by_running
            skip, residual, saved = run(form, folded, y)
            self.saved.append(saved)
            y = residual.add_(skip)
        with torch.enable_grad():
            y = y.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(self.net.head(y.clone()), self.labels), y)
        self.grad = grad.to(self.dtype, memory_format=torch.channels_last)

    def _block_by_running(
        self, form: FusedForm, folded: list[tuple[Tensor, Tensor | None]], y: Tensor
    ) -> tuple[Tensor, Tensor, list[SavedUnit]]:
        bn, saved = form.units[0].bn, []
        x = first = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0, bn.eps).relu_()
        for unit, (weight, bias) in zip(form.units, folded, strict=True):
            saved.append(SavedUnit(x.sign().to(self.dtype)))
            x = F.conv2d(x, weight, bias, unit.conv.stride, unit.conv.padding)
            if bias is not None:
                x = x.relu_()
        return (y if form.projection is None else form.projection(first)), x, saved

    def _block_by_batch(
        self, form: FusedForm, _: list[tuple[Tensor, Tensor | None]], y: Tensor
    ) -> tuple[Tensor, Tensor, list[SavedUnit]]:
        saved, x, skip = [], y, y
        for unit in form.units:
            normalized, _mean, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, unit.bn.eps)
            weight, bias = (parameter[:, None, None] for parameter in (unit.bn.weight, unit.bn.bias))
            x = torch.addcmul(bias, normalized, weight).relu_()
            saved.append(SavedUnit(x.sign().to(self.dtype), normalized.to(self.dtype), unit.bn.weight * inverse))
            if form.projection is not None and len(saved) == 1:
                skip = form.projection(x)
            x = unit.conv(x)
        return skip, x, saved

    @torch.no_grad()
    def gradients(self, path: Sequence[int]) -> list[Tensor]:
        """Return dL/dy0 along one path [n], in slices [b, C, H, W] of the batch."""
        return [self._gradients(path, grad, saved) for grad, saved in zip(*self._slices(self.samples), strict=True)]

    def norm(self, path: Sequence[int]) -> Tensor:
        """Return float32 [], the norm of dL/dy0 along one path."""
        parts = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in self.gradients(path)]
        return torch.linalg.vector_norm(torch.stack(parts))

    def _slices(self, samples: int) -> tuple[Sequence[Tensor], Sequence[list[list[SavedUnit]]]]:
        if self.batch_statistics:
            return [self.grad], [self.saved]
        split = [[unit.samples(samples) for unit in block] for block in self.saved]
        grads = self.grad.split(samples)
        return grads, [[[unit[k] for unit in block] for block in split] for k in range(len(grads))]

    def _gradients(self, path: Sequence[int], grad: Tensor, saved: list[list[SavedUnit]]) -> Tensor:
        for i in reversed(range(len(path))):
            if path[i]:
                for vjp, unit in zip(reversed(self.residual[i]), reversed(saved[i]), strict=True):
                    grad = vjp(grad, unit)
            elif (skip := self.skip[i]) is not None:
                grad = skip(grad, saved[i][0])
        return grad

    @torch.no_grad()
    def _choose(self) -> None:
        """Choose the fastest form of each unit, and in BN mode ``running`` the fastest number of samples at a
        time."""
        trial = [i % 2 for i in range(len(self.forms))]
        choices: dict[str, Choice] = {}
        batch = len(self.images)
        for samples in (batch,) if self.batch_statistics else (batch, *(size for size in SLICES if size < batch)):
            choices[str(samples)] = samples, *self._vjps(self._slices(samples)[1][0])

        def run(choice: Choice) -> list[Tensor]:
            self.samples, self.residual, self.skip = choice
            return self.gradients(trial)

        best = fastest({name: lambda choice=choice: run(choice) for name, choice in choices.items()})  # type: ignore[misc]
        self.samples, self.residual, self.skip = choices[best]

    def _vjps(self, saved: list[list[SavedUnit]]) -> tuple[list[list[UnitVjp]], list[UnitVjp | None]]:
        residual: list[list[UnitVjp]] = []
        skip: list[UnitVjp | None] = []
        for form, units in zip(self.forms, saved, strict=True):
            residual.append([self._vjp(unit.conv, unit.bn, k) for unit, k in zip(form.units, units, strict=True)])
            projection = form.projection
            skip.append(None if projection is None else self._vjp(projection, form.units[0].bn, units[0]))
        return residual, skip

    def _vjp(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, saved: SavedUnit) -> UnitVjp:
        weight = conv.weight if self.batch_statistics else conv.weight * _affine(bn)[0][:, None, None]
        weight = weight.to(self.dtype, memory_format=torch.channels_last)
        stride, padding = conv.stride[0], int(conv.padding[0])
        batch, *shape = saved.mask.shape
        convolution = Convolution(weight, stride, padding, tuple(shape))  # type: ignore[arg-type]
        forms = unit_forms(convolution, self.batch_statistics, self.compiled)
        # Without the number of samples: slices take the form that is fastest for the whole batch.
        key = (tuple(weight.shape), stride, *shape)
        if key not in self.chosen:
            sides = [(side + 2 * padding - weight.shape[2]) // stride + 1 for side in shape[1:]]
            grad = torch.randn(batch, len(weight), *sides).to(self.dtype, memory_format=torch.channels_last)
            self.chosen[key] = fastest({name: lambda vjp=vjp: vjp(grad, saved) for name, vjp in forms.items()})  # type: ignore[misc]
        return forms[self.chosen[key]]


def _folded(form: FusedForm) -> list[tuple[Tensor, Tensor | None]]:
    """Return each unit's convolution with the next BN folded in, for BN mode ``running``; the last has no next BN."""
    folded: list[tuple[Tensor, Tensor | None]] = []
    for unit, following in zip(form.units, form.units[1:], strict=False):
        scale, shift = _affine(following.bn)
        weight = (unit.conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        folded.append((weight, shift))
    return [*folded, (form.units[-1].conv.weight, None)]


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a BN by running statistics, float32 [C] each."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return scale, bn.bias - bn.running_mean * scale
