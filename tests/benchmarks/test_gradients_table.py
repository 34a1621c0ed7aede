"""The table of path gradients: columns that tell runs apart, and the paper's own beside networks of its depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import gradient_run

from benchmarks import paper
from benchmarks.tables import paths
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

PAPER = (
    "lengths 5 to 17: almost all of the gradient, 0.45 % of all paths",
    "lengths 19 to 35: more than 95 % of all paths",
)


def numbers_of(folder: Path, n: int) -> dict[str, Any]:
    """Return the numbers of a run on n blocks, each of which halves the norm, with made-up exact sums."""
    run = gradient_run(folder, np.tile(0.5 ** np.arange(1.0, n + 1), (12, 1)))
    (entry,) = paper.gathered([run], ["pathnet gradients"], "abc")["experiments"]["path-gradients"]
    exact = {
        "batches": 7,
        "norm": {"mean": [1.0] * (n + 1)},
        "full_norm": (n + 1) / 4,
        # The longest sums are 0.
        "next_cosine": {"mean": [0.25, *[0.5] * (n - 2), None]},
        "explained": {"mean": [0.9, *[0.96] * n]},
        "left": {"mean": [0.5, *[0.125] * n]},
    }
    made_up = {"exact": exact, "cancelling": {"mean": [0.25] * n}, "decay": [0.5, 0.25, 0.75]}
    return {**entry["numbers"], **made_up}


def run(numbers: dict[str, Any], network: str = "abc", **settings: Any) -> dict[str, Any]:
    return {"numbers": numbers, "networks": {"residual": [network]}, "settings": {"bn": "running", **settings}}


def file(*runs: dict[str, Any], data: str = "CIFAR-10") -> dict[str, Any]:
    return {"data": data, "experiments": {"path-gradients": list(runs)}}


def columns(*files: dict[str, Any]) -> dict[str, list[str]]:
    """Return the columns of the table by their headings, which must differ."""
    lines = paths.gradients({f"paper/{i}.json": content for i, content in enumerate(files)}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in [lines[0], *lines[2:]]]
    by_heading = {heading: column for heading, *column in zip(*cells, strict=True)}
    assert len(by_heading) == len(cells[0])
    return by_heading


def test_the_papers_column_stands_beside_a_network_of_its_depth(tmp_path: Path) -> None:
    shown = columns(file(run(numbers_of(tmp_path, 54))))
    assert list(shown) == ["", "the paper", "CIFAR-10"]
    theirs = dict(zip(shown[""], shown["the paper"], strict=True))
    ours = dict(zip(shown[""], shown["CIFAR-10"], strict=True))
    assert {title: cell for title, cell in theirs.items() if cell} == {
        "blocks, path gradients, batches": "54, 54000",
        "effective paths": PAPER[0],
        "most paths": PAPER[1],
    }
    assert ours["blocks, path gradients, batches"] == "54, 648, 12"
    assert ours["each module multiplies the mean norm by"] == "0.5 (0.25 to 0.75)"
    assert ours["cosine of neighbouring lengths"] == "0.25 to 0.5"
    share = (54 + 1) / 2**54
    assert ours["lengths that explain 95 % of the gradient"] == (
        f"up to 1, {100 * share:.3g} % of all paths; they leave 12.5 % of its norm"
    )
    # The paper's lengths hold as many paths as it says.
    assert sum(math.comb(54, length) for length in range(5, 18)) / 2**54 == pytest.approx(0.0045, rel=0.02)
    assert sum(math.comb(54, length) for length in range(19, 36)) / 2**54 > 0.95


def test_other_networks_have_no_column_of_the_papers(tmp_path: Path) -> None:
    assert list(columns(file(run(numbers_of(tmp_path, 6))))) == ["", "CIFAR-10"]


def test_runs_are_told_apart_by_network_and_by_mode(tmp_path: Path) -> None:
    numbers = numbers_of(tmp_path, 6)
    modes = [run(numbers), run(numbers, bn="batch")]
    assert list(columns(file(*modes))) == ["", "CIFAR-10, mode `running`", "CIFAR-10, mode `batch`"]
    networks = [run(numbers, "one"), run(numbers, "two")]
    assert list(columns(file(*networks))) == ["", "CIFAR-10, network 0", "CIFAR-10, network 1"]
    both = [run(numbers, "one"), run(numbers, "two"), run(numbers, "one", bn="batch")]
    assert list(columns(file(*both)))[1:] == [
        "CIFAR-10, network 0, mode `running`",
        "CIFAR-10, network 1, mode `running`",
        "CIFAR-10, network 0, mode `batch`",
    ]
    seeds = [run(numbers, seed=0, batch_size=8), run(numbers, seed=1, batch_size=8)]
    assert list(columns(file(*seeds)))[1:] == ["CIFAR-10, seed 0", "CIFAR-10, seed 1"]


def test_files_on_one_data_set_are_told_apart_by_depth(tmp_path: Path) -> None:
    short, long = numbers_of(tmp_path / "short", 6), numbers_of(tmp_path / "long", 54)
    shown = columns(file(run(short)), file(run(long), run(long, bn="batch")), file(run(short), data="digits"))
    assert list(shown)[1:] == [
        "the paper",
        "CIFAR-10, 6 blocks",
        "CIFAR-10, 54 blocks, mode `running`",
        "CIFAR-10, 54 blocks, mode `batch`",
        "digits",
    ]


def test_a_run_without_a_method_leaves_its_cells_empty(tmp_path: Path) -> None:
    numbers = numbers_of(tmp_path, 6)
    sampled = {key: value for key, value in numbers.items() if key not in ("exact", "cancelling")}
    exact = {"n": 6, "exact": numbers["exact"]}
    shown = columns(file(run(numbers), run(sampled, bn="batch"), run(exact, bn="recalibrated")))
    _, all_methods, no_exact, no_sampled = shown.values()
    assert all(all_methods) and len(all_methods) == 12
    assert no_exact == [*all_methods[:6], *[""] * 6]
    assert no_sampled == ["6", *[""] * 5, *all_methods[6:9], "", *all_methods[10:]]
    (_, alone) = columns(file(run(sampled))).values()
    assert alone == all_methods[:6]


def test_few_batches_have_no_interval(tmp_path: Path) -> None:
    numbers = {**numbers_of(tmp_path, 6), "decay": [0.5, None, None]}
    assert columns(file(run(numbers)))["CIFAR-10"][1] == "0.5"
