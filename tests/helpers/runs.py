"""Runs of known numbers, written as the drivers write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from pathnet import results
from pathnet.experiments import highway, remaining_paths, unraveled
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Value
from pathnet.lesion import Lesion
from pathnet.results import Measurements

IMAGES = 100_000
INTACT = Lesion()
ATTEMPT = {"started": "2016-05-20T00:00:00+00:00", "pathnet": "0.1.0", "torch": "2", "device": "a processor"}


def write_run(
    folder: Path,
    experiment: str,
    kinds: Mapping[str, tuple[int, Sequence[int]]],
    rows: Sequence[ErrorCount | Value],
    seeds: int = 1,
    data: str = "made up",
    **identity: Any,
) -> results.Run:
    """Write a run of networks of ten classes.

    Args:
        folder: that of the run.
        experiment: name of the driver.
        kinds: by kind of network, its number of blocks and the blocks that change the shape.
        rows: the measurements.
        seeds: number of networks of each kind.
        data: name of the data set.
        identity: the rest of the identity.
    """
    networks = {
        kind: [
            {
                "hash": f"{kind} {seed}",
                "config": {"depth": 2 * blocks + 2, "width": 4},
                "blocks": blocks,
                "downsampling": list(changing),
                "survival": [1 - i / (2 * blocks) for i in range(blocks)] if "stochastic" in kind else [1.0] * blocks,
            }
            for seed in range(seeds)
        ]
        for kind, (blocks, changing) in kinds.items()
    }
    facts = {"networks": networks, "data": {"name": data, "hash": "abc", "classes": 10}}
    with results.writing(folder, {"experiment": experiment, **facts, **identity}, {}, ATTEMPT) as run:
        for kind in {type(row) for row in rows}:
            run.add_rows([row for row in rows if type(row) is kind])
        return run


def error_count(
    rate: float,
    network: str = "residual",
    seed: int = 0,
    size: int = 0,
    draw: int = 0,
    lesion: Lesion = INTACT,
    bn: str = "running",
) -> ErrorCount:
    """Return an error count whose rate is a multiple of 1/1000; the first images are misclassified."""
    wrong = round(rate * IMAGES)
    text = "1" * wrong + "0" * (IMAGES - wrong)
    return ErrorCount(network, seed, size, draw, lesion.deleted, lesion.order, lesion.scale, bn, IMAGES, wrong, text)


def deletions(intact: float, rates: Sequence[float], network: str = "residual", seed: int = 0) -> list[ErrorCount]:
    """Return error counts of the intact network, and of the network without each of its blocks."""
    single = [error_count(rate, network, seed, 1, lesion=Lesion((i,))) for i, rate in enumerate(rates)]
    return [error_count(intact, network, seed), *single]


def sizes_of(intact: float, rates: Mapping[int, Sequence[float]], seed: int = 0) -> list[ErrorCount]:
    """Return error counts of the intact network, and after lesions of each size, one per draw."""
    lesioned = [
        error_count(rate, seed=seed, size=size, draw=draw, lesion=Lesion(tuple(range(size))))
        for size, of_draws in rates.items()
        for draw, rate in enumerate(of_draws)
    ]
    return [error_count(intact, seed=seed), *lesioned]


def effective_run(
    folder: Path, full: Sequence[float], effective: Mapping[str, Sequence[float]], modules: int = 2, **identity: Any
) -> results.Run:
    """Write a run of effective training, with error rates by way of testing."""
    rows = [error_count(rate, seed=seed) for seed, rate in enumerate(full)]
    for name, rates in effective.items():
        scale = modules / 4 if name == "scaled by k/n" else 1.0
        bn = "recalibrated" if name == "recalibrated" else "running"
        lesion = Lesion(scale=scale)
        rows += [error_count(rate, "effective", seed, lesion=lesion, bn=bn) for seed, rate in enumerate(rates)]
    kinds = {"residual": (4, (1,)), "effective": (4, (1,))}
    return write_run(folder, "effective-training", kinds, rows, seeds=len(full), modules=modules, **identity)


def three_ways(best: Sequence[float]) -> dict[str, list[float]]:
    """Return error rates by way of testing, lowest with scaled modules."""
    return {
        "as it is": [0.9, 0.91, 0.95][: len(best)],
        "scaled by k/n": list(best),
        "recalibrated": [0.8, 0.82, 0.83][: len(best)],
    }


def gradient_run(folder: Path, norms: np.ndarray[Any, Any], data: str = "made up") -> results.Run:
    """Write a run of sampled path gradients with the norms [batches, n]."""
    batches, n = norms.shape
    model = {"hash": "abc", "config": {"model": "residual"}, "blocks": n}
    identity = {"experiment": "path-gradients", "model": model, "data": {"name": data, "hash": "abc"}}
    with results.writing(folder, identity, {"batches": batches}, ATTEMPT) as run:
        lengths = np.tile(np.arange(1, n + 1, dtype=np.int16), batches)
        codes = np.tril(np.ones((n, n), np.uint8))[lengths - 1]
        batch = np.repeat(np.arange(batches, dtype=np.int32), n)
        run.add([Measurements(batch, lengths, codes, norms.ravel(), ["cpu"] * norms.size)])
        return run


def highway_rows(openness: float = 0.2, parts_off: float = 1e-6, half_off: float = 1e-16) -> list[Value]:
    """Return the values of two highway networks of three blocks on six batches."""
    rows = []
    for seed, batch in product(range(2), range(6)):
        for block in range(3):
            rows += [
                Value("highway", seed, batch, highway.OPENNESS, block, openness + 0.01 * seed),
                Value("highway", seed, batch, highway.PARTS_OFF, block, parts_off if block == 1 else 0.0),
                Value("highway", seed, batch, highway.PATH_NORM, block, 0.5**block * (1 + batch % 3)),
            ]
            rows += [
                Value("highway", seed, batch, p, block, w)
                for p, w in zip(highway.PARTS, (0.5, 0.3, 0.2), strict=True)
            ]
        rows.append(Value("highway", seed, batch, highway.FROZEN, 0, 0.9))
        if batch == 0:
            rows += [Value("highway", seed, 0, highway.BIAS, block, -1.0 - block - 10 * seed) for block in range(3)]
            rows.append(Value("highway", seed, 0, highway.HALF_OFF, 0, half_off))
    return rows


def one_of_each(folder: Path, data: str = "made up") -> list[results.Run]:
    """Write a complete run of every experiment, on networks of few blocks."""
    six, three = (6, (2, 4)), (3, (2,))
    of_gates = [row for seed in range(2) for row in deletions(0.1, [0.2, 0.15, 0.5], "highway", seed)]
    orders = [
        error_count(0.1 + 0.01 * i, size=1 + i % 3, draw=i // 3, lesion=Lesion(order=(i % 3, *{0, 1, 2} - {i % 3})))
        for i in range(12)
    ]
    single = deletions(0.1, [0.12, 0.21, 0.5, 0.11, 0.4, 0.1]) + deletions(0.1, [0.9, 0.85, 0.9, 0.91], "vgg")
    beside = deletions(0.1, [0.2, 0.12, 0.5]) + deletions(0.12, [0.14, 0.13, 0.2], "stochastic depth")
    many = sizes_of(0.1, {1: [0.12, 0.14], 2: [0.2, 0.22], 3: [0.3, 0.28], 4: [0.4, 0.38]})
    forms = [Value("", 0, 0, form, n, 1e-15) for form in (unraveled.NESTED, unraveled.PATHS) for n in range(1, 7)]
    draws = remaining_paths.DRAWS
    left = [
        Value(
            "",
            0,
            0,
            f"left of {draws} with {deleted} deleted",
            length,
            float(round(draws * comb(54 - deleted, length) / comb(54, length))),
        )
        for deleted in remaining_paths.DELETED
        for length in range(55)
    ]
    runs: list[results.Run] = []

    def add(name: str, kinds: Mapping[str, tuple[int, Sequence[int]]], rows: Sequence[Any], **more: Any) -> None:
        runs.append(write_run(folder / name, name, kinds, rows, data=data, **more))

    add("unraveled", {}, forms)
    add("lesion-single", {"residual": six, "vgg": (4, (1,))}, single)
    add("lesion-many", {"residual": six}, many)
    add("lesion-reorder", {"residual": (3, ())}, [error_count(0.1), *orders])
    runs.append(gradient_run(folder / "path-gradients", np.tile(0.3 ** np.arange(1.0, 7), (5, 1)), data))
    effective = effective_run(
        folder / "effective-training", [0.1, 0.12, 0.11], three_ways([0.12, 0.1, 0.13]), data=data
    )
    runs.append(effective)
    add("remaining-paths", {}, left, blocks=54)
    add("lesion-stochastic-depth", {"residual": three, "stochastic depth": three}, beside)
    add("highway", {"highway": three}, [*highway_rows(), *of_gates], seeds=2)
    return runs
