"""The experiments of the paper: the one list that studies, the report and the commands read.

To add an experiment: write ``measure`` and ``claims`` in a module of pathnet/experiments/, and its figure in
pathnet/figures/ with a function in `pathnet.figures.runs` that draws it from a run; add new amounts as fields of
`pathnet.experiments.plans.Plan`; then write a loader here and an entry in `EXPERIMENTS`. The command, its help and
the report follow.

A loader imports its modules only when it is called, so listing the experiments takes no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from pathnet.workers import ALONE, Workers

if TYPE_CHECKING:
    from pathnet import results
    from pathnet.data import Data
    from pathnet.experiments.claims import Claim
    from pathnet.experiments.plans import Plan
    from pathnet.experiments.run import Networks
    from pathnet.training import Progress

__all__ = ["EXPERIMENTS", "Driver", "Experiment", "claims", "draw"]

MeasureOne: TypeAlias = "Callable[[Networks, Data, Plan, Path, Progress | None, Workers], results.Run]"


class Measure(Protocol):
    """Function that starts or continues the runs of some networks in a folder."""

    def __call__(
        self,
        nets: Networks,
        data: Data,
        plan: Plan,
        folder: Path,
        progress: Progress | None = None,
        workers: Workers = ALONE,
    ) -> list[results.Run]:
        """Return the runs."""
        ...


@dataclass(frozen=True)
class Driver:
    """Functions of an experiment.

    Attributes:
        measure: starts or continues the runs of some networks in a folder, and returns them.
        claims: compares the paper's claims with what a run measured.
        draw: draws the figures of a run under a heading, and returns their files.

    Example:
        >>> from pathlib import Path
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> driver = pathnet.paper.EXPERIMENTS["lesion-single"].load()
        >>> plan = pathnet.experiments.Plan()
        >>> driver.measure({"residual": [net]}, data, plan, Path("run"))
        [<Run of lesion-single in run: 4 rows measured; no results yet>]
    """

    measure: Measure
    claims: Callable[[results.Run], list[Claim]]
    draw: Callable[[results.Run, str], list[Path]]


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Attributes:
        paper: sections and figures of the paper.
        about: description, in a sentence.
        networks: kinds of network that it needs.
        settings: fields of `pathnet.experiments.Plan` that it reads.
        load: imports its driver, a `Driver`, and returns it.
        any_of_them: whether one of the kinds is enough.

    Example:
        >>> import pathnet
        >>> experiment = pathnet.paper.EXPERIMENTS["highway"]
        >>> experiment.paper, experiment.networks
        ('section 2, equation 3', ('highway',))
    """

    paper: str
    about: str
    networks: tuple[str, ...]
    settings: tuple[str, ...]
    load: Callable[[], Driver]
    any_of_them: bool = False


def claims(run: results.Run) -> list[Claim]:
    """Return the paper's claims on the experiment of a run, next to what the run measured.

    Args:
        run: a run, as `pathnet.results.read` returns it.

    Returns:
        Claims, each with the attributes ``paper`` (the statement), ``where`` (section and figure), ``bound`` (the
        condition under which it holds), ``measured``, and ``verdict`` (see `pathnet.experiments.claims`).

    Raises:
        ValueError: the run is of an unknown experiment, or holds too little.

    Example:
        >>> from pathlib import Path
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> driver = pathnet.paper.EXPERIMENTS["lesion-single"].load()
        >>> plan = pathnet.experiments.Plan()
        >>> (run,) = driver.measure({"residual": [net]}, data, plan, Path("run"))
        >>> for claim in pathnet.paper.claims(run):
        ...     print(claim.paper)
        Deleting any one residual module, except a downsampling one, hardly changes the error of a residual network.
        Deleting a downsampling block matters more.
    """
    return _experiment_of(run).load().claims(run)


def draw(run: results.Run) -> list[Path]:
    """Draw the figures of a run into its folder, and return their files: PNG and SVG of each figure.

    Args:
        run: a run, as `pathnet.results.read` returns it.

    Raises:
        ValueError: the run is of an unknown experiment, or holds too little.
        OSError: a file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=8, width=8, num_classes=2, in_channels=1
        ... )
        >>> driver = pathnet.paper.EXPERIMENTS["lesion-single"].load()
        >>> plan = pathnet.experiments.Plan()
        >>> (run,) = driver.measure({"residual": [net]}, data, plan, Path("run"))
        >>> [str(file) for file in pathnet.paper.draw(run)]
        ['run/figures/figure-3.png', 'run/figures/figure-3.svg']
    """
    from pathnet.experiments.run import title

    return _experiment_of(run).load().draw(run, title(run.identity))


