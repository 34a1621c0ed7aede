"""Trainings and their effective depth for `benchmarks.paper`, from checkpoints and from files of `EffectiveDepth`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pathnet import effective_depth, models
from pathnet.data.images import VERSION
from pathnet.models.weights import read_tensors
from pathnet.training import Recipe
from pathnet.training.engines import recorded_engines
from pathnet.training.position import Position, read_position
from pathnet.training.state import recorded_start

__all__ = ["changed_settings", "depths", "name_of", "trainings"]

CHECKPOINT = ".checkpoint"
EPOCH = ("train_loss", "test_accuracy", "seconds")


def trainings(checkpoints: Sequence[Path], data: Collection[str]) -> list[dict[str, Any]]:
    """Return what the checkpoints of trainings say: network, recipe, engines, and the results of each epoch.

    Args:
        checkpoints: files that ``pathnet train`` wrote next to its weights, or a study's networks.
        data: hashes of the data set that the trainings must have used, as runs record them.

    Raises:
        ValueError: a file is no checkpoint of a training that has ended, two have one name, or one is of other data.
    """
    entries = [_training(file, data) for file in checkpoints]
    names = [entry["name"] for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"trained: expected files of different names, got several named {', '.join(twice)}")
    return entries


def name_of(file: Path) -> str:
    """Return the name of a training: that of its checkpoint or of its depths, without suffixes."""
    return file.stem.removesuffix(CHECKPOINT)


def _training(file: Path, data: Collection[str]) -> dict[str, Any]:
    _, metadata = read_tensors(file)
    if not {"recipe", "progress"} <= metadata.keys():
        raise ValueError(f"trained: expected the checkpoint of a training, got {file}, which holds weights alone")
    # Hashes of different versions cannot be compared.
    comparable = [text for text in data if text.startswith(VERSION)]
    if comparable and metadata["data"].startswith(VERSION) and metadata["data"] not in comparable:
        raise ValueError(f"trained: expected a training on the data of the runs, got {file}, which is on other data")
    # Files from before a setting existed were trained by its default.
    recipe = Recipe(**metadata["recipe"])
    position = _ended(file, recipe, metadata["progress"])
    net = models.load(file)
    return {
        "name": name_of(file),
        "hash": models.fingerprint(net),
        "stored_as_float16": _stored(net),
        "start": recorded_start(metadata, file),
        "config": metadata["config"],
        "recipe": changed_settings(recipe),
        "engines": list(recorded_engines(metadata, file)),
        "steps_an_epoch": position.step // recipe.epochs,
        "history": [{key: getattr(epoch, key) for key in EPOCH} for epoch in position.history],
    }


def _stored(net: models.ResidualNet) -> str:
    """Return the hash of a network that is stored as float16, and loaded again."""
    with TemporaryDirectory() as folder:
        half = Path(folder) / "half.safetensors"
        models.save(net, half, torch.float16)
        return models.fingerprint(models.load(half))


def _ended(file: Path, recipe: Recipe, progress: dict[str, Any]) -> Position:
    epochs = len(progress["history"])
    if epochs != recipe.epochs:
        raise ValueError(
            f"trained: expected a training that has ended, got {file}, which has {epochs} of {recipe.epochs} epochs"
        )
    return read_position(progress, recipe.epochs, progress["step"] // recipe.epochs)


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the number of epochs, and the settings of a recipe that are not the defaults."""
    defaults = asdict(Recipe())
    return {key: value for key, value in asdict(recipe).items() if key == "epochs" or value != defaults[key]}


def depths(files: Sequence[Path], trained: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the effective depth along trainings: before each, and at the first measurement after each epoch.

    An epoch within which nothing was measured has no row.

    Args:
        files: CSV files, each with the name of its training.
        trained: the trainings, as `trainings` returns them.

    Raises:
        ValueError: a file holds something else, there is no training of its name, or its steps are of another one.
        OSError: a file cannot be read.
    """
    by_name = {entry["name"]: entry for entry in trained}
    entries = []
    for file in files:
        if (training := by_name.get(name_of(file))) is None:
            raise ValueError(
                f"depths: expected a file with the name of a training ({', '.join(by_name) or 'none is here'}), "
                f"got {file}"
            )
        entries.append({"name": training["name"], "rows": _by_epoch(file, training)})
    return entries


def _by_epoch(file: Path, training: dict[str, Any]) -> list[dict[str, Any]]:
    steps, epochs = training["steps_an_epoch"], training["recipe"]["epochs"]
    first_after: dict[int, effective_depth.Depth] = {}
    for row in sorted(effective_depth.read(file), key=lambda row: row.step):
        if row.step > steps * epochs:
            raise ValueError(
                f"depths: expected steps up to {steps * epochs} (the training's) in {file}, got {row.step}"
            )
        first_after.setdefault(row.step // steps, row)
    return [
        {"step": row.step, "epoch": epoch, "depth": row.depth, "first": row.first, "last": row.last}
        for epoch, row in first_after.items()
    ]
