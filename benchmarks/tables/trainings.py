"""Tables of the trainings of networks and of their effective depth, from the files of `benchmarks.paper`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.tables.markdown import listed, number, percent, table
from pathnet.training import Recipe

__all__ = ["TABLES"]

Results = dict[str, Any]

MOST_ROWS = 20
"""Rows of the table of depths at most, besides those of its first and last epoch."""
SCHEDULES = {
    "steps": "learning rate {rate}, divided by 10 after half of the steps and again after three quarters{warmup}",
    "one-cycle": "learning rate rising to {rate}, then falling to 0, in one cycle{warmup}",
}
WARMUPS = {
    "steps": ", after a warm-up of {steps:,} steps at {rate}",
    "one-cycle": ", whose rise takes {steps:,} steps from {rate}",
}
SHOWN = {
    *("epochs", "batch_size", "learning_rate", "schedule", "weight_decay", "warmup_steps", "warmup_learning_rate"),
    *("augment", "flips", "label_smoothing", "modules", "bfloat16", "seed"),
}
"""Settings that have words of their own."""
FLIPS = {"random": "augmentation of the data set", "alternating": "augmentation of the data set, flips alternating"}


def trainings(files: Mapping[str, Results]) -> str:
    """Return how networks were trained, and what came out: a row for those that differ only in their seeds."""
    rows, ended = [], _ends([training for results in files.values() for training in results.get("trainings", [])])
    for results in files.values():
        for alike in _groups(results.get("trainings", []), ended):
            names = listed([f"`{training['name']}`" for training in alike])
            last = [training["history"][-1] for training in alike]
            hours = [math.fsum(epoch["seconds"] for epoch in training["history"]) / 3600 for training in alike]
            rows.append(
                [
                    results["data"],
                    f"{names}: {_network(alike[0]['config'])}",
                    ", ".join([*_beginning(alike, ended), *_recipe(alike[0]), *_seeds(alike)]),
                    listed([percent(epoch["test_accuracy"]) for epoch in last]),
                    listed([number(epoch["train_loss"]) for epoch in last]),
                    listed([number(each) for each in hours]),
                ]
            )
    header = ["data", "network", "recipe", "test accuracy at the end", "training loss, last epoch", "hours of steps"]
    return table(header, rows)


def _ends(trained: list[dict[str, Any]]) -> dict[str, str]:
    """Return the networks that trainings ended with, in words by their hash, also as stored in float16."""
    words = {training["stored_as_float16"]: f"`{training['name']}`, stored as float16" for training in trained}
    return words | {training["hash"]: f"`{training['name']}`" for training in trained}


def _beginning(alike: list[dict[str, Any]], ended: Mapping[str, str]) -> list[str]:
    """Return in words the trained networks that trainings began with, or nothing if they began with new ones."""
    beginnings = [ended[training["start"]] for training in alike if training["start"] in ended]
    return [f"beginning with {listed(beginnings)}"] if beginnings else []


def _groups(trained: list[dict[str, Any]], ended: Mapping[str, str]) -> list[list[dict[str, Any]]]:
    """Return trainings that differ only in their seeds together, in the order of the first of each group."""
    groups: list[list[dict[str, Any]]] = []
    for training in trained:
        settings = _without_seed(training, ended)
        alike = next((group for group in groups if _without_seed(group[0], ended) == settings), None)
        if alike is None:
            groups.append([training])
        else:
            alike.append(training)
    return groups


def _without_seed(training: Mapping[str, Any], ended: Mapping[str, str]) -> list[Any]:
    """Return what trainings that share a row have in common."""
    return [training["config"], {**training["recipe"], "seed": 0}, training["start"] in ended]


def _seeds(alike: list[dict[str, Any]]) -> list[str]:
    """Return the seeds of trainings in words, or nothing for the default seed of one."""
    seeds = [str(Recipe(**training["recipe"]).seed) for training in alike]
    if len(seeds) > 1:
        return [f"seeds {listed(seeds)}"]
    return [] if seeds == ["0"] else [f"seed {seeds[0]}"]


def _network(config: Mapping[str, Any]) -> str:
    """Return a network in words, without what the data set decides."""
    left_out = ("model", "num_classes", "in_channels", "survival")
    arguments = [
        f"{name.replace('_', ' ')} {value}" for name, value in sorted(config.items()) if name not in left_out
    ]
    return ", ".join([f"`{config['model']}`", *arguments])


def _recipe(training: Mapping[str, Any]) -> list[str]:
    """Return the settings of a training in words; those of its network that count in training as well."""
    recipe = Recipe(**training["recipe"])
    words = [
        f"{recipe.epochs} epoch{'s'[: recipe.epochs > 1]} of batches of {recipe.batch_size}",
        SCHEDULES[recipe.schedule].format(rate=number(recipe.learning_rate), warmup=_warmup(recipe, training)),
        f"weight decay {number(recipe.weight_decay)}",
        FLIPS[recipe.flips] if recipe.augment else "no augmentation",
    ]
    if recipe.label_smoothing:
        words.append(f"label smoothing {number(recipe.label_smoothing)}")
    if recipe.modules:
        words.append(f"{recipe.modules} modules drawn for each batch")
    if (survival := training["config"].get("survival", 1)) < 1:
        words.append(f"stochastic depth, the last module surviving with probability {number(survival)}")
    if recipe.bfloat16:
        words.append("bfloat16")
    remaining = training["recipe"].keys() - SHOWN
    return [*words, *(f"{name.replace('_', ' ')} {training['recipe'][name]}" for name in sorted(remaining))]


def _warmup(recipe: Recipe, training: Mapping[str, Any]) -> str:
    """Return the warm-up in words, or nothing if there is none; one cycle rises during half of the steps at most."""
    half = recipe.epochs * training["steps_an_epoch"] // 2
    steps = min(recipe.warmup_steps, half) if recipe.schedule == "one-cycle" else recipe.warmup_steps
    return WARMUPS[recipe.schedule].format(steps=steps, rate=number(recipe.warmup_learning_rate)) if steps else ""


def depths(files: Mapping[str, Results]) -> str:
    """Return the effective depth by epoch: two columns for each training."""
    trained = [entry for results in files.values() for entry in results.get("depths", [])]
    columns = [{row["epoch"]: row for row in entry["rows"]} for entry in trained]
    header = ["epochs"]
    for entry in trained:
        header += [f"effective depth, `{entry['name']}`", "lengths with 95 %"]
    epochs = sorted({epoch for column in columns for epoch in column})
    rows = [
        [str(epoch), *(cell for column in columns for cell in _depth(column.get(epoch)))] for epoch in _some(epochs)
    ]
    return table(header, rows)


def _some(epochs: list[int]) -> list[int]:
    """Return the first epoch, the last, and evenly spaced ones between them."""
    step = math.ceil(len(epochs) / MOST_ROWS)
    return [epoch for i, epoch in enumerate(epochs) if i % step == 0 or i == len(epochs) - 1]


def _depth(row: Mapping[str, Any] | None) -> list[str]:
    """Return the cells of a measurement, empty if there is none, or if no gradient arrived."""
    if row is None or row["depth"] is None:
        return ["", ""]
    return [number(row["depth"]), f"{row['first']} to {row['last']}"]


TABLES = {"trainings": trainings, "depths": depths}
"""Tables by name."""
