"""The network, batch and competitors of one run, without those whose results are wrong."""

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
"""Largest relative difference of a norm from the first competitor's of its BN mode on the timed network.

It is large in float32 too, since each competitor's forward pass flips some ReLU bits.
"""

WHOLE_RUN = 100
"""Approximate time of a run with the fewest rounds, in times of one path of the loop (a forward and a backward
pass)."""
SMALLEST_PART = 16
"""Batches are cut to no less than this fraction: in smaller ones, calls take longer than computations."""
PROBES = (4, 16)
"""Numbers of images on which one path of the loop is timed, the second only if the first was quick."""
BUILDING = 4
"""Approximate time to build a competitor, in times of its norms of one path of each timed length."""


def seconds_an_image(net: ResidualNet, sizes: Sizes, budget: Budget) -> float:
    """Return the seconds per image of one path of the loop on this machine."""
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
    """Return the sizes with the largest batches that leave time for the fewest rounds.

    If batches are cut, torch.compile is left out, since it takes minutes on a slow machine for any batch.

    Args:
        each: seconds per image of one path of the loop.
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
    """The network, batch and competitors of one run; competitors are built at first use.

    Attributes:
        unlimited: sizes of a run without limits.
        sizes: sizes that fit the budget.
        budget: budget of the current step.
        refused: competitors whose results are wrong, with the reason.
        left_out: competitors that there was no time for, with the reason.
        seconds: seconds of each competitor for one path of each length.
        check_s: mean seconds to check one competitor on the small network.
    """

    def __init__(
        self, sizes: Sizes, builders: Mapping[Key, Builder] = BUILDERS, budget: Budget | None = None
    ) -> None:
        self.unlimited, self.builders, self.budget = sizes, builders, budget or Budget()
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
        """The path that represents each length, uint8 [1, n]."""
        return {length: pathnet.paths.sample(self.n, length, 1) for length in self.sizes.setup.lengths}

    @cached_property
    def checked(self) -> dict[Key, Checked]:
        """The errors of all competitors against float64 on the small network."""
        share = self.budget.share(1 / 2)
        checked = check(self.sizes.checked, self.sizes.compiled, self.builders, share)
        self.check_s = share.spent / max(1, len(checked))
        for key, result in checked.items():
            if not result.passed:
                self.refused[str(key)] = f"off by {result.norm:.1g} in norms, {result.gradient:.1g} in gradients"
        return checked

    @cached_property
    def competitors(self) -> dict[Key, Competitor]:
        """The competitors that may be timed.

        They agree with float64 on the small network, and with the first of their BN mode on the timed one.
        """
        admitted: dict[Key, Competitor] = {}
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
            difference = max(abs(norm / expected - 1) for norm, expected in zip(norms, judge, strict=True))
            if difference < AGREEMENT[key.precision]:
                admitted[key] = competitor
            else:
                self.refused[str(key)] = f"its norms are off by {difference:.1g} on the network that is timed"
        return admitted

    def _norm(self, key: Key, competitor: Competitor, length: int) -> float:
        start = self.budget.clock()
        norm = float(competitor.norms(self.paths[length]))
        self.seconds[key, length] = self.budget.clock() - start
        return norm

    def _no_time_for(self, key: Key) -> str | None:
        """Return why there is no time to build a competitor, or None.

        Its time is predicted from that of the first competitor and the times of both on the small network.
        """
        if key not in self.checked:
            return "the time for the checks was over"
        predicted = [
            (BUILDING + 1) * self.seconds[first, length] * self.checked[key].seconds / self.checked[first].seconds
            for first, length in self.seconds
            if first == next(iter(self.seconds))[0]
        ]
        try:
            self.budget.require(sum(predicted), "to build and check it")
        except LeftOut as left_out:
            return str(left_out)
        return None
