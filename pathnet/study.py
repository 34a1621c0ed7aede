"""A study: networks trained by one recipe, and every experiment of the paper on them, in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from pathnet import models, training
from pathnet.checks import check_callable, check_integer, check_path, described
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.experiments.plans import Plan, check_plan
from pathnet.models import ResidualNet
from pathnet.models.residual_net import check_net
from pathnet.paper import EXPERIMENTS
from pathnet.settings import Above, AtLeast, AtMost, Flag, Help, Panel, Without, check_settings, documented
from pathnet.training import Progress, Recipe
from pathnet.training.recipe import check_recipe
from pathnet.training.state import TrainingState
from pathnet.workers import ALONE, Workers, check_workers

if TYPE_CHECKING:
    from pathnet import results
    from pathnet.experiments.run import Networks

__all__ = [
    "KINDS",
    "PRESETS",
    "DataSet",
    "Preset",
    "SkipBroken",
    "Study",
    "check_size",
    "kind_of",
    "measured",
    "trained",
]

DEEPEST, WIDEST = 10_000, 1 << 20
COPIES = 3
"""Number of copies of the weights while a network is trained: weights, gradients and momentum."""

RESIDUAL = {"depth": "depth", "width": "width"}
KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "residual": ("preact_resnet", RESIDUAL),
    "stochastic depth": ("preact_resnet", {**RESIDUAL, "survival": "survival"}),
    "effective": ("preact_resnet", RESIDUAL),
    "vgg": ("vgg", {"depth": "vgg_depth", "width": "vgg_width", "stages": "vgg_stages"}),
    "highway": ("highway", {"depth": "highway_depth", "width": "width", "gate_bias": "gate_bias"}),
}
"""Kinds of network: the model of each, and the field of `Study` that holds each argument of the model."""

Reporter = Callable[[str], AbstractContextManager[Progress]]
"""Function that shows how far the job of a given name is."""

DataSet = Annotated[str, Help("digits, synthetic, or a folder: CIFAR-10 or folders of classes."), Flag(value="DATA")]
SkipBroken = Annotated[bool, Help("Skip unreadable images of a folder; runs list them in run.json.")]


@documented
@dataclass(frozen=True)
class Study:
    """Settings of a study: data, networks of each kind, how they are trained, and how much is measured.

    `PRESETS` holds studies by name; the commands of the paper's experiments take every setting as a flag.

    Raises:
        ValueError: a setting has the wrong type or is out of its range.

    Example:
        >>> from dataclasses import replace
        >>> from pathnet.study import PRESETS
        >>> study = replace(PRESETS["digits"], data="synthetic", seeds=1)
        >>> study.depth, study.recipe.epochs, study.plan.batches
        (38, 25, 100)
    """

    data: Annotated[DataSet, Panel("Study")]
    skip_broken: Annotated[SkipBroken, Panel("Study")] = False
    seeds: Annotated[int, Help("Number of networks of each kind."), AtLeast(1)] = 1
    depth: Annotated[int, Help("Layers with weights of residual networks, 6n + 2."), AtLeast(1)] = 110
    width: Annotated[int, Help("Channels of the first stage of residual and highway networks."), AtLeast(1)] = 16
    survival: Annotated[
        float, Help("Survival probability of the last module under stochastic depth."), Above(0), AtMost(1)
    ] = 0.5
    vgg_depth: Annotated[int, Help("Layers with weights of VGGs."), AtLeast(1)] = 15
    vgg_width: Annotated[int, Help("Channels of VGGs."), AtLeast(1)] = 128
    vgg_stages: Annotated[int, Help("Number of stages of VGGs; a pooling layer separates them."), AtLeast(1)] = 4
    highway_depth: Annotated[int, Help("Layers with weights of highway networks, 6n + 2."), AtLeast(1)] = 110
    gate_bias: Annotated[float, Help("Initial bias of the gates of highway networks.")] = -1.0
    recipe: Annotated[Recipe, Help("Training of every network."), Without(("modules",)), Panel("Training")] = field(
        default_factory=Recipe
    )
    plan: Annotated[Plan, Help("Amounts to measure."), Panel("Measurements")] = field(default_factory=Plan)

    def __post_init__(self) -> None:
        if not isinstance(self.data, str):
            raise ValueError(f"data: expected digits, synthetic or a folder, got {described(self.data)}")
        check_settings(self)
        check_recipe(self.recipe)
        check_plan("plan", self.plan)

    def config(self, kind: str, data: Data) -> dict[str, Any]:
        """Return how a network of one kind is built, as `pathnet.models.build` takes it."""
        model, arguments = KINDS[kind]
        settings = {argument: getattr(self, name) for argument, name in arguments.items()}
        return {"model": model, **settings, "num_classes": len(data.classes), "in_channels": data.image_shape[0]}

    def recipe_of(self, kind: str, seed: int) -> Recipe:
        """Return how network number ``seed`` of one kind is trained."""
        modules = self.plan.modules if kind == "effective" else 0
        return replace(self.recipe, modules=modules, seed=self.recipe.seed + seed)


DIGITS = Study(
    data="digits",
    seeds=3,
    depth=38,
    width=8,
    vgg_width=32,
    vgg_stages=3,
    highway_depth=38,
    recipe=Recipe(epochs=25, batch_size=32, weight_decay=1e-3, warmup_steps=44),
    plan=Plan(draws=20, deletions=15, swaps=20, batches=100, modules=8, gate_batches=10),
)
Preset = Literal["digits", "cifar10"]
PRESETS: dict[Preset, Study] = {
    "digits": DIGITS,
    "cifar10": Study(data="cifar10", seeds=3, recipe=Recipe(bfloat16=True)),
}
"""Studies by name. ``digits`` is for two processor cores; ``cifar10``, at the paper's scale, for GPUs."""


