"""One driver for each figure and table of the paper: what it needs, measures, and claims."""

from __future__ import annotations

from pathnet.extras import require

require("scipy", "pathnet.experiments tests hypotheses with scipy")

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pathnet import results
from pathnet.data import Data
from pathnet.experiments import (
    effective_training,
    highway,
    lesion_many,
    lesion_reorder,
    lesion_single,
    lesion_stochastic_depth,
    path_gradients,
    remaining_paths,
    unraveled,
)
from pathnet.experiments.path_gradients import PathGradients
from pathnet.experiments.run import Claim, Networks, Plan, check_arguments
from pathnet.training import Progress

__all__ = ["EXPERIMENTS", "Experiment", "claims"]

Measure = Callable[[Networks, Data, Plan, Path, Progress | None], list[results.Run]]


@dataclass(frozen=True)
class Experiment:
    """A driver.

    Attributes:
        paper: where the paper has it.
        about: what it does, in a line.
        networks: the kinds of network that it takes.
        any_of_them: whether one of the kinds is enough.
        measure: makes or goes on with its runs, in a folder of its own.
        claims: what the paper says beside a run.
    """

    paper: str
    about: str
    networks: tuple[str, ...]
    measure: Measure
    claims: Callable[[results.Run], list[Claim]]
    any_of_them: bool = False


def claims(run: results.Run) -> list[Claim]:
    """What the paper says of the experiment of a run, beside what the run measured.

    Raises:
        ValueError: the run is of an experiment that is not known.
    """
    results.check_run("run", run)
    if run.experiment not in EXPERIMENTS:
        raise ValueError(f"run: {run.folder} is of {run.experiment!r}; expected one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[run.experiment].claims(run)


def _one_run(
    measure: Callable[[Networks, Data, Plan, Path, Progress | None], results.Run],
) -> Measure:
    return lambda nets, data, plan, folder, progress: [measure(nets, data, plan, folder, progress)]


def _gradients(nets: Networks, data: Data, plan: Plan, folder: Path, progress: Progress | None) -> list[results.Run]:
    """A run for each network, of sampled paths and of exact sums; that of the first lies in the folder itself."""
    check_arguments(nets, data, plan, folder, progress, ("residual",))
    settings = PathGradients(batches=plan.batches, seed=plan.plan_seed)
    settings = replace(settings, batch_size=min(settings.batch_size, len(data.train)))
    runs = []
    for seed, net in enumerate(nets["residual"]):
        own = folder / f"seed-{seed}" if seed else folder
        run = path_gradients.measure(net, data, settings, own, progress)
        if plan.exact_batches:
            exact = replace(settings, method="exact", batches=min(plan.batches, plan.exact_batches))
            run = path_gradients.measure(net, data, exact, own, progress)
        runs.append(run)
    return runs


EXPERIMENTS = {
    unraveled.NAME: Experiment(
        "section 3, Figures 1 and 2",
        "The unraveled view: the nested expression, and the sum over all paths, equal the network.",
        (),
        _one_run(unraveled.measure),
        unraveled.claims,
    ),
    lesion_single.NAME: Experiment(
        "section 4.1, Figures 3 and 4",
        "Delete each single block of residual networks, and each layer of VGGs.",
        ("residual", "vgg"),
        _one_run(lesion_single.measure),
        lesion_single.claims,
        any_of_them=True,
    ),
    lesion_many.NAME: Experiment(
        "section 4.2, Figure 5 (a)",
        "Delete several random blocks at once.",
        ("residual",),
        _one_run(lesion_many.measure),
        lesion_many.claims,
    ),
    lesion_reorder.NAME: Experiment(
        "section 4.3, Figure 5 (b)",
        "Swap random pairs of blocks of equal shape.",
        ("residual",),
        _one_run(lesion_reorder.measure),
        lesion_reorder.claims,
    ),
    path_gradients.NAME: Experiment(
        "section 5, Figure 6",
        "Path lengths, gradient by length, their product, effective range; what cancels in exact sums.",
        ("residual",),
        _gradients,
        path_gradients.claims,
    ),
    effective_training.NAME: Experiment(
        "section 5",
        "Networks trained with exactly k of n modules a batch beside networks trained in full.",
        ("residual", "effective"),
        _one_run(effective_training.measure),
        effective_training.claims,
    ),
    remaining_paths.NAME: Experiment(
        "section 5, Figure 7, equation 8",
        "The share of the paths of each length that deletions leave.",
        (),
        _one_run(remaining_paths.measure),
        remaining_paths.claims,
    ),
    lesion_stochastic_depth.NAME: Experiment(
        "section 5, Figure 8",
        "Delete each single block of networks trained with stochastic depth, and of plain ones.",
        ("residual", "stochastic depth"),
        _one_run(lesion_stochastic_depth.measure),
        lesion_stochastic_depth.claims,
    ),
    highway.NAME: Experiment(
        "section 2, equation 3",
        "Highway networks: lesions, learned gates, paths with frozen gates and the gates' own share.",
        ("highway",),
        _one_run(highway.measure),
        highway.claims,
    ),
}
