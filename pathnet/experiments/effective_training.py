"""The last experiment of section 5: networks trained with exactly k of their n residual modules a batch, so that only
short paths are trained, beside networks trained in full."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from pathnet import results
from pathnet.data import Data
from pathnet.experiments.drawn_paths import DrawnPaths, drawn_paths
from pathnet.experiments.errors import INTACT, Drawn, ErrorCounts, Spread, measure_errors
from pathnet.experiments.run import Claim, Networks, Plan, check_arguments, opened, unfinished
from pathnet.lesion import Lesion
from pathnet.training import Progress

__all__ = ["NAME", "EffectiveTraining", "claims", "measure", "summarise"]

NAME = "effective-training"
WORSE = 0.02
CHANCE_OF_DRAW = 1e-3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EffectiveTraining:
    """Test errors after training in full and with k of n modules.

    Attributes:
        modules, blocks: k and n.
        full: error rates of networks trained in full, float64 [seeds].
        effective: of those trained with k modules, by how they are tested: ``as it is``, with modules ``scaled by
            k/n``, with BN ``recalibrated``; each float64 [seeds].
        difference: effective less full, with its 95 % interval (Welch's t), by the same; NaN of single seeds.
        p_worse: of a difference as large, were there none (one-sided Welch test), by the same.
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
        """How networks trained with k modules are tested best."""
        return min(self.effective, key=lambda name: float(self.effective[name].mean()))


def measure(
    nets: Networks, data: Data, plan: Plan, folder: str | Path, progress: Progress | None = None
) -> results.Run:
    """The test errors of networks trained in full (``residual``) and with ``plan.modules`` modules (``effective``).

    Raises:
        ValueError: a network does not take the data or has fewer modules, or the folder holds another run.
    """
    check_arguments(nets, data, plan, folder, progress, ("residual", "effective"))
    least = min(net.n for net in nets["effective"])
    if plan.modules > least:
        raise ValueError(f"modules: expected at most {least} (the network's), got {plan.modules}")
    as_it_is = {kind: [[INTACT]] * len(own) for kind, own in nets.items()}
    scaled = {"effective": [[Drawn(0, 0, Lesion(scale=plan.modules / net.n))] for net in nets["effective"]]}
    settings = {"modules": plan.modules, "images": plan.images}
    with opened(NAME, nets, data, settings, {}, folder) as run:
        measure_errors(run, nets, data, plan, as_it_is, progress, bn="running")
        measure_errors(run, nets, data, plan, scaled, progress, bn="running")
        measure_errors(run, nets, data, plan, {"effective": as_it_is["effective"]}, progress, bn="recalibrated")
        return run


def summarise(run: results.Run) -> EffectiveTraining:
    """Errors by how networks are tested, and what is between them.

    Raises:
        ValueError: not all of them are measured yet.
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
    difference, p_worse = {}, {}
    for name, own in effective.items():
        low = high = p_worse[name] = np.nan
        if len(own) > 1 and len(full) > 1:
            test = scipy.stats.ttest_ind(own, full, equal_var=False)
            # Student's t allows for few values; where all are equal, it would give an interval of no width.
            low, high = test.confidence_interval() if np.ptp(own) + np.ptp(full) > 0 else (np.nan, np.nan)
            p_worse[name] = float(scipy.stats.ttest_ind(own, full, equal_var=False, alternative="greater").pvalue)
        difference[name] = Spread(float(own.mean() - full.mean()), float(low), float(high), min(len(own), len(full)))
    trained = drawn_paths([1.0] * blocks, modules)
    return EffectiveTraining(modules, blocks, full, effective, difference, p_worse, trained)


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of effective training beside this run."""
    found = summarise(run)
    best = found.best
    difference, p_worse = found.difference[best], found.p_worse[best]
    seeds = min(len(found.full), len(found.effective[best]))
    test = f"p = {p_worse:.2g} over {seeds} seeds" if np.isfinite(p_worse) else "one seed: no test"
    expected = found.modules / 2
    return [
        Claim(
            f"Training with {found.modules} of {found.blocks} modules a batch, so with short paths alone, is not "
            "significantly worse than training in full.",
            "section 5",
            f"tested in the best of three ways, at most {100 * WORSE:g} points worse, and not significantly (p above "
            "0.05)",
            f"{best}: {difference} of error more ({test}); {100 * found.full.mean():.3g} % trained in full",
            bool(difference.mean <= WORSE and not p_worse <= 0.05),
        ),
        Claim(
            f"The paths trained are binomially distributed, centred on {expected:g} modules.",
            "section 5",
            f"a chi-square test of {int(found.trained.drawn.sum())} drawn paths has a p above {CHANCE_OF_DRAW:g}",
            f"mean length {found.trained.mean:.3g}, p = {found.trained.p_value:.2g}",
            bool(found.trained.p_value > CHANCE_OF_DRAW),
        ),
    ]
