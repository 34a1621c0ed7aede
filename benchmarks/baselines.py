"""Plain PyTorch at its most usual, at its best, and with batched gradients: what pathnet is timed against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.models import ResidualNet

__all__ = ["BatchedGradients", "Composed", "Convolution", "detach_loop", "graphed", "norms"]

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
Rows = tuple[Tensor | None, Tensor | None]
"""Which paths of a group take the residual module and which the skip; None where all take the other."""


def norms(grads: Tensor) -> Tensor:
    """float32 [P]: the norms of gradients [P, ...]."""
    return torch.as_tensor(torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=torch.float32))


def detach_loop(net: ResidualNet, images: Tensor, labels: Tensor, path: Sequence[int]) -> Tensor:
    """dL/dy0 [B, ...] along one path, as one first writes it: a whole forward with a branch detached, a backward."""
    y = y0 = net.stem(images).detach().requires_grad_()
    for block, taken in zip(net.blocks, path, strict=True):
        skip, residual = block.branches(y)  # type: ignore[operator]
        y = block.join(skip.detach() + residual if taken else skip + residual.detach())  # type: ignore[operator]
    (grad,) = torch.autograd.grad(F.cross_entropy(net.head(y), labels), y0)
    return grad


def graphed(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The work as one CUDA graph, warmed up and captured; what it returns is overwritten by each replay."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    # By hand, as torch.cuda.graph empties torch's memory cache each time, and there are hundreds of graphs.
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
        stream.synchronize()
        graph.capture_begin()
        try:
            result = work()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class BatchedGradients:
    """The graph of one forward kept; at each block one backward for all paths that take the same branch."""

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor) -> None:
        self.net, self.images, self.labels = net, images, labels

    def forward(self) -> None:
        with torch.no_grad():
            y = self.net.stem(self.images)
        self.saved: list[tuple[Tensor, Tensor, Tensor]] = []
        for block in self.net.blocks:
            x = y.detach().requires_grad_()
            skip, residual = block.branches(x)  # type: ignore[operator]
            self.saved.append((x, skip, residual))
            y = skip + residual
        y = y.detach().requires_grad_()
        (self.grad,) = torch.autograd.grad(F.cross_entropy(self.net.head(y), self.labels), y)

    def walk(self, paths: Tensor) -> Tensor:
        """dL/dy0 [P, B, ...] along paths [P, n]."""
        grads = _copies(self.grad, len(paths))
        rows = _rows(paths, self.grad.device)
        for (x, skip, residual), (on, off) in zip(reversed(self.saved), reversed(rows), strict=True):
            through = []
            for which, branch in ((on, residual), (off, skip)):
                if which is not None and branch is not x:
                    own = _take(grads, which)
                    (own,) = torch.autograd.grad(branch, x, own, retain_graph=True, is_grads_batched=True)
                    through.append((which, own))
            grads = _put(grads, x.shape, through)
        return grads


@dataclass(frozen=True)
class Convolution:
    """A convolution's way back to its input, with the factors of the BN before it folded into the weight."""

    weight: Tensor
    stride: int
    padding: int
    in_shape: tuple[int, int, int]

    def flipped(self) -> Tensor:
        """The weight [C, C', k, k] with which the way back is a convolution itself, where the stride is 1."""
        return self.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def forms(self) -> list[Callable[[Tensor], Tensor]]:
        """The ways to write it in PyTorch; gradients are [N, C, H, W] in channels_last."""
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
    back: Callable[[Tensor], Tensor]
    mask: int


@dataclass(frozen=True)
class _Block:
    units: list[_Unit]
    projection: _Unit | None
    pad: bool
    in_shape: tuple[int, int, int]

    @property
    def identity(self) -> bool:
        return self.projection is None and not self.pad


