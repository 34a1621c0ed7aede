"""Networks inside the wrappers of PyTorch."""

from __future__ import annotations

from typing import Any

from torch import nn

from pathnet.models.residual_net import ResidualNet, described_net

__all__ = ["unwrapped"]


def unwrapped(net: nn.Module) -> ResidualNet:
    """Return the network inside DistributedDataParallel, `torch.compile`'s module, or both; or the network itself.

    Raises:
        ValueError: there is no `ResidualNet` inside.
    """
    inner: Any = net
    while not isinstance(inner, ResidualNet):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"net: expected a pathnet ResidualNet, or one wrapped, got {described_net(net)}")
    return inner
