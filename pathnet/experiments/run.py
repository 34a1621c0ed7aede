"""What the drivers share: the networks that they take, what a run is identified by, and the claims that it tests."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch

import pathnet
from pathnet import lesion, models, results
from pathnet.checks import check_callable, check_path, described
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.experiments.plans import Plan, check_plan
from pathnet.models import ResidualNet
from pathnet.models.residual_net import check_net
from pathnet.printable import printable
from pathnet.results import Range
from pathnet.training import Progress

__all__ = [
    "Claim",
    "Networks",
    "Plan",
    "Value",
    "attempt",
    "check_arguments",
    "check_data",
    "check_progress",
    "facts_of",
    "facts_of_data",
    "opened",
    "title",
    "unfinished",
]

Networks = Mapping[str, Sequence[ResidualNet]]
"""By kind (residual, vgg, highway...), those trained from the seeds 0, 1, ..."""


@dataclass(frozen=True)
class Value:
    """One number of a network: a row of a run.

    Attributes:
        network: its kind.
        seed: which of the networks of that kind.
        batch: number of the batch that it was measured on; 0 where there is none.
        quantity: what it is.
        index: of a block or a length, where the quantity has one; else 0.
        value: the number.
    """

    PART: ClassVar[str] = "values"
    MEASURED: ClassVar[tuple[str, ...]] = ("value",)
    # A ratio to a norm of zero is NaN or infinite.
    RANGES: ClassVar[Mapping[str, Range]] = {"value": Range(-math.inf, math.inf, nan=True)}

    network: str
    seed: int
    batch: int
    quantity: str
    index: int
    value: float


@dataclass(frozen=True)
class Claim:
    """A statement of the paper beside what was measured.

    Attributes:
        paper: the statement, in short.
        where: section and figure.
        bound: what must be measured for it to hold, in words and numbers.
        measured: what was.
        held: whether it does.
    """

    paper: str
    where: str
    bound: str
    measured: str
    held: bool


def facts_of(net: ResidualNet, images: torch.Tensor) -> dict[str, Any]:
    """What is recorded of a network: its hash, how it is built, its blocks, which of them change the shape,
    and how probably training keeps each."""
    shapes = lesion.shapes(net, images.to(next(net.parameters()).device))
    changing = [i for i, (entering, leaving) in enumerate(shapes) if entering != leaving]
    return {
        "hash": models.fingerprint(net),
        "config": net.config,
        "blocks": net.n,
        "downsampling": changing,
        "survival": [block.survival for block in net],
    }


def facts_of_data(data: Data, folder: str | Path) -> dict[str, Any]:
    """Return what a run records of its data: the name, the hash, and the images that were left out, if any.

    Args:
        folder: the run's folder. A run of before there were versions of the hash goes on with one of its kind.
    """
    try:
        recorded = results.read(folder).identity.get("data", {}).get("hash")
    except ValueError:
        recorded = None  # a new run; what else may be wrong with the folder is told where it is opened
    facts = {"name": data.name, "hash": data.fingerprint(like=recorded)}
    return {**facts, "skipped": list(data.skipped)} if data.skipped else facts


def opened(
    experiment: str,
    nets: Networks,
    data: Data,
    settings: Mapping[str, Any],
    asked: Mapping[str, int],
    folder: str | Path,
) -> AbstractContextManager[results.Run]:
    """The run of an experiment, opened to add measurements to it.

    Args:
        settings: what else must be equal for measurements to belong together.
        asked: how many of something are asked for; may grow.

    Raises:
        ValueError: there are fewer test images than asked for, or the folder holds another run.
    """
    if settings.get("images", 0) > len(data.test):
        raise ValueError(f"images: expected 0 (all) to {len(data.test)} (the test images), got {settings['images']}")
    some, _ = next(data.test_batches(1))
    everyone = [net for own in nets.values() for net in own]
    identity = {
        "experiment": experiment,
        **settings,
        "networks": {kind: [facts_of(net, some) for net in own] for kind, own in nets.items()},
        "data": {**facts_of_data(data, folder), "classes": len(data.classes)},
    }
    device = next(everyone[0].parameters()).device if everyone else torch.device("cpu")
    return results.writing(folder, identity, asked, attempt(device))


def attempt(device: torch.device) -> dict[str, Any]:
    """What is recorded of one process that adds to a run: time, versions, device."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "pathnet": pathnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": processor if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def check_arguments(
    nets: object,
    data: Data,
    plan: object,
    folder: object,
    progress: Progress | None,
    kinds: Sequence[str] = (),
) -> None:
    """Find what a driver cannot measure before it does anything.

    Args:
        kinds: those that it cannot do without.

    Raises:
        ValueError: an argument is of another kind, a network does not take the data, one of the kinds is missing, or
            the networks of one kind differ in the number of their blocks.
    """
    if not isinstance(nets, Mapping):
        raise ValueError(f"networks: expected sequences of networks by their kinds, got {described(nets)}")
    check_data_set("data", data)
    check_plan("plan", plan)
    check_path("folder", folder)
    check_progress(progress)
    for kind, networks in nets.items():
        if not isinstance(kind, str) or not isinstance(networks, Sequence):
            raise ValueError(
                f"networks: expected sequences of networks by their kinds, got {described(networks)} by "
                f"{described(kind)}"
            )
        for net in networks:
            check_data(net, data)
            if net.n != networks[0].n:
                raise ValueError(f"networks: expected {networks[0].n} blocks in every {kind} one, got {net.n}")
    for kind in (*nets, *kinds):
        if not nets.get(kind):
            raise ValueError(f"networks: expected at least one {kind} one, got none")


def check_progress(value: object) -> None:
    """Raise ValueError unless ``value`` is a function or None."""
    if value is not None:
        check_callable("progress", value)


def unfinished(run: results.Run) -> ValueError:
    """What is raised where a run holds too little to be summarised."""
    return ValueError(f"run: {run.folder} is not complete; start its command again")


def check_data(net: ResidualNet, data: Data) -> None:
    """Finds what cannot be measured before a run folder is made for it.

    Raises:
        ValueError: an argument is of another kind, the images have other channels than the network takes, or there
            are more classes than it tells.
    """
    check_net(net)
    check_data_set("data", data)
    channels, takes = data.image_shape[0], net.stem_weight().shape[1]
    if channels != takes:
        raise ValueError(f"data: expected images of {takes} channels (the network's), got {channels} in {data.name}")
    told_apart = (net.config or {}).get("num_classes", len(data.classes))
    if len(data.classes) > told_apart:
        raise ValueError(
            f"data: expected at most {told_apart} classes (the network's), got {len(data.classes)} in {data.name}"
        )


def title(identity: Mapping[str, Any]) -> str:
    """Data set and networks of a run, in words for figures; their names come from files."""
    described = [_network(kind, own) for kind, own in identity.get("networks", {}).items()]
    if "model" in identity:
        described = [_network((identity["model"]["config"] or {}).get("model", "network"), [identity["model"]])]
    return printable("; ".join([identity["data"]["name"], *described] if "data" in identity else described))


def _network(kind: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    config = seeds[0]["config"] or {}
    shape = [f"{key} {config[key]}" for key in ("depth", "width") if key in config]
    trained = [f"{len(seeds)} seeds"] if len(seeds) > 1 else []
    return ", ".join([kind, *shape, f"{seeds[0]['blocks']} blocks", *trained])