class Composed:
    """The best composition: forward once in float32, ReLU masks kept, input gradients of active modules only.

    BN's factors are folded into the weights; everything lies channels_last in ``dtype``; each convolution's way
    back is written in the form that is fastest on this device. Gradients are [P, B, H, W, C] on the way.
    """

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.net, self.images, self.labels, self.dtype = net, images, labels, dtype
        self.masks: list[Tensor] = []
        self.fastest: dict[Any, int] = {}
        self.forward()
        self.blocks = self._blocks()

    def forward(self) -> Tensor:
        """Fills the masks, [B, H, W, C] each, and returns dL/dy_n [B, H, W, C]."""
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
        """Who goes where, prepared ahead, since a graph under capture cannot take new indices to the device."""
        return _rows(paths, self.grad.device)

    def walk(self, rows: Sequence[Rows], count: int) -> Tensor:
        """dL/dy0 [P, B, H, W, C] along ``count`` paths."""
        grads = _copies(self.grad, count)
        for block, (on, off) in zip(reversed(self.blocks), reversed(rows), strict=True):
            grads = self.step(block, grads, on, off)
        return grads

    def step(self, block: _Block, grads: Tensor, on: Tensor | None, off: Tensor | None) -> Tensor:
        through = []
        if on is not None:
            own = _take(grads, on)
            for unit in reversed(block.units):
                own = self._unit(unit, own)
            through.append((on, own))
        if off is not None and not block.identity:
            through.append((off, self._skip(block, _take(grads, off))))
        channels, *sides = block.in_shape
        return _put(grads, (grads.shape[1], *sides, channels), through)

    def module_graphs(self, capture: Capture) -> Callable[[Sequence[int]], Tensor]:
        """A walk along any one path, [1, B, H, W, C], by replaying a graph a block: no capture for a new path."""
        graphs: list[dict[bool, Callable[[], Tensor] | None]] = []
        batch, last = len(self.images), (self.grad.shape[3], *self.grad.shape[1:3])
        shapes = [*(block.in_shape for block in self.blocks[1:]), last]
        buffers = {shape: self._buffer(batch, shape) for shape in (self.blocks[0].in_shape, *shapes)}
        everyone = torch.zeros(1, dtype=torch.int64, device=self.grad.device)
        for block, shape in zip(self.blocks, shapes, strict=True):
            source, target = buffers[shape], buffers[block.in_shape]
            own: dict[bool, Callable[[], Tensor] | None] = {}
            for taken in (True, False):
                rows = (everyone, None) if taken else (None, everyone)

                def work(block: _Block = block, rows: Any = rows, s: Tensor = source, t: Tensor = target) -> Tensor:
                    return t.copy_(self.step(block, s, *rows))

                own[taken] = None if block.identity and not taken else capture(work)
            graphs.append(own)

        def walk(path: Sequence[int]) -> Tensor:
            buffers[shapes[-1]].copy_(self.grad)
            for ways, taken in zip(reversed(graphs), reversed(path), strict=True):
                if (replay := ways[bool(taken)]) is not None:
                    replay()
            return buffers[self.blocks[0].in_shape]

        return walk

    def _buffer(self, batch: int, shape: tuple[int, int, int]) -> Tensor:
        channels, *sides = shape
        return torch.zeros(1, batch, *sides, channels, dtype=self.dtype, device=self.grad.device)

    def _keep_mask(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.masks.append((output > 0).permute(0, 2, 3, 1).to(self.dtype).contiguous())

    def _unit(self, unit: _Unit, grads: Tensor) -> Tensor:
        count = len(grads)
        pulled = unit.back(grads.flatten(0, 1).permute(0, 3, 1, 2))
        pulled = pulled.permute(0, 2, 3, 1).contiguous().unflatten(0, (count, -1))
        return pulled.mul_(self.masks[unit.mask])

    def _skip(self, block: _Block, grads: Tensor) -> Tensor:
        if block.projection is not None:
            return self._unit(block.projection, grads)
        channels, height, width = block.in_shape
        stride = -(-height // grads.shape[2])
        wide = grads.new_zeros(*grads.shape[:2], height, width, channels)
        wide[:, :, ::stride, ::stride] = grads[..., :channels]
        return wide

    def _blocks(self) -> list[_Block]:
        blocks, mask = [], 0
        for block in self.net.blocks:
            form = block.form()  # type: ignore[operator]
            shapes = [self.masks[mask + i].shape for i in range(len(form.units))]
            units = [
                _Unit(self._back(unit.conv, unit.bn, shape), mask + i)
                for i, (unit, shape) in enumerate(zip(form.units, shapes, strict=True))
            ]
            projection = None
            if form.projection is not None:
                projection = _Unit(self._back(form.projection, form.units[0].bn, shapes[0]), mask)
            height, width, channels = shapes[0][1:]
            blocks.append(_Block(units, projection, form.pad, (channels, height, width)))
            mask += len(units)
        return blocks

    def _back(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, shape: torch.Size) -> Callable[[Tensor], Tensor]:
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
    """The number of the form that is quickest, by the best of a few interleaved groups of ten calls."""
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


def _rows(paths: Tensor, device: torch.device) -> list[Rows]:
    taken = paths.bool().cpu()
    rows: list[Rows] = []
    for column in taken.T:
        on, off = column.nonzero()[:, 0].to(device), (~column).nonzero()[:, 0].to(device)
        rows.append((on if len(on) else None, off if len(off) else None))
    return rows


def _copies(grad: Tensor, count: int) -> Tensor:
    """[P, *shape] of one gradient; several are copies, since `_put` writes into them."""
    return grad.expand(count, *grad.shape) if count == 1 else grad.repeat(count, *(1,) * grad.ndim)


def _take(grads: Tensor, rows: Tensor) -> Tensor:
    """The gradients of those paths, uncopied where they are all of them."""
    return grads if len(rows) == len(grads) else grads[rows]


def _put(grads: Tensor, shape: Sequence[int], through: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The paths' gradients [P, *shape], those that went through something replaced, in place where shapes allow."""
    for rows, own in through:
        if len(rows) == len(grads):
            return own
        if grads.shape[1:] != own.shape[1:]:
            grads = own.new_empty(len(grads), *shape)
        grads[rows] = own
    return grads