def check_size(config: Mapping[str, Any]) -> None:
    """Check that a network can be built and trained in this machine's memory, without allocating any of it.

    Args:
        config: the network, as `pathnet.models.build` takes it.

    Raises:
        ValueError: it cannot.
    """
    for name, most in (("depth", DEEPEST), ("width", WIDEST)):
        if isinstance(config, Mapping) and name in config:
            check_integer(name, config[name], 1, most)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with torch.device("meta"):
            parameters = list(models.build(config).parameters())
    except RuntimeError as error:
        raise ValueError(f"width: expected a network that can be built ({str(error).splitlines()[0]})") from None
    size = COPIES * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if size > memory:
        raise ValueError(
            f"width: expected a network whose weights, gradients and momentum fit this machine's {memory / 1e9:.3g} "
            f"GB of memory, got one of {size / 1e9:.3g} GB"
        )


def kind_of(net: ResidualNet) -> str:
    """Return which of `KINDS` a network is by its form; one from effective training is a residual network."""
    check_net(net)
    model = (net.config or {}).get("model", "")
    if model in ("vgg", "highway"):
        return str(model)
    return "stochastic depth" if any(block.survival < 1 for block in net) else "residual"


def trained(
    study: Study,
    data: Data,
    kinds: Iterable[str],
    folder: Path,
    device: torch.device,
    reporter: Reporter,
    workers: Workers = ALONE,
) -> Networks:
    """Return the networks of some kinds, in evaluation mode; train those that the folder does not hold.

    An interrupted training continues. Of several processes, each trains some of the networks, and reads those that
    others trained when all are done.

    Raises:
        ValueError: the folder holds networks of another study, or an argument is of another kind.
    """
    _check_study("study", study)
    check_data_set("data", data)
    # Arrays and tensors without dimensions are iterables that cannot be iterated.
    if isinstance(kinds, str) or not isinstance(kinds, Iterable) or getattr(kinds, "ndim", 1) == 0:
        raise ValueError(f"kinds: expected kinds of networks, got {described(kinds)}")
    kinds, folder = list(kinds), check_path("folder", folder)
    if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in KINDS]:
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {described(unknown[0])}")
    if not isinstance(device, torch.device):
        raise ValueError(f"device: expected a torch.device, got {described(device)}")
    check_callable("reporter", reporter)
    check_workers(workers)
    for kind in kinds:
        check_size(study.config(kind, data))
    order = [(kind, seed) for kind in kinds for seed in range(study.seeds)]
    nets: dict[tuple[str, int], ResidualNet] = {}
    unfinished = list(range(len(order)))
    while unfinished:  # again if a process died
        for unit in workers.share_out(len(unfinished)):
            number = order[unfinished[unit]]
            nets[number] = _trained(study, data, *number, folder, device, reporter)
        known = workers.gather([unit for unit, number in enumerate(order) if number in nets])
        done = {unit for of_process in known for unit in of_process}
        unfinished = workers.agree(partial(_without, unfinished, done))
    for number in order:
        if number not in nets:
            nets[number] = _read(study, data, *number, folder, device)
    return {kind: [nets[kind, seed] for seed in range(study.seeds)] for kind in kinds}


