"""``pathnet train``: one network, trained by a recipe, from one process or from those of torchrun."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.distributed as dist

from pathnet import models, training
from pathnet.commands.failures import kept
from pathnet.commands.gradients import check_weights
from pathnet.commands.places import check_file_to_write, check_folder_to_write, check_utf_8
from pathnet.commands.shared import Device, ExistingData, Json, device_of
from pathnet.commands.streams import say
from pathnet.data import Data, load
from pathnet.models.weights import read_tensors
from pathnet.printable import printable
from pathnet.progress import reporter
from pathnet.settings import Above, AtLeast, AtMost, Checked, Flag, Help, Panel, check_settings
from pathnet.study import DEEPEST, WIDEST, SkipBroken, check_size
from pathnet.training import Epoch, Recipe
from pathnet.training.engines import BlockEngine, Engine, block_engine
from pathnet.training.state import recorded_start

if TYPE_CHECKING:
    from pathnet.effective_depth import EffectiveDepth

__all__ = ["TrainSettings", "Trained", "train", "trained"]

DEPTH_IMAGES = 32
"""Images on which effective depth is measured during a training."""


def _check_weights(name: str, file: Path) -> None:
    check_file_to_write(name, file)
    check_utf_8(name, file)


def _check_depths(name: str, file: Path) -> None:
    check = check_file_to_write if file.suffix == ".csv" else check_folder_to_write
    check(name, file)


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of a network; a setting that is None is the model's default."""

    model: Annotated[
        Literal["preact_resnet", "preact_resnet_imagenet", "resnet", "vgg", "highway"],
        Help("preact_resnet, preact_resnet_imagenet, resnet, vgg or highway."),
        Flag(value="MODEL"),
    ] = "preact_resnet"
    depth: Annotated[
        int | None,
        Help("Number of layers with weights. CIFAR ResNets: 6n + 2, or 9n + 2 with bottlenecks."),
        AtLeast(1),
        AtMost(DEEPEST),
        Flag(default="56 for CIFAR ResNets, else the model's"),
    ] = None
    width: Annotated[
        int | None,
        Help("Channels of the first stage; of all layers of a VGG."),
        AtLeast(1),
        AtMost(WIDEST),
        Flag(default="the model's"),
    ] = None
    shortcut: Annotated[
        Literal["projection", "pad", "pad_around"] | None,
        Help("Skip connection of blocks that change the shape: projection, pad or pad_around."),
        Flag(value="KIND", default="projection"),
    ] = None
    block: Annotated[
        Literal["basic", "bottleneck"] | None,
        Help("Kind of block: basic or bottleneck."),
        Flag(value="KIND", default="basic"),
    ] = None
    survival: Annotated[
        float | None,
        Help("Survival probability of the last module under stochastic depth."),
        Above(0),
        AtMost(1),
        Flag(default="1"),
    ] = None
    gate_bias: Annotated[
        float | None, Help("Initial bias of the gates of a highway network."), Flag(default="-1")
    ] = None
    stages: Annotated[
        int | None, Help("Number of VGG stages; a pooling layer separates them."), Flag(default="4")
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)

    def config(self, data: Data) -> dict[str, Any]:
        """Return how the network is built for a data set, as `pathnet.models.build` takes it."""
        config = {name: value for name, value in asdict(self).items() if value is not None}
        if self.model in ("preact_resnet", "resnet"):
            config.setdefault("depth", 56)
        config["num_classes"] = len(data.classes)
        if self.model != "preact_resnet_imagenet":
            config["in_channels"] = data.image_shape[0]
        return config


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of ``pathnet train``."""

    data: ExistingData
    out: Annotated[
        Path,
        Help("Weights file to write (safetensors); the checkpoint goes next to it."),
        Flag(value="FILE"),
        Checked(_check_weights),
    ]
    skip_broken: SkipBroken = False
    weights: Annotated[
        Path | None,
        Help(
            "Network to begin with, instead of a new one, such as one that an earlier training wrote; the file says "
            "how it is built."
        ),
        Flag(value="FILE"),
        Checked(check_weights),
    ] = None
    effective_depth: Annotated[
        Path | None,
        Help(
            "Log the lengths of the paths that carry the gradient during training, to a .csv file (with a figure "
            "next to it) or a TensorBoard folder."
        ),
        Flag(value="FILE"),
        Checked(_check_depths),
    ] = None
    network: Annotated[NetworkSettings, Panel("Network")]
    recipe: Annotated[Recipe, Panel("Training")]
    device: Device = "auto"
    engine: Annotated[
        Engine,
        Help(
            "What runs the residual blocks: fused kernels (cpu or triton), or none (PyTorch's operators). auto: the "
            "engine of the checkpoint, or the one for the device."
        ),
        Flag(value="NAME"),
        Panel("General"),
    ] = "auto"
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)


def train(settings: TrainSettings) -> None:
    """Train a network; an interrupted training resumes from its checkpoint.

    Under torchrun, the processes split each batch.
    """
    from pathnet.commands.printing import print_json, print_training

    data = load(settings.data, settings.skip_broken)
    net = _beginning(settings, data)
    with _distributed(device_of(settings.device)) as (device, is_first):
        result = trained(
            net.to(device),
            data,
            settings.recipe,
            settings.out,
            settings.engine,
            settings.effective_depth,
            is_first,
            quiet=settings.as_json or not is_first,
        )
    if not is_first:
        return
    written = [settings.out, *_drawn_depths(settings.effective_depth, printable(settings.out.stem))]
    if settings.as_json:
        print_json({**result.engine.facts, "epochs": [asdict(epoch) for epoch in result.epochs]}, written)
    else:
        print_training(result.epochs, *written)


def _beginning(settings: TrainSettings, data: Data) -> models.ResidualNet:
    """Return the network that the training begins with.

    Raises:
        ValueError: the weights cannot be loaded, are not those that the training in the checkpoint began with, or
            say otherwise how the network is built.
    """
    if settings.weights is None:
        config = settings.network.config(data)
        check_size(config)
        torch.manual_seed(settings.recipe.seed)
        return models.build(config)
    net = models.load(settings.weights)
    stored = net.config or {}
    for name, value in asdict(settings.network).items():
        if value not in (None, NetworkSettings.model, stored.get(name)):
            raise ValueError(f"{name}: expected that of {settings.weights} ({stored.get(name, 'none')}), got {value}")
    checkpoint = _checkpoint_of(settings.out)
    if checkpoint.exists():
        start = recorded_start(read_tensors(checkpoint)[1], checkpoint)
        if start != models.fingerprint(net):
            raise ValueError(
                f"weights: expected the network that the training in {checkpoint} began with, got another in "
                f"{settings.weights}; give another --out, or move that one away"
            )
    return net


def _checkpoint_of(out: Path) -> Path:
    """Return the path of the checkpoint of a training that writes its weights to ``out``."""
    return out.with_name(f"{out.stem}.checkpoint.safetensors")


@dataclass(frozen=True)
class Trained:
    """A training that has ended.

    Attributes:
        engine: what ran the residual blocks.
        epochs: the results of all epochs.
    """

    engine: BlockEngine
    epochs: list[Epoch]


def trained(
    net: models.ResidualNet,
    data: Data,
    recipe: Recipe,
    out: Path,
    engine: Engine = "auto",
    depths: Path | None = None,
    is_first: bool = True,
    quiet: bool = False,
) -> Trained:
    """Train a network, and save its weights.

    Args:
        out: the file of weights; the checkpoint goes next to it.
        engine: what runs the residual blocks, see `pathnet.training.train`.
        depths: the file or folder for effective depths, if they are measured.
        is_first: whether this process is the one of several that reports and saves.
        quiet: whether not to print the engine before the first step.

    Raises:
        ValueError: the weights or depths are of another training, or two results would go into one file; or the
            engine can run none of the blocks.
    """
    checkpoint = _checkpoint_of(out)
    check_file_to_write("out", checkpoint)
    if depths is not None and depths.resolve() in (out.resolve(), checkpoint.resolve()):
        raise ValueError(f"effective_depth: expected a file that --out does not write, got {depths}")
    if out.exists() and not checkpoint.exists():
        raise ValueError(f"out: expected a new file, or one with a checkpoint, got {out}, which exists without one")
    if depths is not None and depths.exists() and not checkpoint.exists():
        raise ValueError(f"effective_depth: expected a new file for a new training, got {depths}, which exists")
    runner = block_engine(net, engine, checkpoint)
    measure = None if depths is None else _depth_callback(data, recipe, depths)
    callback = _announcing(runner, quiet, measure)
    with kept(f"the training is kept in {checkpoint}"), reporter("training") as progress:
        epochs = training.train(net, data, recipe, checkpoint, progress if is_first else None, callback, engine)
    if is_first:
        models.save(net, out)
    return Trained(runner, epochs)


def _announcing(
    engine: BlockEngine, quiet: bool, measure: EffectiveDepth | None
) -> Callable[[int, models.ResidualNet], object]:
    """Return a callback that prints the engine before the first step, when no argument can be refused any more."""
    lines = [] if quiet else [engine.line]

    def callback(step: int, net: models.ResidualNet) -> None:
        while lines:
            say(lines.pop())
        if measure is not None:
            measure(step, net)

    return callback


def _depth_callback(data: Data, recipe: Recipe, file: Path) -> EffectiveDepth:
    from pathnet.effective_depth import EffectiveDepth

    batch = data.random_batch(min(DEPTH_IMAGES, len(data.train)), recipe.seed, 0)
    try:
        return EffectiveDepth(batch, file)
    except ValueError as error:
        raise ValueError(f"effective_depth: {str(error).removeprefix('out: ')}") from None


def _drawn_depths(file: Path | None, name: str) -> list[Path]:
    """Return the file of effective depths and its figure, or nothing if they are not measured."""
    from pathnet.effective_depth import read
    from pathnet.figures import figure_depth

    if file is None or file.suffix != ".csv":
        return [] if file is None else [file]
    rows = read(file)
    known = any(math.isfinite(row.depth) for row in rows)
    return [file, *(figure_depth(rows, name, file.with_suffix("")) if known else [])]


@contextmanager
def _distributed(device: torch.device) -> Iterator[tuple[torch.device, bool]]:
    """Join the processes of torchrun, if there are any; yield this one's device, and whether it is the first."""
    if not dist.is_torchelastic_launched():
        yield device, True
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
