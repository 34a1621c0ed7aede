"""A study: networks trained by one recipe, and every experiment of the paper on them, in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pathnet import models, results, training
from pathnet.checks import MOST_INTEGER, check_callable, check_integer, check_number, check_path, described
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.experiments import EXPERIMENTS
from pathnet.experiments.run import Networks, Plan, check_plan
from pathnet.models import ResidualNet
from pathnet.models.residual_net import check_net
from pathnet.training import Progress, Recipe
from pathnet.training.recipe import check_recipe

__all__ = ["KINDS", "PRESETS", "Study", "check_size", "kind_of", "measured", "trained"]

DEEPEST, WIDEST = 10_000, 1 << 20
COPIES = 3
"""Of the weights, as long as a network is trained: they, their gradients and their momentum."""
KINDS = ("residual", "stochastic depth", "effective", "vgg", "highway")
Reporter = Callable[[str], AbstractContextManager[Progress]]
"""Shows how far a job of the given name is."""


@dataclass(frozen=True)
class Study:
    """What is trained and measured.

    Attributes:
        data: the data set: digits, synthetic, or a folder with CIFAR-10 or with folders of classes.
        skip_broken: leave out images of a folder that cannot be read.
        seeds: networks of each kind.
        depth: layers with weights of residual networks, 6n + 2.
        width: channels of their first stage.
        survival: stochastic depth, the probability of the last module.
        vgg_depth: layers with weights of VGGs.
        vgg_width: their channels.
        vgg_stages: convolutions at one side, between poolings.
        highway_depth: layers with weights of highway networks, 6n + 2.
        gate_bias: of their gates at first.
        recipe: how all of them are trained.
        plan: how much is measured.
    """

    data: str
    skip_broken: bool = False
    seeds: int = 1
    depth: int = 110
    width: int = 16
    survival: float = 0.5
    vgg_depth: int = 15
    vgg_width: int = 128
    vgg_stages: int = 4
    highway_depth: int = 110
    gate_bias: float = -1.0
    recipe: Recipe = field(default_factory=Recipe)
    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        if not isinstance(self.data, str):
            raise ValueError(f"data: expected digits, synthetic or a folder, got {described(self.data)}")
        for name in ("seeds", "depth", "width", "vgg_depth", "vgg_width", "vgg_stages", "highway_depth"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1, MOST_INTEGER))
        object.__setattr__(self, "survival", check_number("survival", self.survival, above=0, most=1))
        object.__setattr__(self, "gate_bias", check_number("gate_bias", self.gate_bias))
        check_recipe(self.recipe)
        check_plan("plan", self.plan)

    def config(self, kind: str, data: Data) -> dict[str, Any]:
        """How a network of one kind is built (`pathnet.models.build`)."""
        residual = {"model": "preact_resnet", "depth": self.depth, "width": self.width}
        of_kind: dict[str, dict[str, Any]] = {
            "residual": residual,
            "effective": residual,
            "stochastic depth": {**residual, "survival": self.survival},
            "vgg": {"model": "vgg", "depth": self.vgg_depth, "width": self.vgg_width, "stages": self.vgg_stages},
            "highway": {
                "model": "highway",
                "depth": self.highway_depth,
                "width": self.width,
                "gate_bias": self.gate_bias,
            },
        }
        return {**of_kind[kind], "num_classes": len(data.classes), "in_channels": data.image_shape[0]}

    def recipe_of(self, kind: str, seed: int) -> Recipe:
        """How network number ``seed`` of one kind is trained."""
        modules = self.plan.modules if kind == "effective" else 0
        return replace(self.recipe, modules=modules, seed=self.recipe.seed + seed)


PRESETS = {
    "digits": Study(
        data="digits",
        seeds=3,
        depth=38,
        width=8,
        vgg_width=32,
        vgg_stages=3,
        highway_depth=38,
        recipe=Recipe(epochs=25, batch_size=32, weight_decay=1e-3, warmup_steps=44),
        plan=Plan(draws=20, deletions=15, swaps=20, batches=100, modules=8, gate_batches=10),
    ),
    "cifar10": Study(data="cifar10", seeds=3, recipe=Recipe(bfloat16=True)),
}
"""``digits`` for two processor cores; ``cifar10``, the paper's own scale, for GPUs."""


def check_size(config: Mapping[str, Any]) -> None:
    """Find out whether a network can be built and trained in this machine's memory, without taking any of it.

    Args:
        config: as `pathnet.models.build` takes it.

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
    """Which of `KINDS` a network is, as far as its form tells; those of effective training are residual ones."""
    check_net(net)
    model = (net.config or {}).get("model", "")
    if model in ("vgg", "highway"):
        return str(model)
    return "stochastic depth" if any(block.survival < 1 for block in net) else "residual"


def trained(
    study: Study, data: Data, kinds: Iterable[str], folder: Path, device: torch.device, reporter: Reporter
) -> Networks:
    """The networks of some kinds, in evaluation mode: trained where the folder does not hold them.

    Interrupted trainings go on.

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
    for kind in kinds:
        check_size(study.config(kind, data))
    return {
        kind: [_trained(study, data, kind, seed, folder, device, reporter) for seed in range(study.seeds)]
        for kind in kinds
    }


def _check_study(name: str, value: object) -> None:
    if not isinstance(value, Study):
        raise ValueError(f"{name}: expected a Study, got {described(value)}")


def _trained(
    study: Study, data: Data, kind: str, seed: int, folder: Path, device: torch.device, reporter: Reporter
) -> ResidualNet:
    recipe = study.recipe_of(kind, seed)
    torch.manual_seed(recipe.seed)
    net = models.build(study.config(kind, data)).to(device)
    checkpoint = folder / "networks" / f"{kind.replace(' ', '-')}-{seed}.safetensors"
    with reporter(f"training {kind} {seed + 1}/{study.seeds}") as progress:
        training.train(net, data, recipe, checkpoint, progress)
    return net.eval()


def measured(
    name: str,
    nets: Networks,
    data: Data,
    plan: Plan,
    folder: Path,
    reporter: Reporter,
    trained_by: Study | None = None,
) -> list[results.Run]:
    """The runs of one experiment in the folder of a study, complete.

    Args:
        name: among `pathnet.experiments.EXPERIMENTS`.
        nets: of the kinds that it takes.
        trained_by: the study whose recipe trained them, which the runs keep.

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
    if trained_by is not None:
        _check_study("trained_by", trained_by)
    experiment = EXPERIMENTS[name]
    own = {kind: nets[kind] for kind in experiment.networks if kind in nets}
    if len(own) < (1 if experiment.any_of_them else len(experiment.networks)) and experiment.networks:
        raise ValueError(
            f"networks: {name} takes {' and '.join(experiment.networks)}, got {' and '.join(own) or 'none'}"
        )
    with reporter(name) as progress:
        runs = experiment.measure(own, data, plan, folder / name, progress)
    for run in runs:
        facts = {**run.facts.get("results", {}), "claims": [vars(claim) for claim in experiment.claims(run)]}
        if trained_by is not None:
            facts["recipes"] = {kind: asdict(trained_by.recipe_of(kind, 0)) for kind in own}
        run.conclude(facts)
    return runs
