"""The last experiment of section 5: networks trained with exactly k of their n residual modules per batch, so only
short paths are trained, compared with networks trained in full."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import results
from pathnet.data import Batches, Data
from pathnet.experiments.claims import Claim, Verdict, at_most, exactly
from pathnet.experiments.drawn_paths import DrawnPaths, drawn_paths
from pathnet.experiments.errors import INTACT, DrawnLesion, ErrorCounts, Spread, measure_errors
from pathnet.experiments.run import Networks, Plan, check_arguments, open_run, unfinished
from pathnet.lesion import Lesion
from pathnet.lesion.recalibration import check_training_split
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = ["NAME", "EffectiveTraining", "claims", "compared", "measure", "summarise"]

NAME = "effective-training"
WORSE = 0.02
SIGNIFICANT = 0.05
CHANCE_OF_DRAW = 1e-3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EffectiveTraining:
    """Test errors after training in full and with k of n modules.

    Networks trained with k modules are tested in three ways: ``as it is``, with modules ``scaled by k/n``, and with
    batch normalisation ``recalibrated``.

    Attributes:
        modules, blocks: k and n.
        full: error rates of networks trained in full, float64 [seeds].
        effective: error rates of networks trained with k modules, by way of testing, each float64 [seeds].
        difference: mean of ``effective`` minus mean of ``full`` with its 95 % interval (Welch's t), by way of
            testing; the interval is NaN for single seeds.
        p_worse: p-value of the one-sided Welch test that ``effective`` is worse, by way of testing.
        trained: the paths that training with k modules takes.
    """

    modules: int
    blocks: int
    full: Array
    effective: dict[str, Array]
    difference: dict[str, Spread]
    p_worse: dict[str, float]
    trained: DrawnPaths

    @property
    def best(self) -> str:
        """Way of testing that gives networks trained with k modules the lowest mean error."""
        return min(self.effective, key=lambda name: float(self.effective[name].mean()))


def measure(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure test errors of networks trained in full (``residual``) and with ``plan.modules`` (``effective``).

    Raises:
        ValueError: a network does not accept the data or has fewer modules, or the folder holds another run.
    """
    source = check_arguments(nets, data, plan, folder, progress, ("residual", "effective"))
    check_training_split(source)
    least = min(net.n for net in nets["effective"])
    if plan.modules > least:
        raise ValueError(f"modules: expected at most {least} (the network's), got {plan.modules}")
    as_it_is = {kind: [[INTACT]] * len(seeds) for kind, seeds in nets.items()}
    scaled = {"effective": [[DrawnLesion(0, 0, Lesion(scale=plan.modules / net.n))] for net in nets["effective"]]}
    settings = {"modules": plan.modules, "images": plan.images}
    with open_run(NAME, nets, source, settings, {}, folder, workers) as run:
        measure_errors(run, nets, source, plan, as_it_is, progress, bn="running")
        measure_errors(run, nets, source, plan, scaled, progress, bn="running")
        measure_errors(run, nets, source, plan, {"effective": as_it_is["effective"]}, progress, bn="recalibrated")
        return run


def summarise(run: results.Run) -> EffectiveTraining:
    """Summarise errors by way of testing, and compare them with those of networks trained in full.

    Raises:
        ValueError: not all errors are measured yet.
    """
    counts = ErrorCounts(run)
    modules, blocks = run.fact("modules"), run.fact("networks", "effective", 0, "blocks")

    def rates(kind: str, bn: str, scale: float = 1.0) -> Array:
        return np.array([row.rate for row in counts.of(kind, bn=bn, scale=scale)])

    full = rates("residual", "running")
    effective = {
        "as it is": rates("effective", "running"),
        "scaled by k/n": rates("effective", "running", modules / blocks),
        "recalibrated": rates("effective", "recalibrated"),
    }
    seeds = {kind: len(run.fact("networks", kind)) for kind in ("residual", "effective")}
    if len(full) < seeds["residual"] or len(effective["recalibrated"]) < seeds["effective"]:
        raise unfinished(run)
    return compared(modules, blocks, full, effective)


def compared(modules: int, blocks: int, full: Array, effective: dict[str, Array]) -> EffectiveTraining:
    """Compare errors after training with some of the modules with those after training in full.

    Args:
        modules, blocks, full, effective: see `EffectiveTraining`.
    """
    difference, p_worse = {}, {}
    for name, errors in effective.items():
        low = high = p_worse[name] = np.nan
        if min(len(errors), len(full)) > 1 and np.ptp(errors) + np.ptp(full) > 0:
            # Student's t allows for few values; if all are equal, it would give an interval of zero width.
            low, high = scipy.stats.ttest_ind(errors, full, equal_var=False).confidence_interval()
            worse = scipy.stats.ttest_ind(errors, full, equal_var=False, alternative="greater")
            p_worse[name] = float(worse.pvalue)
        mean, seeds_tested = float(errors.mean() - full.mean()), min(len(errors), len(full))
        difference[name] = Spread(mean, float(low), float(high), seeds_tested)
    trained = drawn_paths([1.0] * blocks, modules)
    return EffectiveTraining(modules, blocks, full, effective, difference, p_worse, trained)


def claims(run: results.Run) -> list[Claim]:
    """Test the claims about effective training on a run."""
    training = summarise(run)
    best = training.best
    difference, p_worse = training.difference[best], training.p_worse[best]
    seeds = min(len(training.full), len(training.effective[best]))
    test = f"p = {p_worse:.2g} over {seeds} seeds" if np.isfinite(p_worse) else "no test"
    expected, trained = training.modules / 2, training.trained
    return [
        Claim(
            f"Training with {training.modules} of {training.blocks} modules per batch, that is, on short paths only, "
            "is not significantly worse than training in full.",
            "section 5",
            f"tested in the best of three ways, the error is at most {100 * WORSE:g} points higher (all of the "
            f"interval), and not significantly so (p above {SIGNIFICANT:g})",
            f"{best}: {difference.points} more error ({test}); trained in full, the error is "
            f"{100 * training.full.mean():.3g} %",
            _not_worse(difference, p_worse),
        ),
        Claim(
            f"The lengths of the trained paths are binomially distributed, centred on {expected:g} modules.",
            "section 5",
            f"a chi-square test of {int(trained.drawn.sum())} drawn paths has a p-value above {CHANCE_OF_DRAW:g}",
            f"mean length {trained.mean:.3g}, p = {trained.p_value:.2g}",
            exactly(trained.p_value > CHANCE_OF_DRAW),
        ),
    ]


def _not_worse(difference: Spread, p_worse: float) -> Verdict:
    """Return the verdict on a difference that should be small, by a margin, and not significant."""
    if p_worse <= SIGNIFICANT:
        return "did not hold"
    return at_most(difference.low, difference.high, WORSE)
