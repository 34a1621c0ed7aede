"""What a researcher would write in plain PyTorch for the norm of one path's gradient, BN mode ``running``.

Each is a class made of a network and a batch; called with a path, uint8 [n] on the CPU, it gives the norm of the
gradient at y_0 as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.models import ResidualNet

__all__ = ["BatchedGradients", "Composition", "DetachLoop", "GraphedComposition"]


class DetachLoop:
    """The first thing one writes: a full forward, the branch that is not taken detached, then backward."""

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor) -> None:
        self.net, self.images, self.labels = net, images, labels

    def __call__(self, path: Tensor) -> Tensor:
        y0 = self.net.stem(self.images).detach().requires_grad_()
        y = y0
        for taken, block in zip(path.tolist(), self.net.blocks, strict=True):
            skip, residual = block.branches(y)
            y = skip.detach() + residual if taken else skip + residual.detach()
        (grad,) = torch.autograd.grad(F.cross_entropy(self.net.head(y), self.labels), y0)
        return grad.norm()


class Composition:
    """The forward once, ReLU masks kept; then only the active modules' input-gradient convolutions, BN's factors
    folded into the weights, channels last."""

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        self.steps: list[dict[str, Callable[[Tensor], Tensor]]] = []
        with torch.no_grad():
            y = net.stem(images)
            for block in net.blocks:
                first = block.bns[0](y)
                middle = block.convs[0](first.relu())
                second = block.bns[1](middle)
                self.steps.append(self._block(block, first > 0, second > 0, dtype))
                y = block(y)
        y.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net.head(y), labels), y)
        # Near one, where bfloat16 and float32 are at home; the paths of a trained network shrink it again.
        self.scale = grad.abs().max()
        self.grad = (grad / self.scale).to(dtype).contiguous(memory_format=torch.channels_last)

    def _block(
        self, block: nn.Module, first: Tensor, second: Tensor, dtype: torch.dtype
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        def mask(bits: Tensor) -> Tensor:
            return bits.to(dtype).contiguous(memory_format=torch.channels_last)

        outer, inner = mask(first), mask(second)
        weights = [
            (conv.weight * _factor(bn)[None, :, None, None]).to(dtype)
            for conv, bn in zip(block.convs, block.bns, strict=True)  # type: ignore[arg-type]
        ]
        to_inner, to_outer = (
            _input_gradient(conv, weight)
            for conv, weight in zip(block.convs[::-1], weights[::-1], strict=True)  # type: ignore[index,arg-type]
        )

        def residual(grad: Tensor) -> Tensor:
            return to_outer(to_inner(grad) * inner) * outer

        steps: dict[str, Callable[[Tensor], Tensor]] = {"residual": residual}
        if block.projection is not None:
            weight = (block.projection.weight * _factor(block.bns[0])[None, :, None, None]).to(dtype)  # type: ignore[union-attr,index]
            to_input = _input_gradient(block.projection, weight)  # type: ignore[arg-type]
            steps["skip"] = lambda grad: to_input(grad) * outer
        return steps

    @torch.no_grad()
    def __call__(self, path: Tensor) -> Tensor:
        grad = self.grad
        for taken, step in zip(reversed(path.tolist()), reversed(self.steps), strict=True):
            if taken:
                grad = step["residual"](grad)
            elif "skip" in step:
                grad = step["skip"](grad)
        return grad.float().norm() * self.scale


class GraphedComposition(Composition):
    """`Composition` with every block's step captured as a CUDA graph, so that a path is one replay a module."""

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(net, images, labels, dtype)
        self.graphs: list[dict[str, torch.cuda.CUDAGraph]] = []
        buffers: dict[torch.Size, Tensor] = {}

        def buffer(like: Tensor) -> Tensor:
            return buffers.setdefault(like.shape, torch.empty_like(like, memory_format=torch.channels_last))

        shape = self.grad
        self.first = buffer(shape)
        with torch.no_grad():
            for step in reversed(self.steps):
                own = {}
                for name, run in step.items():
                    before = buffer(shape)
                    stream = torch.cuda.Stream()
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        result = run(before)
                    torch.cuda.current_stream().wait_stream(stream)
                    after = buffer(result)
                    own[name] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(own[name]):
                        after.copy_(run(before))
                self.graphs.append(own)
                shape = after
        self.last = after

    @torch.no_grad()
    def __call__(self, path: Tensor) -> Tensor:
        self.first.copy_(self.grad)
        for taken, own in zip(reversed(path.tolist()), self.graphs, strict=True):
            if taken:
                own["residual"].replay()
            elif "skip" in own:
                own["skip"].replay()
        return self.last.float().norm() * self.scale


class BatchedGradients:
    """A saved forward, and ``is_grads_batched`` through each block for all paths that take its module."""

    def __init__(self, net: ResidualNet, images: Tensor, labels: Tensor) -> None:
        self.blocks = []
        y = net.stem(images).detach()
        for block in net.blocks:
            x = y.detach().requires_grad_()
            skip, residual = block.branches(x)
            self.blocks.append((x, skip, residual))
            y = (skip + residual).detach()
        y.requires_grad_()
        (self.grad,) = torch.autograd.grad(F.cross_entropy(net.head(y), labels), y)

    def __call__(self, paths: Tensor) -> Tensor:
        """Norms [P] of paths [P, n] (or one path's, [n])."""
        paths = torch.atleast_2d(paths)
        grads = self.grad.expand(len(paths), *self.grad.shape)
        for i in reversed(range(len(self.blocks))):
            x, skip, residual = self.blocks[i]
            taken = paths[:, i].bool().to(grads.device)
            walked = grads.new_empty(len(paths), *x.shape)
            for branch, chosen in ((residual, taken), (skip, ~taken)):
                if not chosen.any():
                    continue
                if branch is x:
                    walked[chosen] = grads[chosen]
                else:
                    (walked[chosen],) = torch.autograd.grad(
                        branch, x, grads[chosen], retain_graph=True, is_grads_batched=True
                    )
            grads = walked
        return grads.flatten(1).norm(dim=1)


def _factor(bn: nn.BatchNorm2d) -> Tensor:
    assert bn.running_var is not None
    return bn.weight.detach() / (bn.running_var + bn.eps).sqrt()


def _input_gradient(conv: nn.Conv2d, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The transposed convolution; with stride 1 as a convolution with the flipped weight, which is faster."""
    padding, stride = int(conv.padding[0]), conv.stride[0]
    if stride == 1:
        flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last).detach()
        return lambda grad: F.conv2d(grad, flipped, padding=conv.kernel_size[0] - 1 - padding)
    own = weight.contiguous(memory_format=torch.channels_last).detach()
    extra = stride + 2 * padding - conv.kernel_size[0]
    return lambda grad: F.conv_transpose2d(grad, own, stride=stride, padding=padding, output_padding=extra)