def _without(units: list[int], done: set[int]) -> list[int]:
    return [unit for unit in units if unit not in done]


def _check_study(name: str, value: object) -> None:
    if not isinstance(value, Study):
        raise ValueError(f"{name}: expected a Study, got {described(value)}")


def _trained(
    study: Study, data: Data, kind: str, seed: int, folder: Path, device: torch.device, reporter: Reporter
) -> ResidualNet:
    net, recipe, checkpoint = _untrained(study, data, kind, seed, folder, device)
    with reporter(f"training {kind} {seed + 1}/{study.seeds}") as progress:
        training.train(net, data, recipe, checkpoint, progress)
    return net.eval()


def _read(study: Study, data: Data, kind: str, seed: int, folder: Path, device: torch.device) -> ResidualNet:
    """Return a network that another process has trained.

    Raises:
        ValueError: this process does not see its checkpoint.
    """
    net, recipe, checkpoint = _untrained(study, data, kind, seed, folder, device)
    # As the training would go on from it: with the same layout in memory, and without its lock.
    state = TrainingState(net, data, recipe, checkpoint)
    if state.step < state.steps:
        raise ValueError(f"checkpoint: expected a trained network that all processes see, got none in {checkpoint}")
    return net.eval()


def _untrained(
    study: Study, data: Data, kind: str, seed: int, folder: Path, device: torch.device
) -> tuple[ResidualNet, Recipe, Path]:
    """Return a network before its training, its recipe, and the path of its checkpoint."""
    recipe = study.recipe_of(kind, seed)
    torch.manual_seed(recipe.seed)
    net = models.build(study.config(kind, data)).to(device)
    return net, recipe, folder / "networks" / f"{kind.replace(' ', '-')}-{seed}.safetensors"


def measured(
    name: str,
    nets: Networks,
    data: Data,
    plan: Plan,
    folder: Path,
    reporter: Reporter,
    trained_by: Study | None = None,
    workers: Workers = ALONE,
) -> list[results.Run]:
    """Complete the runs of one experiment in the folder of a study, and return them.

    Args:
        name: the experiment, a key of `pathnet.paper.EXPERIMENTS`.
        nets: networks by kind, with the kinds that the experiment needs.
        trained_by: the study whose recipe trained the networks; the runs keep it.
        workers: the processes that measure together; the first one tests the claims.

    Raises:
        ValueError: a kind is missing, or the folder holds runs of other networks, data or plans; or an argument is
            of another kind.
    """
    if not isinstance(name, str) or name not in EXPERIMENTS:
        raise ValueError(f"name: expected one of {', '.join(EXPERIMENTS)}, got {described(name)}")
    if not isinstance(nets, Mapping):
        raise ValueError(f"networks: expected sequences of networks by their kinds, got {described(nets)}")
    folder = check_path("folder", folder)
    check_callable("reporter", reporter)
    check_workers(workers)
    if trained_by is not None:
        _check_study("trained_by", trained_by)
    experiment = EXPERIMENTS[name]
    needed = {kind: nets[kind] for kind in experiment.networks if kind in nets}
    if len(needed) < (1 if experiment.any_of_them else len(experiment.networks)) and experiment.networks:
        raise ValueError(
            f"networks: {name} takes {' and '.join(experiment.networks)}, got {' and '.join(needed) or 'none'}"
        )
    driver = experiment.load()
    with reporter(name) as progress:
        runs = driver.measure(needed, data, plan, folder / name, progress, workers)

    def conclude() -> None:
        for run in runs:
            facts = {**run.facts.get("results", {}), "claims": [vars(claim) for claim in driver.claims(run)]}
            if trained_by is not None:
                facts["recipes"] = {kind: asdict(trained_by.recipe_of(kind, 0)) for kind in needed}
            run.conclude(facts)

    workers.agree(conclude)
    return runs
