"""The baselines in plain PyTorch: the usual loop, and batched gradients; the best composition is in `composed`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.groups import copies, put, rows_of, take
from pathnet.models import ResidualNet

__all__ = ["BatchedGradients", "detach_loop", "graphed", "norms"]


def norms(grads: Tensor) -> Tensor:
    """Return float32 [P], the norms of gradients [P, ...]."""
    return torch.as_tensor(torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=torch.float32))


def detach_loop(net: ResidualNet, images: Tensor, labels: Tensor, path: Sequence[int]) -> Tensor:
    """Return dL/dy0 [B, ...] along one path in the usual way: forward with one branch of each block detached,
    backward."""
    y = y0 = net.stem(images).detach().requires_grad_()
    for block, active in zip(net.blocks, path, strict=True):
        skip, residual = block.branches(y)  # type: ignore[operator]
        y = block.join(skip.detach() + residual if active else skip + residual.detach())  # type: ignore[operator]
    (grad,) = torch.autograd.grad(F.cross_entropy(net.head(y), labels), y0)
    return grad


def graphed(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the work as one CUDA graph, warmed up and captured; each replay overwrites its result."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    # Not by torch.cuda.graph, which empties torch's memory cache each time, and there are hundreds of graphs.
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
    """One forward pass with its autograd graph kept; at each block one VJP for all paths through the same branch."""

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

    def gradients(self, paths: Tensor) -> Tensor:
        """Return dL/dy0 [P, B, ...] along paths [P, n]."""
        grads = copies(self.grad, len(paths))
        rows = rows_of(paths, self.grad.device)
        for (x, skip, residual), (on, off) in zip(reversed(self.saved), reversed(rows), strict=True):
            replacements = []
            for which, branch in ((on, residual), (off, skip)):
                if which is not None and branch is not x:
                    branch_grads = take(grads, which)
                    (branch_grads,) = torch.autograd.grad(
                        branch, x, branch_grads, retain_graph=True, is_grads_batched=True
                    )
                    replacements.append((which, branch_grads))
            grads = put(grads, x.shape, replacements)
        return grads
