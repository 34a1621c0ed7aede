"""Runs of one experiment told apart, and the table of their times, from the files of `benchmarks.paper`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.tables.markdown import number, table
from pathnet.paper import EXPERIMENTS

__all__ = ["TABLES", "differences"]

Results = dict[str, Any]
Entry = dict[str, Any]


def differences(entries: Sequence[Entry], shown: Collection[str] = ()) -> list[list[str]]:
    """Return in words what tells each run of an experiment from the others: its network, and settings that differ.

    The number of images counts as an amount.

    Args:
        entries: the runs, as a file holds them.
        shown: settings to show of every run that has them, even if all are equal.
    """
    networks = [entry["networks"] for entry in entries]
    unlike = [network for i, network in enumerate(networks) if network not in networks[:i]]
    settings = [entry["settings"] for entry in entries]
    names = sorted({name for each in settings for name in each} - {"images"})
    named = [
        name for name in names if name in shown or any(each.get(name) != settings[0].get(name) for each in settings)
    ]
    return [
        [
            *([f"network {unlike.index(entry['networks'])}"] if len(unlike) > 1 else []),
            *(_in_words(name, entry["settings"][name]) for name in named if name in entry["settings"]),
        ]
        for entry in entries
    ]


def _in_words(name: str, value: Any) -> str:
    return f"mode `{value}`" if name == "bn" else f"{name.replace('_', ' ')} {value}"


def times(files: Mapping[str, Results]) -> str:
    """Return how long each run took: a row for each."""
    rows = [
        [results["data"], experiment, ", ".join(words), _amounts(entry), _minutes(entry.get("seconds"))]
        for results in files.values()
        for experiment in EXPERIMENTS
        for entries in [results["experiments"].get(experiment, [])]
        for entry, words in zip(entries, differences(entries, ("bn",)), strict=True)
    ]
    return table(["data", "experiment", "run", "amounts", "minutes"], rows)


def _amounts(entry: Entry) -> str:
    amounts = [f"{name.replace('_', ' ')} {amount:,}" for name, amount in sorted(entry["amounts"].items())]
    if "images" in entry["settings"]:
        images = entry["settings"]["images"]
        amounts.append(f"test images {images:,}" if images else "all test images")
    return ", ".join(amounts)


def _minutes(seconds: float | None) -> str:
    return "not recorded" if seconds is None else number(seconds / 60)


TABLES = {"times": times}
"""Tables by name."""
