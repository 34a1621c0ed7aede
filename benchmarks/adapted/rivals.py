"""The competitors that a user writes: fifteen lines of autograd, and the loop with `detach`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.adapted.cases import Structure

__all__ = ["KeptGraphs", "detach_loop", "sums_along"]


class KeptGraphs:
    """The fifteen lines: one forward pass that keeps each module's graph, then VJPs of the active modules alone.

    A skip connection that is the identity costs nothing. Parameters must not require gradients.
    """

    def __init__(self, parts: Structure, inputs: Tensor, target: Tensor) -> None:
        y, self.graphs = parts.stem(inputs), []
        for module in parts.modules:
            x = y.detach().requires_grad_()
            skip = x if module.before is None else module.before(x)
            residual = module.residual(skip)
            self.graphs.append((x, skip, residual))
            y = skip + residual
        y = y.detach().requires_grad_()
        (self.start,) = torch.autograd.grad(_loss(parts.head(y), target), y)

    def gradient(self, path: Sequence[int]) -> Tensor:
        """Return the gradient at ``y_0`` along a path of zeros and ones."""
        grad = self.start
        for (x, skip, residual), active in zip(reversed(self.graphs), reversed(path), strict=True):
            branch = residual if active else skip
            if branch is not x:
                (grad,) = torch.autograd.grad(branch, x, grad, retain_graph=True)
        return grad

    def sums(self) -> None:
        """Run as many VJPs of modules as the exact sums by length need: n - i at block i of n, counted from 0."""
        for i, (x, _, residual) in enumerate(self.graphs):
            # Contiguous, as gradients from the VJP of a module are; `ones_like` would keep the output's layout.
            grad = torch.ones(residual.shape, dtype=residual.dtype, device=residual.device)
            for _ in range(len(self.graphs) - i):
                torch.autograd.grad(residual, x, grad, retain_graph=True)

    def norms(self, paths: Tensor) -> Tensor:
        """Return the norms [P] along paths [P, n]."""
        return torch.stack([self.gradient(path).norm() for path in paths.tolist()])


def detach_loop(parts: Structure, inputs: Tensor, target: Tensor, path: Sequence[int]) -> Tensor:
    """Return the gradient at ``y_0`` along a path: a forward pass that detaches the other branch of each block."""
    y0 = y = parts.stem(inputs).detach().requires_grad_()
    for module, active in zip(parts.modules, path, strict=True):
        skip = y if module.before is None else module.before(y)
        residual = module.residual(skip)
        y = skip.detach() + residual if active else skip + residual.detach()
    return torch.autograd.grad(_loss(parts.head(y), target), y0)[0]


def sums_along(parts: Structure, inputs: Tensor, target: Tensor, factor: float) -> Tensor:
    """Return the gradient at ``y_0`` with each residual module's share of it multiplied: the exact sums' polynomial.

    The forward pass is unchanged: ``x`` times the module's Jacobian by a detached difference.
    """
    y0 = y = parts.stem(inputs).detach().requires_grad_()
    for module in parts.modules:
        skip = y if module.before is None else module.before(y)
        residual = module.residual(skip)
        y = skip + residual.detach() + factor * (residual - residual.detach())
    return torch.autograd.grad(_loss(parts.head(y), target), y0)[0]


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())
