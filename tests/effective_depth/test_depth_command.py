"""The effective depth from the command line, and its figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers.command_line import pathnet_

from pathnet.effective_depth import Depth, read
from pathnet.figures import figure_depth


def test_the_command_measures_goes_on_and_draws(tmp_path: Path) -> None:
    out, file = tmp_path / "net.safetensors", tmp_path / "depth.csv"
    arguments: list[object] = [
        "train",
        "--data",
        "synthetic",
        "--depth",
        8,
        "--width",
        2,
        "--epochs",
        1,
        "--batch-size",
        256,
    ]
    arguments += ["--out", out, "--effective-depth", file, "--device", "cpu", "--json"]
    for _ in range(2):
        done = pathnet_(*arguments)
        assert done.status == 0, done.err
        written = json.loads(done.out)["written"]
        assert written == [str(out), *(str(file.with_suffix(f".{kind}")) for kind in ("csv", "png", "svg"))]
        assert [row.step for row in read(file)] == [0]
    out.unlink()
    out.with_name("net.checkpoint.safetensors").unlink()
    done = pathnet_(*arguments)
    assert done.status == 1 and "effective_depth: expected a new file for a new training" in done.err


def test_the_figure_leaves_out_what_was_not_finite(tmp_path: Path) -> None:
    lost = Depth(200, math.nan, -1, -1, -1, math.nan, 0.1)
    rows = [Depth(0, 4.0, 2, 7, 4, 2.3, 0.1), Depth(100, 3.0, 1, 6, -1, 1.1, 0.1), lost]
    files = figure_depth(rows, "a training", tmp_path / "depth")
    assert [file.name for file in files] == ["depth.png", "depth.svg"] and all(file.stat().st_size for file in files)
    with pytest.raises(ValueError, match="results: expected a measured depth, got none"):
        figure_depth([lost], "a training", tmp_path / "depth")


def test_the_command_names_its_own_argument(tmp_path: Path) -> None:
    (tmp_path / "depth.csv").mkdir()
    (tmp_path / "net.checkpoint.safetensors").touch()
    arguments: list[object] = ["train", "--data", "synthetic", "--depth", 8, "--width", 2, "--device", "cpu"]
    arguments += ["--out", tmp_path / "net.safetensors", "--effective-depth", tmp_path / "depth.csv"]
    done = pathnet_(*arguments)
    assert done.status == 1 and "effective_depth: expected a file" in done.err
