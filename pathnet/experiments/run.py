"""Code that the drivers share: the networks they take, and the identity of a run."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

import pathnet
from pathnet import models, results
from pathnet.checks import check_callable, check_path, described
from pathnet.data import Batches, Data
from pathnet.data.batches import sent
from pathnet.data.fitting import check_fits
from pathnet.data.images import check_data_set
from pathnet.data.passes import Passes, check_classes, count_answers, of_element
from pathnet.experiments.plans import Plan, check_plan
from pathnet.lesion.networks import block_shapes
from pathnet.lesion.recalibration import check_training_split
from pathnet.models import ResidualNet
from pathnet.models.residual_net import check_net
from pathnet.printable import printable
from pathnet.results import Range
from pathnet.settings import Help, documented
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers, check_workers

__all__ = [
    "Networks",
    "Plan",
    "Value",
    "attempt",
    "check_amount",
    "check_arguments",
    "check_data",
    "check_progress",
    "facts_of",
    "facts_of_data",
    "in_memory",
    "open_run",
    "title",
    "unfinished",
]

Networks = Mapping[str, Sequence[ResidualNet]]
"""Networks by kind (residual, vgg, highway, ...); those of one kind were trained from the seeds 0, 1, ..."""


@documented
@dataclass(frozen=True)
class Value:
    """One number measured on a network: a row of a run."""

    PART: ClassVar[str] = "values"
    MEASURED: ClassVar[tuple[str, ...]] = ("value",)
    # The ratio to a norm of zero is NaN or infinite.
    RANGES: ClassVar[Mapping[str, Range]] = {"value": Range(-math.inf, math.inf, nan=True)}

    network: Annotated[str, Help("Kind of the network: residual, highway, vgg or your own.")]
    seed: Annotated[int, Help("Number of the network among those of its kind, from 0.")]
    batch: Annotated[int, Help("Number of the batch on which the value is measured, from 0; 0 if there is none.")]
    quantity: Annotated[str, Help("Name of the measured quantity.")]
    index: Annotated[int, Help("Number of the block, from 0, or the length of the value; 0 if there is neither.")]
    value: Annotated[float, Help("The number, in the unit of its quantity.")]


def facts_of(net: ResidualNet, images: Any) -> dict[str, Any]:
    """Return the recorded facts about a network: hash, configuration, blocks, downsampling blocks and survival.

    Args:
        net: the network.
        images: [B, C, H, W], or other inputs of the network, which show where blocks change the shape.
    """
    shapes = block_shapes(net, sent(images, next(net.parameters()).device))
    changing = [i for i, (entering, leaving) in enumerate(shapes) if entering != leaving]
    return {
        "hash": models.fingerprint(net),
        "config": net.config,
        "blocks": net.n,
        "downsampling": changing,
        "survival": [block.survival for block in net],
    }


def facts_of_data(data: Data | Batches, folder: str | Path) -> dict[str, Any]:
    """Return the recorded facts about the data: the name, the hash, and the images that were left out, if any.

    Args:
        data: the data set.
        folder: the folder of the run. A run from before the hash had versions keeps its version of the hash.
    """
    try:
        recorded = results.read(folder).identity.get("data", {}).get("hash")
    except ValueError:
        recorded = None  # A new run. Anything else wrong with the folder is reported when it is opened.
    facts = {"name": data.name, "hash": data.fingerprint(like=recorded)}
    return {**facts, "skipped": list(data.skipped)} if data.skipped else facts


@contextmanager
def open_run(
    experiment: str,
    nets: Networks,
    data: Data | Batches,
    settings: Mapping[str, Any],
    planned: Mapping[str, int],
    folder: str | Path,
    workers: Workers = ALONE,
) -> Iterator[results.Run]:
    """Open the run of an experiment to add measurements to it, and settle it when all are added.

    Args:
        experiment: name of the driver.
        nets: the networks to measure; together with the data they are part of the run's identity.
        data: the data set.
        settings: the rest of the identity.
        planned: planned amounts by name; they may grow later.
        folder: folder of the run.
        workers: the processes that measure together.

    Raises:
        ValueError: the plan needs more test images than there are, or the folder holds another run.
    """
    check_workers(workers)
    Passes(data, 1, settings.get("images", 0))  # raises if there are not that many
    image, _ = next(data.test_batches(1))
    all_nets = [net for seeds in nets.values() for net in seeds]
    identity = {
        "experiment": experiment,
        **settings,
        "networks": {kind: [facts_of(net, image) for net in seeds] for kind, seeds in nets.items()},
        "data": {**facts_of_data(data, folder), "classes": _classes(data, all_nets)},
    }
    device = next(all_nets[0].parameters()).device if all_nets else torch.device("cpu")
    with results.writing(folder, identity, planned, attempt(device), workers) as run:
        yield run
        run.settle()


def attempt(device: torch.device) -> dict[str, Any]:
    """Return the recorded facts about this process, which adds to a run: time, versions and device."""
    threads = torch.get_num_threads()
    processor = (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s'[: threads > 1]}"
    )
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "pathnet": pathnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": processor if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def check_arguments(
    nets: Any,
    data: Data | Batches | Iterable[Any],
    plan: object,
    folder: object,
    progress: Progress | None,
    kinds: Sequence[str] = (),
) -> Data | Batches:
    """Check the arguments of a driver before it creates a folder.

    Args:
        nets, data, plan, folder, progress: the arguments of the driver.
        kinds: the kinds of network that the driver requires.

    Returns:
        The data; an iterable of batches is read into memory, see `Batches`.

    Raises:
        ValueError: an argument has the wrong type, a network does not accept the data, a required kind is missing,
            or the networks of one kind differ in their number of blocks.
    """
    if not isinstance(nets, Mapping):
        raise ValueError(f"networks: expected sequences of networks by their kinds, got {described(nets)}")
    source = in_memory(data)
    if check_plan("plan", plan).bn == "recalibrated":
        check_training_split(source)
    check_path("folder", folder)
    check_progress(progress)
    for kind, networks in nets.items():
        if not isinstance(kind, str) or not isinstance(networks, Sequence):
            raise ValueError(
                f"networks: expected sequences of networks by their kinds, got {described(networks)} by "
                f"{described(kind)}"
            )
        for net in networks:
            check_data(net, source)
            if net.n != networks[0].n:
                raise ValueError(f"networks: expected {networks[0].n} blocks in every {kind} network, got {net.n}")
    for kind in (*nets, *kinds):
        if not nets.get(kind):
            raise ValueError(f"networks: expected at least one {kind} network, got none")
    return source


def in_memory(data: Data | Batches | Iterable[Any]) -> Data | Batches:
    """Return the data, an iterable of batches as `Batches`.

    Raises:
        ValueError: it is no such iterable; what is wrong with an element is told by its position.
    """
    if isinstance(data, Data | Batches):
        return data
    try:
        return Batches(data)
    except ValueError as error:
        raise ValueError(str(error).replace("test:", "data:", 1)) from None


def check_amount(name: str, data: Data | Batches, batches: int) -> None:
    """Raise ValueError if the data are a caller's own batches, and fewer than ``batches``.

    Args:
        name: name of the amount in the error.
    """
    if isinstance(data, Batches) and batches > len(data.training_batches):
        raise ValueError(f"{name}: expected at most {len(data.training_batches)} (those of the data), got {batches}")


def check_progress(value: object) -> None:
    """Raise ValueError unless ``value`` is a function or None."""
    if value is not None:
        check_callable("progress", value)


def unfinished(run: results.Run) -> ValueError:
    """Return the error for a run that holds too little to be summarised."""
    return ValueError(f"run: {run.folder} is not complete; start its command again")


def check_data(net: ResidualNet, data: Data | Batches) -> None:
    """Check that a network accepts the data.

    Raises:
        ValueError: an argument has the wrong type, the images have another number of channels than the network
            takes, or there are more classes than it has outputs.
    """
    check_net(net)
    if isinstance(data, Batches):
        _check_batches(net, data)
        return
    check_data_set("data", data)
    check_fits(net, data)


def _check_batches(net: ResidualNet, data: Batches) -> None:
    """Run the first batch of each split, and compare all labels with the classes of its output."""
    for split in (data.test, data.train or ()):
        output: torch.Tensor | None = None
        for number, (inputs, labels) in enumerate(split):
            with of_element(number):
                if output is None:
                    output = _output(net, inputs)
                    count_answers(output, labels.to(output.device))
                check_classes(labels, output.shape[-1])


def _output(net: ResidualNet, inputs: Any) -> torch.Tensor:
    """Return the network's output in evaluation mode."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            return torch.as_tensor(net(sent(inputs, next(net.parameters()).device)))
    finally:
        net.train(training)


def _classes(data: Data | Batches, nets: Sequence[ResidualNet]) -> int:
    """Return the number of classes; of a caller's own batches, that of the networks' outputs."""
    if isinstance(data, Data):
        return len(data.classes)
    if nets:
        return _output(nets[0], data.test[0][0]).shape[-1]
    return 1 + max(int(labels.max()) for _, labels in data.test)


def title(identity: Mapping[str, Any]) -> str:
    """Return the data set and the networks of a run in words, for figures."""
    described = [_network(kind, seeds) for kind, seeds in identity.get("networks", {}).items()]
    if "model" in identity:
        described = [_network((identity["model"]["config"] or {}).get("model", "network"), [identity["model"]])]
    # The names come from files.
    return printable("; ".join([identity["data"]["name"], *described] if "data" in identity else described))


def _network(kind: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    config = seeds[0]["config"] or {}
    shape = [f"{key} {config[key]}" for key in ("depth", "width") if key in config]
    trained = [f"{len(seeds)} seeds"] if len(seeds) > 1 else []
    return ", ".join([kind, *shape, f"{seeds[0]['blocks']} blocks", *trained])
