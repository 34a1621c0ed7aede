"""Residual blocks by fused kernels in training: one block as a function, and whole networks."""

from pathnet.nn.fusing import FusedNet, fuse
from pathnet.nn.residual import fused_residual

__all__ = ["FusedNet", "fuse", "fused_residual"]
