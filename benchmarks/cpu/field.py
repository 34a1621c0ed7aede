"""The network, batch and competitors of one run; nobody is in it whose numbers are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

import pathnet
from benchmarks.cases import batch, network
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.cpu.cases import Sizes, with_batch
from benchmarks.cpu.competitors import BUILDERS, Builder, Checked, Competitor, Key, check, loop
from pathnet.models import ResidualNet

__all__ = ["AGREEMENT", "Field", "fitting_sizes", "seconds_an_image"]

AGREEMENT = {"float32": 2e-2, "bfloat16": 5e-2}
"""How far a norm may be from the first competitor's of its BN mode on the network that is timed.

In float32 too: every forward pass there flips ReLU bits of its own.
"""

WHOLE_RUN = 100
"""A whole run of the fewest rounds takes some so many times one path of the loop: a forward and a backward pass."""
SMALLEST_PART = 16
"""Batches are cut to no less than such a part: in smaller ones, calls take longer than what they compute."""
PROBES = (4, 16)
"""Images on which one path of the loop is tried, the second only where the first was quick."""
BUILDING = 4
"""To be built, a competitor takes some so many times the norms of one path of each length that is timed."""


def seconds_an_image(net: ResidualNet, sizes: Sizes, budget: Budget) -> float:
    """How long one path of the loop takes on this machine, for each image."""
    path, each = torch.ones(1, net.n, dtype=torch.uint8), 0.0
    for size in PROBES:
        competitor = loop(net, *batch(sizes.setup, size=min(size, sizes.setup.batch)), False)
        tried = []
        # The first try of a size warms up.
        for _ in range(2):
            start = budget.clock()
            competitor.norms(path)
            tried.append(budget.clock() - start)
        each = min(tried) / min(size, sizes.setup.batch)
        if WHOLE_RUN * each * PROBES[-1] > budget.left:
            break
    return each


def fitting_sizes(sizes: Sizes, each: float, budget: Budget) -> Sizes:
    """The sizes with the largest batches that leave time for the fewest rounds.

    Where batches are cut, torch.compile, which takes minutes on a slow machine whatever the batch, takes no part.

    Args:
        each: seconds that one path of the loop takes for an image.
    """
    wanted = images = sizes.setup.batch
    while images > max(1, wanted // SMALLEST_PART) and WHOLE_RUN * each * images > budget.left:
        images //= 2
    if images == wanted:
        return sizes
    because = f"one path of the loop takes {each * wanted:.3g} s for {wanted} images"
    budget.cut("images of a batch, and all other batches in proportion", wanted, images, because)
    if sizes.compiled:
        budget.cut("torch.compile in the composition", True, False, because)
    return replace(with_batch(sizes, images), compiled=False)


class Field:
    """Everyone, built when first asked for.

    Attributes:
        asked: the sizes of a run without limits.
        sizes: those that fit the budget.
        budget: of the step that is being taken.
        refused: who is wrong, and why.
        left_out: whom there was no time for, and why.
        seconds: that each of the competitors took for one path of each length.
        check_s: seconds that it took to check one competitor on the small network, on average.
    """

    def __init__(
        self, sizes: Sizes, builders: Mapping[Key, Builder] = BUILDERS, budget: Budget | None = None
    ) -> None:
        self.asked, self.builders, self.budget = sizes, builders, budget or Budget()
        self.net = network(sizes.setup)
        self.sizes = fitting_sizes(sizes, seconds_an_image(self.net, sizes, self.budget), self.budget)
        self.images, self.labels = batch(self.sizes.setup)
        self.n = self.net.n
        self.refused: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.seconds: dict[tuple[Key, int], float] = {}
        self.check_s = 0.0

    @cached_property
    def paths(self) -> dict[int, Tensor]:
        """uint8 [1, n]: the path that stands for each length."""
        return {length: pathnet.paths.sample(self.n, length, 1) for length in self.sizes.setup.lengths}

    @cached_property
    def checked(self) -> dict[Key, Checked]:
        share = self.budget.share(1 / 2)
        found = check(self.sizes.checked, self.sizes.compiled, self.builders, share)
        self.check_s = share.taken / max(1, len(found))
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
            if reason := self._no_time_for(key):
                self.left_out[str(key)] = reason
                self.budget.cut(f"competitor {key}", True, None, reason)
                continue
            if not self.checked[key].passed:
                continue
            competitor = build(self.net, self.images, self.labels, self.sizes.compiled)
            norms = [self._norm(key, competitor, length) for length in self.paths]
            judge = judges.setdefault(key.bn, norms)
            apart = max(abs(own / other - 1) for own, other in zip(norms, judge, strict=True))
            if apart < AGREEMENT[key.precision]:
                found[key] = competitor
            else:
                self.refused[str(key)] = f"its norms are off by {apart:.1g} on the network that is timed"
        return found

    def _norm(self, key: Key, competitor: Competitor, length: int) -> float:
        start = self.budget.clock()
        norm = float(competitor.norms(self.paths[length]))
        self.seconds[key, length] = self.budget.clock() - start
        return norm

    def _no_time_for(self, key: Key) -> str | None:
        """Why a competitor is not even built: by its time on the small network beside that of one built before."""
        if key not in self.checked:
            return "the time for the checks was over"
        foretold = [
            (BUILDING + 1) * self.seconds[other, length] * self.checked[key].seconds / self.checked[other].seconds
            for other, length in self.seconds
            if other == next(iter(self.seconds))[0]
        ]
        try:
            self.budget.require(sum(foretold), "to build and check it")
        except LeftOut as left_out:
            return str(left_out)
        return None