def _experiment_of(run: results.Run) -> Experiment:
    from pathnet import results

    results.check_run("run", run)
    if run.experiment not in EXPERIMENTS:
        raise ValueError(f"run: {run.folder} is of {run.experiment!r}; expected one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[run.experiment]


def _one_run(measure: MeasureOne) -> Measure:
    return lambda nets, data, plan, folder, progress=None, workers=ALONE: [
        measure(nets, data, plan, folder, progress, workers)
    ]


def _unraveled() -> Driver:
    from pathnet.experiments import unraveled
    from pathnet.figures.runs import draw_unraveled

    return Driver(_one_run(unraveled.measure), unraveled.claims, draw_unraveled)


def _lesion_single() -> Driver:
    from pathnet.experiments import lesion_single
    from pathnet.figures.runs import draw_lesion_single

    return Driver(_one_run(lesion_single.measure), lesion_single.claims, draw_lesion_single)


def _lesion_many() -> Driver:
    from pathnet.experiments import lesion_many
    from pathnet.figures.runs import draw_lesion_many

    return Driver(_one_run(lesion_many.measure), lesion_many.claims, draw_lesion_many)


def _lesion_reorder() -> Driver:
    from pathnet.experiments import lesion_reorder
    from pathnet.figures.runs import draw_lesion_reorder

    return Driver(_one_run(lesion_reorder.measure), lesion_reorder.claims, draw_lesion_reorder)


def _path_gradients() -> Driver:
    from pathnet.experiments import path_gradients
    from pathnet.figures.runs import draw_path_gradients

    return Driver(path_gradients.measure_each, path_gradients.claims, draw_path_gradients)


def _effective_training() -> Driver:
    from pathnet.experiments import effective_training
    from pathnet.figures.runs import draw_effective_training

    return Driver(_one_run(effective_training.measure), effective_training.claims, draw_effective_training)


def _remaining_paths() -> Driver:
    from pathnet.experiments import remaining_paths
    from pathnet.figures.runs import draw_remaining_paths

    return Driver(_one_run(remaining_paths.measure), remaining_paths.claims, draw_remaining_paths)


def _lesion_stochastic_depth() -> Driver:
    from pathnet.experiments import lesion_stochastic_depth
    from pathnet.figures.runs import draw_lesion_stochastic_depth

    measure = _one_run(lesion_stochastic_depth.measure)
    return Driver(measure, lesion_stochastic_depth.claims, draw_lesion_stochastic_depth)


def _highway() -> Driver:
    from pathnet.experiments import highway
    from pathnet.figures.runs import draw_highway

    return Driver(_one_run(highway.measure), highway.claims, draw_highway)


EXPERIMENTS = {
    "unraveled": Experiment(
        "section 3, Figures 1 and 2",
        "Check the unraveled view: the nested expression, and the sum over all paths, equal the network.",
        (),
        ("plan_seed",),
        _unraveled,
    ),
    "lesion-single": Experiment(
        "section 4.1, Figures 3 and 4",
        "Delete each single block of residual networks, and each layer of VGGs.",
        ("residual", "vgg"),
        ("bn", "images"),
        _lesion_single,
        any_of_them=True,
    ),
    "lesion-many": Experiment(
        "section 4.2, Figure 5 (a)",
        "Delete several random blocks at once.",
        ("residual",),
        ("draws", "deletions", "bn", "images", "plan_seed"),
        _lesion_many,
    ),
    "lesion-reorder": Experiment(
        "section 4.3, Figure 5 (b)",
        "Swap random pairs of blocks of equal shape.",
        ("residual",),
        ("draws", "swaps", "bn", "images", "plan_seed"),
        _lesion_reorder,
    ),
    "path-gradients": Experiment(
        "section 5, Figure 6",
        "Measure the networks of a study: the gradient along paths of each length, and how much cancels in the sum.",
        ("residual",),
        ("batches", "exact_batches", "plan_seed"),
        _path_gradients,
    ),
    "effective-training": Experiment(
        "section 5",
        "Compare networks trained with exactly k of n modules per batch with networks trained in full.",
        ("residual", "effective"),
        ("modules", "images"),
        _effective_training,
    ),
    "remaining-paths": Experiment(
        "section 6, Figure 7, equation 8",
        "Compute the share of the paths of each length that deletions leave.",
        (),
        ("plan_seed",),
        _remaining_paths,
    ),
    "lesion-stochastic-depth": Experiment(
        "section 6, Figure 8",
        "Delete each single block of networks trained with stochastic depth, and of plain ones.",
        ("residual", "stochastic depth"),
        ("bn", "images"),
        _lesion_stochastic_depth,
    ),
    "highway": Experiment(
        "section 2, equation 3",
        "Measure highway networks: lesions, learned gates, paths with frozen gates, and the share of the gates.",
        ("highway",),
        ("bn", "images", "gate_batches", "gate_batch_size", "plan_seed"),
        _highway,
    ),
}
"""Experiments by the names that runs and commands give them, in the order of the report."""
