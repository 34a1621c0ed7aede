"""Tables of the autograd engine's benchmarks on any model, and the one of all speeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.markdown import file_names, listed, number, table
from benchmarks.tables.processors import TITLES, WITH, figure, from_files, processor, sentence
from benchmarks.tables.training import PRECISIONS, times_faster, times_training

__all__ = ["TABLES"]

Results = dict[str, Any]

FIRST = "the same with the forward pass and all preparation of a new network"
"""The figure of the first call on a new network."""


def models(files: Mapping[str, Results]) -> str:
    """Return every ratio of every model with its goal, by processor seconds."""
    ((file, results),) = files.items()
    figures = results["found"]["models"]["figures"]
    names = list(dict.fromkeys(entry["model"] for entry in figures))
    rows = []
    for title in dict.fromkeys(entry["figure"] for entry in figures):
        of_title = {entry["model"]: entry for entry in figures if entry["figure"] == title}
        goal = next(iter(of_title.values()))
        limit = "" if goal["goal"] is None else f"{goal['sense']} {goal['goal']:g}"
        rows.append([title, limit, *(_cell(of_title.get(name)) for name in names)])
    models = results["found"]["models"]["models"]
    for few_or_many, visits in enumerate(models[names[0]]["visits"]):
        cells = (_sharing(models[name]["visits"][few_or_many]) for name in names)
        rows.append(
            [f"modules on {number(visits['paths'], 4)} paths, over those left if equal tails are shared", "", *cells]
        )
    return f"{sentence(results)}, by processor seconds ({file_names([file])}):\n\n{table(['', 'goal', *names], rows)}"


def _sharing(visits: Mapping[str, int]) -> str:
    modules, shared = visits["modules"], visits["shared"]
    return f"{modules:,} / {shared:,} = {number(modules / shared)}"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    value = entry["wall"] if entry["processor"] is None else entry["processor"]
    return number(value) + (", **not** met" if entry["met"] is False else "")


def speed(files: Mapping[str, Results]) -> str:
    """Return times faster than the loop, the composition, PyTorch's training and fifteen lines, by processor."""
    on_networks = [results for results in files.values() if "lengths" in results["found"]]
    on_models = {_name(results): results for results in files.values() if "models" in results["found"]}
    rows = []
    for rival, title in TITLES.items():
        if rival[1] == "running":
            cells = (figure(results, rival, WITH) for results in on_networks)
            rows.append([f"ResNet-110, one path a call, {rival[2]}", title.split(",")[0], *cells])
    trained = {processor(results): results for results in files.values() if times_training(results)}
    for precision in PRECISIONS if trained else ():
        rival = "PyTorch's best form" + (" in float32" if precision == "float32" else "")
        cells = (_training(trained.get(processor(results)), precision) for results in on_networks)
        rows.append([f"ResNet-110, training step, {precision}", rival, *cells])
    for name in dict.fromkeys(entry["model"] for file in on_models.values() for entry in _figures(file)):
        cells = (_few(on_models.get(_name(results)), name) for results in on_networks)
        rows.append([f"{name}, 100 random paths a call, float32", "fifteen lines", *cells])
    header = ["measured", "times faster than", *map(processor, on_networks)]
    return "\n\n".join([table(header, rows), *map(_first_calls, on_models.values()), from_files(files)])


def _training(results: Results | None, precision: str) -> str:
    return "not measured" if results is None else times_faster(results, precision)


def _first_calls(results: Results) -> str:
    """Return what the first call on a new network costs, as a sentence."""
    speeds = {entry["model"]: _cell(entry) for entry in _figures(results) if entry["figure"] == FIRST}
    names = listed(list(speeds))
    return (
        f"On {processor(results)}, the rows of {names} time the backward passes of a prepared network. "
        "With the forward pass and all preparation of a new network, the same 100 paths are "
        f"{listed(list(speeds.values()))} times as fast as the fifteen lines."
    )


def _name(results: Results) -> str:
    return str(results["facts"]["processor"])


def _figures(results: Results) -> list[dict[str, Any]]:
    return list(results["found"]["models"]["figures"])


def _few(results: Results | None, model: str) -> str:
    if results is None:
        return "not measured"
    entry = next(entry for entry in _figures(results) if entry["model"] == model)
    cores = results["facts"]["threads"]
    return f"{_cell(entry)} ({'one core' if cores == 1 else f'{cores} cores'})"


TABLES = {"models": models, "speed": speed}
"""Tables by name."""
