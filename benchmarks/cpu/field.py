"""The network, batch and competitors of one run; nobody is in it whose numbers are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

import pathnet
from benchmarks.cases import batch, network
from benchmarks.cpu.cases import Sizes
from benchmarks.cpu.competitors import BUILDERS, Builder, Checked, Competitor, Key, check

__all__ = ["AGREEMENT", "Field"]

AGREEMENT = {"float32": 2e-2, "bfloat16": 5e-2}
"""How far a norm may be from the first competitor's of its BN mode on the network that is timed.

In float32 too: every forward pass there flips ReLU bits of its own.
"""


class Field:
    """Everyone, built when first asked for."""

    def __init__(self, sizes: Sizes, builders: Mapping[Key, Builder] = BUILDERS) -> None:
        self.sizes, self.builders = sizes, builders
        self.net = network(sizes.setup)
        self.images, self.labels = batch(sizes.setup)
        self.n = self.net.n
        self.refused: dict[str, str] = {}

    @cached_property
    def paths(self) -> dict[int, Tensor]:
        """uint8 [1, n]: the path that stands for each length."""
        return {length: pathnet.paths.sample(self.n, length, 1) for length in self.sizes.setup.lengths}

    @cached_property
    def checked(self) -> dict[Key, Checked]:
        found = check(self.sizes.checked, self.sizes.compiled, self.builders)
        for key, own in found.items():
            if not own.passed:
                self.refused[str(key)] = f"off by {own.norm:.1g} in norms, {own.gradient:.1g} in gradients"
        return found

    @cached_property
    def competitors(self) -> dict[Key, Competitor]:
        """Who may be timed: held to float64, and on what is timed itself to the first of the same BN mode."""
        found: dict[Key, Competitor] = {}
        judges: dict[str, list[float]] = {}
        for key, build in self.builders.items():
            if not self.checked[key].passed:
                continue
            competitor = build(self.net, self.images, self.labels, self.sizes.compiled)
            norms = [float(competitor.norms(path)) for path in self.paths.values()]
            judge = judges.setdefault(key.bn, norms)
            apart = max(abs(own / other - 1) for own, other in zip(norms, judge, strict=True))
            if apart < AGREEMENT[key.precision]:
                found[key] = competitor
            else:
                self.refused[str(key)] = f"its norms are off by {apart:.1g} on the network that is timed"
        return found
