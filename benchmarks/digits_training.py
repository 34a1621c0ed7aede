"""Accuracy of fused training: ``python -m benchmarks.digits_training [--seeds N] [--epochs N] [--out FOLDER]``.

Networks of the digits study are trained from the same weights on the same batches by PyTorch's operators and by the
fused kernels, in float32 and in bfloat16. Roundings differ, and training amplifies them until the networks differ as
much as those of other seeds; so the ends are compared as samples. The mean over the seeds of each measure must lie in
the spread of PyTorch's operators: the interval that holds the mean of as many further trainings of theirs with 95 %
probability.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import scipy
import torch
import torch.nn.functional as F

from benchmarks.cpu.facts import processor, processor_facts
from benchmarks.facts import commit_here
from benchmarks.results import FOLDER, file_name, write
from benchmarks.tables.accuracy import TABLES
from pathnet import models
from pathnet.data import Data, load
from pathnet.models import ResidualNet
from pathnet.study import PRESETS, Study
from pathnet.training import train

__all__ = ["ENGINES", "MEASURES", "PRECISIONS", "comparisons", "main", "spread_of_means", "trainings"]

ENGINES: tuple[Literal["none"], Literal["cpu"]] = ("none", "cpu")
"""PyTorch's operators, and the fused kernels that are compared with them."""
PRECISIONS = ("float32", "bfloat16")
MEASURES = ("test_accuracy", "test_loss", "train_loss")
EVALUATION_BATCH = 256

Entry = dict[str, Any]


def trainings(study: Study, data: Data, epochs: int, seeds: int) -> Iterator[Entry]:
    """Train a residual network for each precision, engine and seed, and yield the measures of each.

    Args:
        study: the networks and their recipe.
        epochs: number of epochs, in place of the recipe's.
        seeds: number of seeds; networks of equal seeds begin with equal weights and see the same batches.
    """
    for precision in PRECISIONS:
        for seed in range(seeds):
            recipe = replace(study.recipe_of("residual", seed), epochs=epochs, bfloat16=precision == "bfloat16")
            for engine in ENGINES:
                torch.manual_seed(recipe.seed)
                net = models.build(study.config("residual", data))
                history = train(net, data, recipe, engine=engine)
                accuracy, loss = _tested(net, data)
                yield {
                    "precision": precision,
                    "engine": engine,
                    "seed": seed,
                    "test_accuracy": accuracy,
                    "test_loss": loss,
                    "train_loss": history[-1].train_loss,
                    "seconds": sum(epoch.seconds for epoch in history),
                }


def _tested(net: ResidualNet, data: Data) -> tuple[float, float]:
    """Return accuracy and mean loss on the test split, by PyTorch's operators in float32 for all networks alike."""
    right = loss = 0.0
    with torch.no_grad():
        for images, labels in data.test_batches(EVALUATION_BATCH):
            output = net.eval()(images)
            right += int((output.argmax(1) == labels).sum())
            loss += F.cross_entropy(output, labels, reduction="sum").item()
    return right / len(data.test), loss / len(data.test)


def comparisons(entries: Sequence[Entry]) -> list[Entry]:
    """Return for each precision and measure what both engines reach, the spread of the eager one, and a verdict."""
    rows = []
    for precision in dict.fromkeys(entry["precision"] for entry in entries):
        for measure in MEASURES:
            eager, fused = (
                [entry[measure] for entry in entries if (entry["precision"], entry["engine"]) == (precision, engine)]
                for engine in ENGINES
            )
            mean, spread = sum(fused) / len(fused), spread_of_means(eager, len(fused))
            rows.append(
                {
                    "precision": precision,
                    "measure": measure,
                    "seeds": len(fused),
                    "eager": {"mean": sum(eager) / len(eager), "least": min(eager), "most": max(eager)},
                    "fused": {"mean": mean, "least": min(fused), "most": max(fused)},
                    "spread": spread,
                    "within": spread[0] <= mean <= spread[1],
                }
            )
    return rows


def spread_of_means(values: Sequence[float], further: int) -> tuple[float, float]:
    """Return the interval that holds the mean of ``further`` values like these with 95 % probability (Student's t).

    Args:
        values: at least two values of a normal distribution.
    """
    count, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * math.sqrt(variance * (1 / count + 1 / further))
    return mean - half, mean + half


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print what is measured, and write the results file; return 1 if a mean lies outside."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits_training")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=FOLDER / "training", help="folder of the results file")
    options = parser.parse_args(arguments)
    # Digits are so small that a second thread would mostly wait.
    torch.set_num_threads(1)
    now, facts, study = datetime.now(UTC), processor_facts(), PRESETS["digits"]
    date, commit = now.date().isoformat(), commit_here() or "unknown"
    results = {
        "kind": "training",
        "date": date,
        "commit": commit,
        "facts": facts,
        "network": {"model": "preact_resnet", "depth": study.depth, "width": study.width},
        "data": study.data,
        "epochs": options.epochs,
        "trainings": (entries := []),
    }
    file = options.out / file_name(f"{processor()} {facts['instruction_set']}", date, commit)
    for entry in trainings(study, load(study.data), options.epochs, options.seeds):
        entries.append(entry)
        print(
            " ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in entry.items()
            )
        )
        write(file, results)
    results["comparisons"] = comparisons(entries)
    write(file, results)
    print(TABLES["trained"]({file.name: results}))
    return int(not all(row["within"] for row in results["comparisons"]))


if __name__ == "__main__":
    sys.exit(main())
