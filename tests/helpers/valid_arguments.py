"""Small valid arguments of the public functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import pathnet
from helpers.cases import shaken
from pathnet import (
    data,
    engines,
    lesion,
    models,
    results,
    training,
)
from pathnet.experiments import path_gradients
from pathnet.experiments.run import Networks
from pathnet.models import ResidualNet


@cache
def small_net() -> ResidualNet:
    torch.manual_seed(0)
    return shaken(models.preact_resnet(8, 2, num_classes=4)).eval()


@cache
def gated_net() -> ResidualNet:
    torch.manual_seed(0)
    return shaken(models.highway(8, 2, num_classes=4)).eval()


@cache
def small_data() -> data.Data:
    return data.synthetic(16, 4, (3, 4, 4))


def two_images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def two_labels() -> Tensor:
    return torch.tensor([0, 3])


def one_routing() -> Tensor:
    return torch.tensor([[1.0, 1.0], [0.5, 2.0], [1.0, 0.0]])


def two_paths() -> Tensor:
    return torch.tensor([[1, 0, 1], [0, 1, 1]])


@cache
def saved_weights() -> Path:
    path = Path("saved.safetensors").absolute()
    models.save(small_net(), path)
    return path


@cache
def recorded_depths() -> Path:
    path = Path("depths.csv").absolute()
    callback = pathnet.EffectiveDepth((two_images(), two_labels()), path, small_net(), every=1, share=math.inf)
    callback(0)
    return path


def recorder_by(engine: str) -> pathnet.Recorder:
    return pathnet.Recorder(small_net(), engine=engine)


@cache
def tape_by(engine: str, at: str | int = "y0") -> pathnet.Tape:
    return pathnet.record(small_net(), two_images(), two_labels(), engine=engine, at=at)


@cache
def folder_of_images() -> Path:
    """Images in the layout of ImageNet."""
    folder = Path("classes").absolute()
    for split in ("train", "test"):
        (folder / split / "some").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / split / "some" / "image.png")
    return folder


@cache
def measured_run() -> results.Run:
    plan = path_gradients.PathGradients(batches=1, batch_size=2, engine="reference")
    return path_gradients.measure(small_net(), small_data(), plan, "run")


def written_run(
    folder: str | Path, identity: Mapping[str, Any], planned: Mapping[str, int], attempt: Mapping[str, Any]
) -> results.Run:
    with results.writing(folder, identity, planned, attempt) as run:
        return run


def deep_nets() -> Networks:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 2, num_classes=4)).eval()
    return {"residual": [net], "stochastic depth": [net], "effective": [net]}


@contextmanager
def silent_reporter(_: str) -> Iterator[training.Progress]:
    yield lambda *_: None


def image_files() -> list[Path]:
    return [folder_of_images() / "train" / "some" / "image.png"]


def small_job() -> engines.Job:
    return engines.Job(small_net(), "running", "float32", (2, 4, 4), torch.device("cpu"))


def parts_of(net: ResidualNet) -> list[torch.nn.Module]:
    return [net.stem, *net, net.head]


class Writer:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        pass

    def flush(self) -> None:
        pass


@cache
def small_ranking() -> lesion.Ranking:
    return lesion.rank(small_net(), [(two_images(), two_labels())])
