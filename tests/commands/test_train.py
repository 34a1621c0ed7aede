"""The command ``pathnet train``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import DIGITS_NET, QUICK, assert_one_line, pathnet_

from pathnet import data, models, training
from pathnet.models.weights import read_tensors, write_tensors


def test_train_writes_weights_that_load_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "net" / "weights.safetensors"
    ended = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK)
    assert ended.status == 0 and ended.out.splitlines()[-1] == str(out)
    assert ended.out.splitlines()[0] == "fused kernels of the cpu engine train 3 of 3 blocks"
    assert "test accuracy" in ended.out and "training: 3/3" in ended.err
    assert models.load(out).config == models.preact_resnet(8, 4, in_channels=1).config
    before = models.fingerprint(models.load(out))
    again = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--json")
    facts = json.loads(again.out)
    assert (facts["engine"], facts["fused_blocks"], facts["blocks"]) == ("cpu", 3, 3)
    assert facts["epochs"][0]["epoch"] == 0 and models.fingerprint(models.load(out)) == before


def test_train_is_a_function_of_its_seed(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / name / "w.safetensors"
        assert pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--seed", seed).status == 0
        prints.append(models.fingerprint(models.load(out)))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        (
            ["--model", "vgg", "--depth", 6, "--width", 4, "--stages", 2],
            {"model": "vgg", "depth": 6, "width": 4, "num_classes": 10, "in_channels": 1, "stages": 2},
        ),
        (
            ["--model", "highway", "--depth", 8, "--width", 4, "--gate-bias", -2, "--shortcut", "pad"],
            models.highway(8, 4, in_channels=1, gate_bias=-2.0, shortcut="pad").config,
        ),
        (
            ["--depth", 8, "--width", 4, "--survival", 0.5],
            models.preact_resnet(8, 4, in_channels=1, survival=0.5).config,
        ),
        (["--depth", 8, "--width", 4, "--modules", 2], models.preact_resnet(8, 4, in_channels=1).config),
        (
            ["--depth", 8, "--width", 4, "--modules", 1, "--undrawn", "zero"],
            models.preact_resnet(8, 4, in_channels=1).config,
        ),
    ],
    ids=["vgg", "highway", "survival", "modules", "undrawn"],
)
def test_every_kind_of_network_and_training_writes_weights_that_load(
    tmp_path: Path, flags: list[object], config: dict[str, object]
) -> None:
    out = tmp_path / "weights.safetensors"
    ended = pathnet_("train", "--data", "digits", "--out", out, *QUICK, *flags)
    assert ended.status == 0 and "training: 3/3" in ended.err, ended.err
    net = models.load(out)
    assert net.config == config
    assert net(torch.zeros(1, 1, 8, 8)).isfinite().all()
    recipe = read_tensors(out.with_name("weights.checkpoint.safetensors"))[1]["recipe"]
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    assert (recipe["modules"], recipe["undrawn"]) == (values.get("--modules", 0), values.get("--undrawn", "none"))


def test_train_takes_the_schedule_flips_and_smoothing_that_are_named(tmp_path: Path) -> None:
    flags = ["--schedule", "one-cycle", "--flips", "alternating", "--label-smoothing", "0.1"]
    prints = []
    for name, words in (("shorter", flags), ("default", [])):
        out = tmp_path / name / "w.safetensors"
        ended = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, *words)
        assert ended.status == 0, ended.err
        recipe = read_tensors(out.with_name("w.checkpoint.safetensors"))[1]["recipe"]
        settings = (recipe["schedule"], recipe["flips"], recipe["label_smoothing"])
        assert settings == (("one-cycle", "alternating", 0.1) if words else ("steps", "random", 0))
        prints.append(models.fingerprint(models.load(out)))
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--label-smoothing", "1.5"], "label_smoothing: expected a finite number from 0 to 1, got 1.5"),
        (["--label-smoothing", "nan"], "label_smoothing: expected a finite number from 0 to 1, got nan"),
        (["--survival", "0"], "survival: expected a finite number above 0 and at most 1, got 0.0"),
        (["--modules", "4"], "modules: expected at most 3 (the network's), got 4"),
        (["--modules", "-1"], "modules: expected an integer of at least 0, got -1"),
        (["--modules", "1", "--survival", "0.5"], "modules: expected 0 for a network with stochastic depth, got 1"),
        (["--model", "vgg", "--survival", "0.5"], "stages), got 'survival'"),
        (["--model", "vgg", "--depth", "6"], "depth: expected at least 7 layers for 4 stages, got 6"),
        (["--model", "highway", "--block", "basic"], "shortcut), got 'block'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_names_flags_that_do_not_fit_the_network(tmp_path: Path, flags: list[str], words: str) -> None:
    ended = pathnet_("train", *DIGITS_NET, "--out", tmp_path / "w.safetensors", *QUICK, *flags)
    assert_one_line(ended, words)


def test_train_runs_the_engine_that_is_named(tmp_path: Path) -> None:
    prints = {}
    for engine in ("cpu", "none"):
        out = tmp_path / engine / "w.safetensors"
        ended = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--engine", engine, "--json")
        assert json.loads(ended.out)["engine"] == engine, ended.err
        prints[engine] = models.fingerprint(models.load(out))
        assert read_tensors(out.with_name("w.checkpoint.safetensors"))[1]["engines"] == [engine]
    assert prints["cpu"] != prints["none"]
    vgg = ["--data", "digits", "--model", "vgg", "--depth", "6", "--width", "4", "--stages", "2"]
    refused = pathnet_("train", *vgg, "--out", tmp_path / "w", *QUICK, "--engine", "cpu")
    assert_one_line(refused, "engine: expected one that can run a block of this network on cpu, got 'cpu' (block 0: ")


def test_processes_of_torchrun_share_out_the_batches_and_the_first_one_tells(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pathnet", "train", *DIGITS_NET, "--out", str(out), *QUICK, "--modules", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(out) and ended.stdout.count("test accuracy") == 2
    assert ended.stdout.count("fused kernels of the cpu engine") == 1
    assert models.load(out).n == 3


def test_train_names_bad_input(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert_one_line(pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--depth", "57"), "depth: ", "got 57")
    assert_one_line(
        pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--epochs", "0"),
        "epochs: expected an integer of at least 1, got 0",
    )
    assert_one_line(pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--batch-size", "2000"), "batch_size 2000")
    assert pathnet_("train", *DIGITS_NET, "--out", out, *QUICK).status == 0
    other = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--width", "5")
    assert_one_line(other, "checkpoint: ", "is of another model")
    (tmp_path / "w.checkpoint.safetensors").unlink()
    assert_one_line(pathnet_("train", *DIGITS_NET, "--out", out, *QUICK), "out: ", "exists")


def test_a_training_begins_with_the_weights_that_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert pathnet_("train", *DIGITS_NET, "--survival", 0.5, "--out", first, *QUICK).status == 0
    half = tmp_path / "half.safetensors"
    models.save(models.load(first), half, torch.float16)
    again = ["--data", "digits", "--weights", half, *QUICK, "--seed", 1]
    ended = pathnet_("train", *again, "--out", second)
    assert ended.status == 0, ended.err
    net = models.load(half)
    assert models.load(second).config == net.config
    metadata = read_tensors(tmp_path / "second.checkpoint.safetensors")[1]
    assert metadata["start"] == models.fingerprint(net)
    training.train(net, data.digits(), training.Recipe(**metadata["recipe"]))
    assert models.fingerprint(net) == models.fingerprint(models.load(second))
    assert pathnet_("train", *again, "--out", second).status == 0
    other = pathnet_("train", "--data", "digits", "--weights", first, *QUICK, "--seed", 1, "--out", second)
    assert_one_line(other, "weights: expected the network that the training in", "began with, got another in", first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", 14], ("depth: expected that of", "net.safetensors (8), got 14")),
        (["--model", "vgg"], ("model: expected that of", "net.safetensors (preact_resnet), got vgg")),
        (["--gate-bias", -1], ("gate_bias: expected that of", "net.safetensors (none), got -1.0")),
    ],
)
def test_a_network_that_is_named_cannot_be_built_otherwise(
    tmp_path: Path, flags: list[object], message: tuple[str, str]
) -> None:
    models.save(models.preact_resnet(8, 4, in_channels=1), tmp_path / "net.safetensors")
    begun = ["train", "--data", "digits", "--weights", tmp_path / "net.safetensors", *QUICK]
    ended = pathnet_(*begun, *flags, "--out", tmp_path / "out.safetensors")
    assert_one_line(ended, *message)
    assert not (tmp_path / "out.checkpoint.safetensors").exists()


def test_a_start_that_is_no_hash_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    net = models.preact_resnet(8, 4, in_channels=1)
    recipe = training.Recipe(epochs=1, batch_size=512, warmup_steps=0)
    file = tmp_path / "net.safetensors"
    training.train(net, data.digits(), recipe, file)
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, {**metadata, "start": 3}, "checkpoint", "")
    with pytest.raises(ValueError, match=r"net\.safetensors: start: expected a string, got 3"):
        training.train(net, data.digits(), recipe, file)
    del metadata["start"]
    write_tensors(file, tensors, metadata, "checkpoint", "")
    assert len(training.train(net, data.digits(), recipe, file)) == 1
