"""The lengths of the paths that carry the gradient, over the course of training.

A callback for training loops measures the exact sums of the gradients over all paths of each length
(`Tape.compare_lengths`) on a small fixed batch, and leaves the training unchanged.
"""

from pathnet.effective_depth.callback import EffectiveDepth
from pathnet.effective_depth.rows import Depth, read

__all__ = ["Depth", "EffectiveDepth", "read"]
