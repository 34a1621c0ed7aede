"""Runs made up of numbers that are known, as the drivers would have written them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathnet import results
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Value

IMAGES = 1000
ATTEMPT = {"started": "2016-05-20T00:00:00+00:00", "pathnet": "0.1.0", "torch": "2", "device": "a processor"}


def made_run(
    folder: Path,
    experiment: str,
    kinds: Mapping[str, tuple[int, Sequence[int]]],
    rows: Sequence[ErrorCount | Value],
    seeds: int = 1,
    **identity: Any,
) -> results.Run:
    """A run of networks of ten classes.

    Args:
        kinds: for each kind of network how many blocks it has and which of them change the shape.
        identity: what it holds besides.
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
    facts = {"networks": networks, "data": {"name": "made up", "hash": "abc", "classes": 10}}
    with results.writing(folder, {"experiment": experiment, **facts, **identity}, {}, ATTEMPT) as run:
        for kind in {type(row) for row in rows}:
            run.add_rows([row for row in rows if type(row) is kind])
        return run


def count(
    rate: float,
    network: str = "residual",
    seed: int = 0,
    size: int = 0,
    draw: int = 0,
    deleted: tuple[int, ...] = (),
    order: tuple[int, ...] = (),
    scale: float = 1.0,
    bn: str = "running",
) -> ErrorCount:
    """An error rate, in thousandths."""
    return ErrorCount(network, seed, size, draw, deleted, order, scale, bn, IMAGES, round(rate * IMAGES))


def deletions(intact: float, rates: Sequence[float], network: str = "residual", seed: int = 0) -> list[ErrorCount]:
    """The network as it is and without each of its blocks."""
    single = [count(rate, network, seed, 1, deleted=(i,)) for i, rate in enumerate(rates)]
    return [count(intact, network, seed), *single]


def by_size(intact: float, rates: Mapping[int, Sequence[float]], seed: int = 0) -> list[ErrorCount]:
    """The network as it is and after lesions of each size, one a draw."""
    lesioned = [
        count(rate, seed=seed, size=size, draw=draw, deleted=tuple(range(size)))
        for size, own in rates.items()
        for draw, rate in enumerate(own)
    ]
    return [count(intact, seed=seed), *lesioned]
