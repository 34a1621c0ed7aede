"""The paths that training takes when it draws residual modules: those through the modules of a step."""

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
    """Lengths of paths, one drawn uniformly from those of each step's modules.

    Attributes:
        drawn: int64 [n + 1], how many of the steps' paths had each length.
        expected: float64 [n + 1], the probability of each length.
    """

    drawn: NDArray[np.int64]
    expected: Array

    @property
    def mean(self) -> float:
        """The mean length drawn."""
        return float((np.arange(len(self.drawn)) * self.drawn).sum() / self.drawn.sum())

    @property
    def p_value(self) -> float:
        """Of what was drawn, by a chi-square test; lengths that are expected fewer than five times count as one."""
        steps = self.drawn.sum()
        common = self.expected * steps >= LEAST_EXPECTED
        observed = np.append(self.drawn[common], self.drawn[~common].sum())
        expected = np.append(self.expected[common], self.expected[~common].sum()) * steps
        kept = expected > 0
        if observed[~kept].any():
            return 0.0
        scale = observed[kept].sum() / expected[kept].sum()
        return float(scipy.stats.chisquare(observed[kept], expected[kept] * scale).pvalue)


def drawn_paths(survival: Sequence[float], modules: int = 0, seed: int = 0) -> DrawnPaths:
    """What the schedule of a training draws, and the distribution that it should have.

    Args:
        survival: the probability of each of the n modules to be drawn, where ``modules`` is 0.
        modules: drawn in every step, exactly as many: lengths are then Binomial(modules, 1/2).
        seed: of the training.
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
        # Each module is on the path with half its own probability: the distributions of single modules convolved.
        expected = np.ones(1)
        for probability in survival:
            expected = np.convolve(expected, [1 - probability / 2, probability / 2])
    return DrawnPaths(np.bincount(lengths, minlength=n + 1), expected)
