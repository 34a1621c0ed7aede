"""The commands ``pathnet gradients`` and ``pathnet figures`` on a run of path gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import FEW, assert_one_line, pathnet_

from pathnet import models, results


def test_gradients_prints_the_table_and_writes_the_figure(run: Path, weights: Path) -> None:
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--out", run, *FEW)
    assert "path gradients" not in ended.err, "nothing was missing"
    lines = ended.out.splitlines()
    assert "digits; preact_resnet, depth 20, width 4, 9 blocks" in lines[0]
    assert [line.split()[:2] for line in lines[2:11]] == [[str(length), "3"] for length in range(1, 10)]
    assert "27 measurements on 3 batches" in lines[11]
    assert any("effective paths: lengths" in line for line in lines) and any("per module" in line for line in lines)
    for written in lines[-3:]:
        assert Path(written).exists()
    assert lines[-3:] == [str(run), *(str(run / "figures" / f"figure-6.{suffix}") for suffix in ("png", "svg"))]


def test_gradients_finds_the_runs_own_weights_and_goes_on(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(weights.read_bytes())
    for batches in (1, 3):
        ended = pathnet_(
            "gradients", "--data", "digits", "--out", tmp_path, "--batches", batches, "--batch-size", 8, "--json"
        )
        assert json.loads(ended.out)["measurements"] == 9 * batches
    assert "path gradients: 3/3 batches, engine" in ended.err


def test_other_methods_go_into_the_folder_and_the_figure(weights: Path, tmp_path: Path) -> None:
    flags = ["gradients", "--data", "digits", "--weights", weights, "--out", tmp_path, *FEW, "--engine", "reference"]
    for method in ("exact", "sampled", "signed"):
        ended = pathnet_(*flags, "--method", method)
        assert ended.status == 0 and "path gradients: 3/3 batches, engine reference" in ended.err, ended.err
    lines = ended.out.splitlines()
    stems = [f"{name}.{suffix}" for name in ("figure-6", "exact-sums") for suffix in ("png", "svg")]
    assert lines[-5:] == [str(tmp_path), *(str(tmp_path / "figures" / stem) for stem in stems)]
    headings = [line for line in lines if line.startswith("digits; preact_resnet, depth 20, width 4, 9 blocks")]
    assert [heading.rstrip().partition("blocks")[2] for heading in headings] == ["", ": exact", ": signed"]
    words = " ".join(lines)
    assert (
        "exact sums over all 2^9 paths, on 3 batches" in words
        and "3 signed draws on 3 batches, too few for a standard error; not to be" in words
    )
    assert "27 measurements on 3 batches" in words and "at lengths 1 to 9, these measurements do not decide" in words
    facts = json.loads(pathnet_("figures", tmp_path, "--json").out)
    assert facts["measurements"] == 27 and facts["exact"]["batches"] == facts["cost"]["batches"] == 3
    assert len(facts["signed"]["trusted"]) == 10 and len(facts["cancelling"]["mean"]) == 9
    assert [Path(file).name for file in facts["written"]] == stems and len(facts["claims"]) == 3


def test_the_device_is_no_part_of_a_run(run: Path, weights: Path) -> None:
    for device in ("cpu", "auto"):
        flags = ["--data", "digits", "--weights", weights, "--out", run, *FEW, "--device", device]
        assert pathnet_("gradients", *flags).status == 0
    assert "device" not in results.read(run).identity


def test_figures_draws_again_from_the_folder(run: Path) -> None:
    for file in (run / "figures").iterdir():
        file.unlink()
    ended = pathnet_("figures", run)
    assert ended.status == 0 and (run / "figures" / "figure-6.svg").exists() and "27 measurements" in ended.out
    facts = json.loads(pathnet_("figures", run, "--json").out)
    assert facts["written"] == [str(run / "figures" / f"figure-6.{suffix}") for suffix in ("png", "svg")]
    assert facts["n"] == 9 and len(facts["mean"]) == 9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "abacus"], ["device: expected auto, cpu", "got 'abacus'"]),
        (["--engine", "abacus"], ["engine: expected auto", "got 'abacus'"]),
        (["--batch-size", "1438"], ["batch_size: expected 1 to 1437", "got 1438"]),
        (["--batches", "0"], ["batches: expected", "got 0"]),
        (["--draws", "0"], ["draws: expected", "got 0"]),
        (["--seed", "-1"], ["seed: expected", "got -1"]),
        (["--data", "synthetic"], ["data: expected images of 1 channels", "got 3 in synthetic"]),
        (["--data", "/nowhere"], ["data: expected digits, synthetic or an existing folder", "/nowhere"]),
        (["--weights", "/nowhere.safetensors"], ["weights: /nowhere.safetensors does not exist"]),
        (["--out", "/dev/null/run"], ["/dev/null/run"]),
        (["--engine", "cuda", "--device", "cpu"], ["engine: expected one that serves this job, got 'cuda'"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_gradients_names_bad_input(weights: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    usual = {"--data": "digits", "--weights": weights, "--out": tmp_path / "run", "--batches": 1, "--batch-size": 8}
    usual |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert_one_line(pathnet_("gradients", *(word for flag in usual.items() for word in flag)), *words)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_none(tmp_path: Path, run: Path) -> None:
    broken = tmp_path / "weights.safetensors"
    for content in (b"", b"not safetensors at all", b"\xff" * 64):
        broken.write_bytes(content)
        ended = pathnet_("gradients", "--data", "digits", "--weights", broken, "--out", tmp_path / "run")
        assert_one_line(ended, broken, "is not a readable safetensors file")


def test_a_run_of_other_weights_is_refused(tmp_path: Path, run: Path) -> None:
    torch.manual_seed(1)
    models.save(models.preact_resnet(20, 4, in_channels=1), tmp_path / "other.safetensors")
    ended = pathnet_("gradients", "--data", "digits", "--weights", tmp_path / "other.safetensors", "--out", run, *FEW)
    assert_one_line(ended, run, "holds another run", "model.hash: expected")


def test_folders_that_hold_no_run_and_parts_that_are_cut_short(tmp_path: Path, weights: Path) -> None:
    assert_one_line(pathnet_("figures", tmp_path / "nowhere"), "run: expected the folder of a run", "nowhere")
    flags = ["--data", "digits", "--weights", weights, "--out", tmp_path, *FEW]
    assert pathnet_("gradients", *flags).status == 0
    (part,) = results.read(tmp_path).parts
    part.write_bytes(part.read_bytes()[:-20])
    for ended in (pathnet_("figures", tmp_path), pathnet_("gradients", *flags)):
        assert_one_line(ended, part, "is not a readable part")
