"""Running statistics of a fused block's BNs, updated as `torch.nn.BatchNorm2d` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The running statistics of consecutive BN-ReLU-convolution units that take statistics of the batch.

    Args:
        norms: the BN of each unit.
        strides: that of each unit's convolution.
    """

    def __init__(self, norms: Sequence[nn.BatchNorm2d], strides: Sequence[int]) -> None:
        self.norms, self.strides = norms, strides
        self.tracks = [bn.training and bn.track_running_stats and bn.running_mean is not None for bn in norms]
        # The momentum of all BNs, if it is one number.
        alike = all(self.tracks) and all(bn.momentum == norms[0].momentum for bn in norms)
        alike = alike and all(bn.num_batches_tracked is not None for bn in norms)
        self.momentum = norms[0].momentum if alike else None

    def update(self, statistics: Tensor, shape: torch.Size) -> None:
        """Add the statistics of a batch.

        Args:
            statistics: float32 [units, 2, widest], mean and biased variance of each BN's input.
            shape: [B, C, H, W], that of the first BN's input.
        """
        if not any(self.tracks):
            return
        # BNs that agree are updated together: a few operations take a third of the time of five for each.
        with torch.no_grad():
            if self.momentum is None or torch.compiler.is_compiling():
                self._update_each(statistics, shape)
            else:
                self._update_all(statistics, shape, self.momentum)

    def _update_all(self, statistics: Tensor, shape: torch.Size, momentum: float) -> None:
        running: list[Any] = [bn.running_mean for bn in self.norms] + [bn.running_var for bn in self.norms]
        pairs = [
            (pair if bn.num_features == pair.shape[1] else pair[:, : bn.num_features]).unbind()
            for bn, pair in zip(self.norms, statistics.unbind(), strict=True)
        ]
        rows = [mean for mean, _ in pairs]
        rows += torch._foreach_mul([variance for _, variance in pairs], self._unbiased(shape))
        kind = running[0].dtype
        if kind != torch.float32:
            rows = [row.to(kind) for row in rows]
        counters: list[Any] = [bn.num_batches_tracked for bn in self.norms]
        torch._foreach_add_(counters, 1)
        torch._foreach_lerp_(running, rows, momentum)

    def _update_each(self, statistics: Tensor, shape: torch.Size) -> None:
        units = zip(self.norms, self.tracks, statistics.unbind(), self._unbiased(shape), strict=True)
        for bn, tracks, pair, factor in units:
            running_mean, running_var, count = bn.running_mean, bn.running_var, bn.num_batches_tracked
            if not tracks or running_mean is None or running_var is None:
                continue
            if count is not None:
                count.add_(1)
            mean, variance = pair[:, : bn.num_features].to(running_mean.dtype).unbind()
            if bn.momentum is not None:
                share: Any = bn.momentum
            else:
                share = 0.0 if count is None else 1.0 / count.to(mean.dtype)
            running_mean.lerp_(mean, share)
            running_var.lerp_(variance * factor, share)

    def _unbiased(self, shape: torch.Size) -> list[float]:
        """Return what each unit's biased variance is multiplied by to be unbiased."""
        batch, _, height, width = shape
        factors = []
        for stride in self.strides:
            count = batch * height * width
            factors.append(count / max(1, count - 1))
            height, width = -(-height // stride), -(-width // stride)
        return factors
