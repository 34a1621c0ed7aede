"""Paths through the residual modules that training draws in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray
from torch import nn

from pathnet.models import Block, ResidualNet
from pathnet.streams import stream
from pathnet.training import Recipe
from pathnet.training.sampling import drawn_modules

__all__ = ["DrawnPaths", "drawn_paths"]

STEPS = 2000
LEAST_EXPECTED = 5.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DrawnPaths:
    """Lengths of paths; each step draws one path uniformly from the paths through its modules.

    Attributes:
        drawn: int64 [n + 1], the number of steps whose path had each length.
        expected: float64 [n + 1], the probability of each length.
    """

    drawn: NDArray[np.int64]
    expected: Array

    @property
    def mean(self) -> float:
        """Mean length of the drawn paths."""
        return float((np.arange(len(self.drawn)) * self.drawn).sum() / self.drawn.sum())

    @property
    def p_value(self) -> float:
        """P-value of a chi-square test of the drawn lengths; those expected fewer than five times count as one."""
        steps = self.drawn.sum()
        common = self.expected * steps >= LEAST_EXPECTED
        observed = np.append(self.drawn[common], self.drawn[~common].sum())
        expected = np.append(self.expected[common], self.expected[~common].sum()) * steps
        possible = expected > 0
        if observed[~possible].any():
            return 0.0
        scale = observed[possible].sum() / expected[possible].sum()
        return float(scipy.stats.chisquare(observed[possible], expected[possible] * scale).pvalue)


def drawn_paths(survival: Sequence[float], modules: int = 0, seed: int = 0) -> DrawnPaths:
    """Draw paths by the schedule of a training, and compute the distribution of their lengths.

    Args:
        survival: the probability that each of the n modules is drawn, if ``modules`` is 0.
        modules: exact number of modules drawn in every step; lengths then follow Binomial(modules, 1/2).
        seed: seed of the training.
    """
    n = len(survival)
    blocks = [Block() for _ in survival]
    for block, probability in zip(blocks, survival, strict=True):
        block.survival = probability
    net = ResidualNet(nn.Identity(), blocks, nn.Identity())
    recipe = Recipe(modules=modules, seed=seed)
    lengths = np.empty(STEPS, np.int64)
    for step in range(STEPS):
        drawn = drawn_modules(net, recipe, step)
        available = n if drawn is None else sum(drawn)
        lengths[step] = stream(seed, "drawn path", step).integers(0, 2, available).sum()
    if modules:
        expected = scipy.stats.binom.pmf(np.arange(n + 1), modules, 0.5)
    else:
        # Each module is on the path with half its probability; the distributions of single modules are convolved.
        expected = np.ones(1)
        for probability in survival:
            expected = np.convolve(expected, [1 - probability / 2, probability / 2])
    return DrawnPaths(np.bincount(lengths, minlength=n + 1), expected)
