"""All 2^n paths of a network by length, as rows of a run: exact sums of gradients, and signed estimates of the sums
of squared norms.

Sampled paths (`pathnet.experiments.path_gradients`) show how large single path gradients are. Only the sums show how
much of them cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pathnet import results
from pathnet.experiments.plans import MOST_DRAWS
from pathnet.experiments.units import Amounts, Rows, measure_units
from pathnet.results import LARGEST, Range
from pathnet.tape import Tape
from pathnet.training import Progress

__all__ = ["ExactSum", "SignedDraw", "measure_exact", "measure_signed"]

COSINE = Range(-1.0 - 1e-6, 1.0 + 1e-6, nan=True)
"""Range of a cosine in float64, with room for rounding; NaN if one of the vectors is zero."""

RecordBatch = Callable[[int], Tape]
"""Function that records the batch with a given number."""


@dataclass(frozen=True)
class ExactSum:
    """The exact sum G_k of the gradients of all paths of one length on one batch: a row of a run.

    G, the sum of all G_k, is the ordinary gradient. In highway networks it lacks the gradient that flows through the
    gates themselves, which no path contains.

    Attributes:
        batch: the number of the batch.
        length: k, 0 to n.
        norm: norm of G_k.
        next_cosine: cosine between G_k and G_{k+1}; NaN at length n, and if one of them is zero.
        full_cosine: cosine between G_k and G.
        share: share of G that G_k explains, ``<G_k, G> / |G|^2``.
        left: ``|G - G_0 - ... - G_k| / |G|``: relative norm of the remainder that the lengths up to k leave.
        full_norm: norm of G, the same in all rows of a batch.
        engine: the name of the engine.
    """

    PART: ClassVar[str] = "exact"
    MEASURED: ClassVar[tuple[str, ...]] = (
        "norm",
        "next_cosine",
        "full_cosine",
        "share",
        "left",
        "full_norm",
        "engine",
    )
    # If the whole gradient is zero, there is no share of it, and the relative remainder is NaN or infinite.
    RANGES: ClassVar[Mapping[str, Range]] = {
        "next_cosine": COSINE,
        "full_cosine": COSINE,
        "share": Range(-LARGEST, nan=True),
        "left": Range(0, math.inf, nan=True),
    }

    batch: int
    length: int
    norm: float
    next_cosine: float
    full_cosine: float
    share: float
    left: float
    full_norm: float
    engine: str


@dataclass(frozen=True)
class SignedDraw:
    """The estimate of one signed draw for one length on one batch: a row of a run.

    Attributes:
        batch: the number of the batch.
        draw: the number of the draw on that batch, from 0.
        length: k, 0 to n.
        squared_norm: estimate of the sum of the squared norms of all path gradients of length k.
        engine: the name of the engine.
    """

    PART: ClassVar[str] = "signed"
    MEASURED: ClassVar[tuple[str, ...]] = ("squared_norm", "engine")
    RANGES: ClassVar[Mapping[str, Range]] = {}

    batch: int
    draw: int
    length: int
    squared_norm: float
    engine: str


def measure_exact(
    run: results.Run,
    batches: int,
    record: RecordBatch,
    progress: Progress | None = None,
    any_threads: bool = False,
) -> None:
    """Measure the exact sums that the run lacks on batches 0 to ``batches`` - 1.

    Args:
        run: the run to add to.
        batches: number of batches.
        record: records a batch.
        progress: called with (batches done, batches in total, a note).
        any_threads: see `pathnet.experiments.units.measure_units`.

    Raises:
        ValueError: a sum is not finite.
    """

    def missing() -> list[int]:
        known = {row.batch for row in run.rows(ExactSum)}
        return [batch for batch in range(batches) if batch not in known]

    _measure(
        run, batches, run.workers.agree(missing), lambda batch: _exact(record(batch), batch), progress, any_threads
    )


def measure_signed(
    run: results.Run,
    batches: int,
    draws: int,
    seed: int,
    record: RecordBatch,
    progress: Progress | None = None,
    any_threads: bool = False,
) -> None:
    """Measure the signed draws 0 to ``draws`` - 1 that the run lacks on each of the batches 0 to ``batches`` - 1.

    Args:
        run: the run to add to.
        batches: number of batches.
        draws: number of draws on each batch.
        seed: seed of the signs.
        record: records a batch.
        progress: called with (batches done, batches in total, a note).
        any_threads: see `pathnet.experiments.units.measure_units`.

    Raises:
        ValueError: an estimate is not finite.
    """

    def missing() -> list[tuple[int, list[int]]]:
        known = {(row.batch, row.draw) for row in run.rows(SignedDraw)}
        by_batch = {batch: [draw for draw in range(draws) if (batch, draw) not in known] for batch in range(batches)}
        return [(batch, numbers) for batch, numbers in by_batch.items() if numbers]

    units = run.workers.agree(missing)
    _measure(
        run, batches, units, lambda unit: _signed(record(unit[0]), unit[0], unit[1], seed), progress, any_threads
    )


def _exact(tape: Tape, batch: int) -> list[ExactSum]:
    sums = tape.compare_lengths()
    columns = (sums.norm, sums.full_cosine, sums.share, sums.left)
    next_cosine = [*sums.next_cosine.tolist(), math.nan]
    _check_finite(tape, batch, sums.norm.tolist())
    return [
        ExactSum(batch, length, norm, next_, full_cosine, share, left, sums.full_norm, tape.engine)
        for length, (next_, norm, full_cosine, share, left) in enumerate(
            zip(next_cosine, *(column.tolist() for column in columns), strict=True)
        )
    ]


def _signed(tape: Tape, batch: int, draws: list[int], seed: int) -> list[SignedDraw]:
    """Take all draws from the first missing one to the last in one call, and return the missing ones."""
    first, last = draws[0], draws[-1]
    estimates = tape.squared_norms_by_length(last - first + 1, seed, batch * MOST_DRAWS + first)
    rows = []
    for draw in draws:
        values = estimates[draw - first].tolist()
        _check_finite(tape, batch, values)
        rows += [SignedDraw(batch, draw, length, value, tape.engine) for length, value in enumerate(values)]
    return rows


def _check_finite(tape: Tape, batch: int, values: list[float]) -> None:
    wrong = [length for length, value in enumerate(values) if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"engine: expected finite norms, got {values[wrong[0]]} from {tape.engine} (batch {batch}, "
            f"length {wrong[0]})"
        )


def _measure(
    run: results.Run,
    batches: int,
    units: list[Any],
    rows_of: Callable[[Any], list[ExactSum] | list[SignedDraw]],
    progress: Progress | None,
    any_threads: bool,
) -> None:
    def begin(unit: Any, _: object) -> Callable[[], tuple[Rows, str]]:
        rows = rows_of(unit)
        return lambda: (rows, f"batches, engine {rows[0].engine}")

    amounts = Amounts(batches, batches - len(units), [1] * len(units))
    measure_units(run, units, begin, amounts, progress, any_threads=any_threads)
