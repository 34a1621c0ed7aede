"""Division of a network's factors by powers of two, for backward passes along paths.

Kernels rescale a gradient between blocks, not between the units of a residual module: a module whose weights and BN
factors shrink a gradient by 1e-40 would leave nothing of it in float32, although its norm, as mantissa and power of
two, is well in range. So the factors of such a module, and of such a skip, are divided by powers of two, which is
exact, and the results of a backward pass are multiplied by them at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.tables import BlockColumn, Skip, Tables, UnitColumn

__all__ = ["Divided", "Magnitudes", "divided", "multiplied"]

ORDINARY = 40
"""Maximum exponent of ordinary factors: a branch stays as it is while its factors, and their product, are within
2^-40 and 2^40."""

FAR = 100
"""Difference of exponents, in sums by length, above which the larger of a block's branches is lifted above 1."""

LIFT = 60
"""Exponent of that lift; it keeps the smaller branch a normal number down to 2^-160."""


@dataclass(frozen=True)
class Magnitudes:
    """The powers of two that each block's branches were divided by.

    Attributes:
        branches: int64 [n, 2], the exponents of skip and residual module; on the CPU.
    """

    branches: Tensor

    def of_routing(self, routing: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routing that gives the same gradients in the divided network.

        Args:
            routing: [P, n, 2], the (a, c) of every block.

        Returns:
            A routing of the same type and on the same device; and int32 [P], the powers of two to multiply its
            gradients by.
        """
        return self._shifted(routing, 0)

    def of_sums(self, routing: Tensor) -> tuple[Tensor, Tensor]:
        """Like `of_routing`, for the sums by length under one routing [n, 2], with int32 [1, 1] for all sums.

        Both branches of a block matter there, whatever their sizes: they may be up to 2^160 apart.
        """
        shifted, exponents = self._shifted(routing[None], LIFT)
        return shifted[0], exponents[:, None]

    def of_block(
        self, block: int, coefficients: Sequence[tuple[float, ...]]
    ) -> tuple[list[tuple[float, float]], Tensor]:
        """Like `of_routing`, for one block: its (a, c) for each of g gradients, and int32 [g]."""
        alone = replace(self, branches=self.branches[block : block + 1])
        shifted, exponents = alone.of_routing(torch.tensor(coefficients, dtype=torch.float64).reshape(-1, 1, 2))
        return [(a, c) for a, c in shifted[:, 0].tolist()], exponents

    def _shifted(self, routing: Tensor, lift: int) -> tuple[Tensor, Tensor]:
        coefficients = routing.detach().double().cpu()
        nothing = torch.iinfo(torch.int64).min
        exponents = self.branches.expand(coefficients.shape).where(coefficients != 0, nothing)
        largest, least = exponents.amax(-1), self.branches.expand(coefficients.shape).amin(-1)
        # A block without branches gives zeros, whatever they are multiplied by.
        largest = largest.where(largest != nothing, 0)
        shift = largest - lift * ((largest - least > FAR) & (coefficients != 0).all(-1)).long()
        shifted = scaling.times_power_of_two(
            coefficients, (self.branches - shift[..., None]).clamp(-2000, 2000).int()
        )
        # Denormal coefficients become zero: kernels may flush them, and leave out a branch whose coefficient is zero.
        shifted = shifted.where(shifted.abs() >= torch.finfo(torch.float32).tiny, 0.0)
        return shifted.to(routing.dtype).to(routing.device), shift.sum(-1).int()


@dataclass(frozen=True)
class Divided:
    """A network's tables for backward passes, weights and scales divided by powers of two.

    Attributes:
        weights: int64 [U], the exponents of the powers of two that each unit's weights were divided by.
        scales: int64 [U], likewise for the factors of each unit's BN; 0 where it has none.
        magnitudes: the resulting powers of two of the branches; None where nothing was divided.
    """

    tables: Tables
    weights: Tensor
    scales: Tensor
    magnitudes: Magnitudes | None

    @property
    def by_channel(self) -> Tensor:
        """int32 [len(tables.scales)], the exponents of each channel's factor."""
        exponents = torch.zeros(len(self.tables.scales), dtype=torch.int32)
        for unit, exponent in zip(self.tables.units.tolist(), self.scales.tolist(), strict=True):
            exponents[_scales_of(unit)] = exponent
        return exponents


def divided(tables: Tables) -> Divided:
    """Divide by powers of two the weights and BN factors of branches that are outside the ordinary range.

    Each unit's weights, and its BN's factors, are divided by the power of two of their largest, to make gradients
    between two units as large as those that enter and leave the branch.
    """
    units = tables.units.tolist()
    weight_exponents = torch.zeros(len(units), dtype=torch.int64)
    scale_exponents = torch.zeros_like(weight_exponents)
    branches = torch.zeros(len(tables.blocks), 2, dtype=torch.int64)
    exponents = [_exponents(tables, unit) for unit in units]
    for block, row in enumerate(tables.blocks.tolist()):
        first, projection = row[BlockColumn.FIRST], row[BlockColumn.PROJECTION]
        projects = row[BlockColumn.SKIP] == Skip.PROJECTION
        module = _with_end(units, range(first, first + row[BlockColumn.COUNT]))
        shared = [first] if projects else []
        skip_units = _with_end(units, range(projection, projection + 1)) if projects else []
        factors = [exponent for unit in (*module, *skip_units) for exponent in exponents[unit]]
        residual = sum(sum(exponents[unit]) for unit in module)
        skipped = sum(sum(exponents[unit]) for unit in skip_units) + sum(exponents[unit][1] for unit in shared)
        if max(map(abs, (*factors, residual, skipped))) <= ORDINARY:
            continue
        for unit in (*module, *skip_units):
            weight_exponents[unit], scale_exponents[unit] = exponents[unit]
        branches[block] = torch.tensor([skipped, residual])
    if not branches.any() and not weight_exponents.any() and not scale_exponents.any():
        return Divided(tables, weight_exponents, scale_exponents, None)
    result = Divided(tables, weight_exponents, scale_exponents, Magnitudes(branches))
    weights = tables.weights.clone()
    for unit, exponent in zip(units, weight_exponents.tolist(), strict=True):
        part = _weights_of(unit)
        weights[part] = scaling.times_power_of_two(weights[part], torch.tensor(-exponent))
    scales = scaling.times_power_of_two(tables.scales, -result.by_channel)
    return replace(result, tables=replace(tables, weights=weights, scales=scales))


def multiplied(norms: Tensor, gradients: Tensor, exponents: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of a backward pass through the divided network, multiplied by powers of two.

    Args:
        norms: float64 [P, B]
        gradients, exponents: [P, B, ...] and int32 [P, B] or [P, 1]; empty (P = 0) where they were not requested.
        shifts: int32 [P, 1] or [1, 1], on the same device.
    """
    norms = scaling.times_power_of_two(norms, shifts.expand(norms.shape))
    return norms, gradients, exponents + shifts if len(exponents) else exponents


def _with_end(units: Sequence[Sequence[int]], branch: range) -> list[int]:
    """Return the rows of a branch, and the row of the BN that ends it, where there is one."""
    ends = branch.stop < len(units) and units[branch.stop][UnitColumn.KERNEL] == 0
    return [*branch, *([branch.stop] if ends else [])]


def _weights_of(unit: Sequence[int]) -> slice:
    begin, kernel = unit[UnitColumn.WEIGHTS], unit[UnitColumn.KERNEL]
    return slice(begin, begin + unit[UnitColumn.CHANNELS] * unit[UnitColumn.OUT_CHANNELS] * kernel * kernel)


def _scales_of(unit: Sequence[int]) -> slice:
    begin = unit[UnitColumn.SCALES]
    return slice(begin, begin + unit[UnitColumn.CHANNELS]) if begin >= 0 else slice(0)


def _exponents(tables: Tables, unit: Sequence[int]) -> tuple[int, int]:
    """Return the exponents of the largest of a unit's weights and of its BN's factors; 0 where there are none."""
    return _exponent(tables.weights[_weights_of(unit)]), _exponent(tables.scales[_scales_of(unit)])


def _exponent(values: Tensor) -> int:
    largest = values.abs().max() if len(values) else values.new_zeros(())
    return int(torch.frexp(largest).exponent) if torch.isfinite(largest) else 0
