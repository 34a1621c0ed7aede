"""The best composition in plain PyTorch on a GPU, and the forms of a convolution's input gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.groups import Rows, copies, put, rows_of, take
from pathnet.models import ResidualNet

__all__ = ["Composed", "Convolution"]

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True)
class Convolution:
    """The input gradient of a convolution, with the factors of the BN before it folded into the weight."""

    weight: Tensor
    stride: int
    padding: int
    in_shape: tuple[int, int, int]

    def flipped(self) -> Tensor:
        """Return the weight [C, C', k, k] for which the input gradient is itself a convolution, if the stride is
        1."""
        return self.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def forms(self) -> list[Callable[[Tensor], Tensor]]:
        """Return its forms in PyTorch, functions of gradients [N, C, H, W] in channels_last."""
        channels, height, width = self.in_shape
        kernel = self.weight.shape[2]
        flipped = self.flipped()
        stride, padding = [self.stride] * 2, [self.padding] * 2

        def backward(grad: Tensor) -> Tensor:
            shape = (len(grad), channels, height, width)
            x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
            return torch.ops.aten.convolution_backward(
                grad, x, self.weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]

        def transposed(grad: Tensor) -> Tensor:
            used = (grad.shape[2] - 1) * self.stride + kernel - 2 * self.padding
            return F.conv_transpose2d(grad, self.weight, None, stride, padding, height - used)

        def correlated(grad: Tensor) -> Tensor:
            return F.conv2d(grad, flipped, padding=kernel - 1 - self.padding)

        return [backward, transposed, correlated] if self.stride == 1 else [backward, transposed]


@dataclass(frozen=True)
class _Unit:
    input_gradient: Callable[[Tensor], Tensor]
    mask: int


@dataclass(frozen=True)
class _Block:
    units: list[_Unit]
    projection: _Unit | None
    pad: bool
    pad_before: int
    in_shape: tuple[int, int, int]

    @property
    def identity(self) -> bool:
        return self.projection is None and not self.pad


class Composed:
    """The best composition: one forward pass in float32, ReLU masks kept, input gradients of active modules only.

    BN's factors are folded into the weights, all tensors are channels_last in ``dtype``, and each convolution's input
    gradient has the form that is fastest on this device. Gradients are [P, B, H, W, C] inside.
    """

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.net, self.images, self.labels, self.dtype = net, images, labels, dtype
        self.masks: list[Tensor] = []
        self.fastest: dict[Any, int] = {}
        self.forward()
        self.blocks = self._blocks()

    def forward(self) -> Tensor:
        """Set the masks, [B, H, W, C] each, and return dL/dy_n [B, H, W, C]."""
        self.masks = []
        hooks = [
            unit.bn.register_forward_hook(self._keep_mask)
            for block in self.net.blocks
            for unit in block.form().units  # type: ignore[operator]
        ]
        try:
            with torch.no_grad():
                y = self.net.stem(self.images)
                for block in self.net.blocks:
                    y = block(y)
        finally:
            for hook in hooks:
                hook.remove()
        y = y.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(self.net.head(y), self.labels), y)
        self.grad = grad.permute(0, 2, 3, 1).to(self.dtype).contiguous()
        return self.grad

    def rows(self, paths: Tensor) -> list[Rows]:
        """Return each block's rows; computed ahead, since indices cannot be copied to the device during a capture."""
        return rows_of(paths, self.grad.device)

    def gradients(self, rows: Sequence[Rows], count: int) -> Tensor:
        """Return dL/dy0 [P, B, H, W, C] along ``count`` paths."""
        grads = copies(self.grad, count)
        for block, (on, off) in zip(reversed(self.blocks), reversed(rows), strict=True):
            grads = self.step(block, grads, on, off)
        return grads

    def step(self, block: _Block, grads: Tensor, on: Tensor | None, off: Tensor | None) -> Tensor:
        replacements = []
        if on is not None:
            residual = take(grads, on)
            for unit in reversed(block.units):
                residual = self._unit(unit, residual)
            replacements.append((on, residual))
        if off is not None and not block.identity:
            replacements.append((off, self._skip(block, take(grads, off))))
        channels, *sides = block.in_shape
        return put(grads, (grads.shape[1], *sides, channels), replacements)

    def module_graphs(self, capture: Capture) -> Callable[[Sequence[int]], Tensor]:
        """Return a function of one path that replays one graph per block, so a new path needs no capture.

        It returns dL/dy0 [1, B, H, W, C].
        """
        graphs: list[dict[bool, Callable[[], Tensor] | None]] = []
        batch, last = len(self.images), (self.grad.shape[3], *self.grad.shape[1:3])
        shapes = [*(block.in_shape for block in self.blocks[1:]), last]
        buffers = {shape: self._buffer(batch, shape) for shape in (self.blocks[0].in_shape, *shapes)}
        all_paths = torch.zeros(1, dtype=torch.int64, device=self.grad.device)
        for block, shape in zip(self.blocks, shapes, strict=True):
            source, target = buffers[shape], buffers[block.in_shape]
            branches: dict[bool, Callable[[], Tensor] | None] = {}
            for active in (True, False):
                rows = (all_paths, None) if active else (None, all_paths)

                def work(block: _Block = block, rows: Any = rows, s: Tensor = source, t: Tensor = target) -> Tensor:
                    return t.copy_(self.step(block, s, *rows))

                branches[active] = None if block.identity and not active else capture(work)
            graphs.append(branches)

        def gradients(path: Sequence[int]) -> Tensor:
            buffers[shapes[-1]].copy_(self.grad)
            for branches, active in zip(reversed(graphs), reversed(path), strict=True):
                if (replay := branches[bool(active)]) is not None:
                    replay()
            return buffers[self.blocks[0].in_shape]

        return gradients

    def _buffer(self, batch: int, shape: tuple[int, int, int]) -> Tensor:
        channels, *sides = shape
        return torch.zeros(1, batch, *sides, channels, dtype=self.dtype, device=self.grad.device)

    def _keep_mask(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.masks.append((output > 0).permute(0, 2, 3, 1).to(self.dtype).contiguous())

    def _unit(self, unit: _Unit, grads: Tensor) -> Tensor:
        count = len(grads)
        pulled = unit.input_gradient(grads.flatten(0, 1).permute(0, 3, 1, 2))
        pulled = pulled.permute(0, 2, 3, 1).contiguous().unflatten(0, (count, -1))
        return pulled.mul_(self.masks[unit.mask])

    def _skip(self, block: _Block, grads: Tensor) -> Tensor:
        if block.projection is not None:
            return self._unit(block.projection, grads)
        channels, height, width = block.in_shape
        stride = -(-height // grads.shape[2])
        wide = grads.new_zeros(*grads.shape[:2], height, width, channels)
        wide[:, :, ::stride, ::stride] = grads[..., block.pad_before : block.pad_before + channels]
        return wide

    def _blocks(self) -> list[_Block]:
        blocks, mask = [], 0
        for block in self.net.blocks:
            form = block.form()  # type: ignore[operator]
            shapes = [self.masks[mask + i].shape for i in range(len(form.units))]
            units = [
                _Unit(self._input_gradient(unit.conv, unit.bn, shape), mask + i)
                for i, (unit, shape) in enumerate(zip(form.units, shapes, strict=True))
            ]
            projection = None
            if form.projection is not None:
                projection = _Unit(self._input_gradient(form.projection, form.units[0].bn, shapes[0]), mask)
            height, width, channels = shapes[0][1:]
            blocks.append(_Block(units, projection, form.pad, form.pad_before, (channels, height, width)))
            mask += len(units)
        return blocks

    def _input_gradient(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        assert bn.running_var is not None
        scale = bn.weight.detach() / (bn.running_var + bn.eps).sqrt()
        weight = (conv.weight.detach() * scale[:, None, None]).to(self.dtype, memory_format=torch.channels_last)
        batch, height, width, channels = shape
        stride, padding = conv.stride[0], int(conv.padding[0])
        forms = Convolution(weight, stride, padding, (channels, height, width)).forms()
        key = (weight.shape, stride, shape)
        if key not in self.fastest:
            kernel = conv.kernel_size[0]
            sides = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
            grad = torch.randn(batch, weight.shape[0], *sides, device=weight.device).to(
                self.dtype, memory_format=torch.channels_last
            )
            self.fastest[key] = _fastest(forms, grad)
        return forms[self.fastest[key]]


def _fastest(forms: Sequence[Callable[[Tensor], Tensor]], grad: Tensor) -> int:
    """Return the index of the fastest form, by the best of a few interleaved groups of ten calls."""
    best = [float("inf")] * len(forms)
    for _ in range(4 if grad.is_cuda else 1):
        for i, form in enumerate(forms):
            if grad.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10 if grad.is_cuda else 1):
                form(grad)
            if grad.is_cuda:
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
    return best.index(min(best))
