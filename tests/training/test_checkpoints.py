"""Checkpoints: refused when malformed, locked while in use, resumed from bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import TESTS, processes
from helpers.full_disk import largest_file
from helpers.training import Interrupt
from torch import Tensor

import pathnet
from pathnet import data, models
from pathnet.files import locked
from pathnet.models import ResidualNet
from pathnet.models.weights import read_tensors
from pathnet.training import Recipe, train
from pathnet.training.engines import Engine

RECIPE = Recipe(epochs=2, batch_size=8, warmup_steps=2, learning_rate=0.05)
"""Two steps an epoch."""


def images() -> data.Data:
    return data.synthetic(images=16, shape=(1, 8, 8))


def fresh() -> ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 1, in_channels=1)


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def stop(done: int, steps: int, note: str) -> None:
        if done == step:
            raise Interrupt

    return stop


def interrupted(file: Path, engine: Engine = "auto") -> Path:
    """Write the checkpoint of a training that is interrupted in its second epoch."""
    with pytest.raises(Interrupt):
        train(fresh(), images(), RECIPE, file, stop_at(3), engine=engine)
    assert read_tensors(file)[1]["progress"]["step"] == 3
    return file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return interrupted(tmp_path / "net.checkpoint.safetensors")


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change a checkpoint, and write it in the format from before there were digests."""
    tensors, metadata = read_tensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    del metadata["engines"], metadata["start"]
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, file, {name: json.dumps(value) for name, value in metadata.items()})


def refused(file: Path) -> str:
    before = file.read_bytes()
    net = fresh()
    weights = models.fingerprint(net)
    with pytest.raises(ValueError) as failure:
        train(net, images(), RECIPE, file)
    assert str(file) in str(failure.value) and "\n" not in str(failure.value)
    assert file.read_bytes() == before and models.fingerprint(net) == weights
    return str(failure.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 10**9}, "progress: step: expected an integer from 0 to 4, got 1000000000"),
        ({"step": -1}, "progress: step: expected an integer from 0 to 4, got -1"),
        ({"step": 1.0}, "progress: step: expected an integer from 0 to 4, got 1.0"),
        ({"step": None}, "progress: step: expected an integer from 0 to 4, got None"),
        ({"step": 1}, "progress: history, how many epochs: expected an integer from 0 to 0, got 1"),
        ({"history": []}, "progress: history, how many epochs: expected an integer from 1 to 1, got 0"),
        ({"history": {}}, "progress: history: expected a list of epochs, got {}"),
        ({"history": [3]}, "progress: history: expected epochs of epoch, seconds, test_accuracy, train_loss, got 3"),
        ({"history": [{"epoch": 0}]}, "progress: history: expected epochs of"),
        ({"loss_sum": "x"}, "progress: loss_sum: expected a finite number of at least 0, got 'x'"),
        ({"loss_sum": math.nan}, "progress: loss_sum: expected a finite number of at least 0, got nan"),
        ({"loss_sum": [1.0]}, "progress: loss_sum: expected a finite number of at least 0, got a list"),
        ({"seconds": -1.0}, "progress: seconds: expected a finite number of at least 0, got -1.0"),
    ],
    ids=str,
)
def test_progress_that_no_training_makes_is_named(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    rewrite(checkpoint, lambda _, metadata: metadata["progress"].update(change))
    assert message in refused(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 1}, "history, epoch: expected an integer from 0 to 0, got 1"),
        ({"train_loss": None}, "history, train_loss: expected a finite number of at least 0, got None"),
        ({"test_accuracy": 1.5}, "history, test_accuracy: expected a finite number from 0 to 1, got 1.5"),
    ],
    ids=str,
)
def test_an_epoch_that_no_training_makes_is_named(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    rewrite(checkpoint, lambda _, metadata: metadata["progress"]["history"][0].update(change))
    assert message in refused(checkpoint)


@pytest.mark.parametrize("part", ["progress", "recipe", "config", "data"])
@pytest.mark.parametrize("value", [None, [], "x", 3], ids=repr)
def test_metadata_of_another_kind_are_told_in_one_line(checkpoint: Path, part: str, value: Any) -> None:
    rewrite(checkpoint, lambda _, metadata: metadata.update({part: value}))
    assert refused(checkpoint).startswith("checkpoint: ")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stem.weight", lambda t: t > 0, "expected torch.float32, got torch.bool"),
        ("stem.weight", lambda t: t.to(torch.complex64), "expected torch.float32, got torch.complex64"),
        ("head.bn.running_var", lambda t: -1 - t, "expected values of at least 0, got -"),
        ("head.bn.running_mean", lambda t: t / 0, "expected finite values, got NaN or infinity"),
        ("momentum/stem.weight", lambda t: t.long(), "expected torch.float32, got torch.int64"),
        ("momentum/stem.weight", lambda t: t * math.nan, "expected finite values, got NaN or infinity"),
        ("momentum/stem.weight", lambda t: t.flatten(), "expected shape"),
    ],
)
def test_tensors_that_no_training_makes_are_named(checkpoint: Path, name: str, change: Any, message: str) -> None:
    rewrite(checkpoint, lambda tensors, _: tensors.update({name: change(tensors[name])}))
    refusal = refused(checkpoint)
    assert repr(name) in refusal and message in refusal


def test_a_checkpoint_from_before_there_were_digests_and_engines_goes_on(tmp_path: Path) -> None:
    straight, resumed = fresh(), models.preact_resnet(8, 1, in_channels=1)
    train(straight, images(), RECIPE, engine="none")
    checkpoint = interrupted(tmp_path / "net.checkpoint.safetensors", "none")
    rewrite(checkpoint, lambda *_: None)
    assert b"sha256" not in checkpoint.read_bytes()
    train(resumed, images(), RECIPE, checkpoint)
    assert models.fingerprint(resumed) == models.fingerprint(straight)


def test_a_checkpoint_from_before_there_were_schedules_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight, resumed = fresh(), models.preact_resnet(8, 1, in_channels=1)
    train(straight, images(), RECIPE, engine="none")
    checkpoint = interrupted(tmp_path / "net.checkpoint.safetensors", "none")

    def forget(_: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        for setting in ("schedule", "flips", "label_smoothing"):
            del metadata["recipe"][setting]

    rewrite(checkpoint, forget)
    for change in ({"schedule": "one-cycle"}, {"flips": "alternating"}, {"label_smoothing": 0.1}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=rf"is of another recipe \({name}: expected {value!r}, got "):
            train(fresh(), images(), dataclasses.replace(RECIPE, **change), checkpoint)
    train(resumed, images(), RECIPE, checkpoint)
    assert models.fingerprint(resumed) == models.fingerprint(straight)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_shorter_recipe_that_is_interrupted_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    """Schedule and flips follow from the step alone, also in the second epoch."""
    recipe = dataclasses.replace(RECIPE, schedule="one-cycle", flips="alternating", label_smoothing=0.2)
    straight, resumed, file = fresh(), models.preact_resnet(8, 1, in_channels=1), tmp_path / "net.safetensors"
    train(straight, images(), recipe)
    with pytest.raises(Interrupt):
        train(fresh(), images(), recipe, file, stop_at(stop))
    train(resumed, images(), recipe, file)
    assert models.fingerprint(resumed) == models.fingerprint(straight)


def test_a_full_disk_is_told_and_the_checkpoint_of_before_stays(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with largest_file(100), pytest.raises(OSError) as failure:
        train(fresh(), images(), RECIPE, checkpoint)
    assert str(failure.value) == (
        f"checkpoint: {checkpoint} cannot be written (File too large); {checkpoint} stays as it was before, and the "
        "same training resumes from it"
    )
    assert checkpoint.read_bytes() == before and list(checkpoint.parent.iterdir()) == [checkpoint]
    straight, resumed = fresh(), fresh()
    train(straight, images(), RECIPE)
    train(resumed, images(), RECIPE, checkpoint)
    assert models.fingerprint(resumed) == models.fingerprint(straight)
    message = r"^checkpoint: .*new cannot be written \(File too large\); all steps taken are lost$"
    with largest_file(100), pytest.raises(OSError, match=message):
        train(fresh(), images(), RECIPE, checkpoint.with_name("new"))


def test_a_weight_that_is_not_finite_does_not_replace_a_checkpoint(checkpoint: Path) -> None:
    def spoil(step: int, net: ResidualNet) -> None:
        if step == 4:
            next(net.parameters()).data.fill_(math.inf)

    message = r"^recipe: 'stem.weight' at step 4: expected finite values, got NaN or infinity.*stays as it was"
    with pytest.raises(ValueError, match=message):
        train(fresh(), images(), RECIPE, checkpoint, callback=spoil)
    # The end of the epoch wrote the checkpoint before the weights were spoilt.
    tensors, metadata = read_tensors(checkpoint)
    assert metadata["progress"]["step"] == 4 and all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_checkpoint_is_of_one_training_at_a_time(checkpoint: Path) -> None:
    refusals = []

    def another(done: int, steps: int, note: str) -> None:
        with pytest.raises(ValueError) as failure:
            train(fresh(), images(), RECIPE, checkpoint)
        refusals.append(str(failure.value))

    train(fresh(), images(), RECIPE, checkpoint, another)
    assert refusals == [f"checkpoint: another process is training on {checkpoint}"]
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_the_training_that_is_refused_disturbs_no_other(tmp_path: Path) -> None:
    """One of two simultaneous processes is refused; the other ends with the weights of a lone training."""
    file = tmp_path / "net.checkpoint.safetensors"
    script = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(TESTS), str(Path(pathnet.__file__).parent.parent)]!r}
import pathlib
from test_checkpoints import RECIPE, fresh, images
from pathnet.training import train
def slowly(*_):
    print("step", flush=True)
    sys.stdin.readline()
train(fresh(), images(), RECIPE, pathlib.Path({str(file)!r}), slowly)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "step\n"
        with pytest.raises(ValueError, match=f"^checkpoint: another process is training on {file}$"):
            train(fresh(), images(), RECIPE, file)
        first.communicate("\n" * 10, timeout=120)
    assert first.returncode == 0
    alone = fresh()
    train(alone, images(), RECIPE)
    assert models.fingerprint(models.load(file)) == models.fingerprint(alone)


def one_of_two(rank: int, out: Path) -> None:
    """Train together with another process, while a third holds the checkpoint."""
    with processes.together(rank, out):
        try:
            train(fresh(), images(), RECIPE, out / "net")
        except ValueError as error:
            (out / f"words-{rank}").write_text(str(error))


def test_processes_that_train_together_are_refused_together(tmp_path: Path) -> None:
    """All are refused; the others would otherwise wait for the one that was."""
    with locked(tmp_path / ".net.pathnet-lock", "checkpoint", "training"):
        processes.run(one_of_two, tmp_path)
    words = [(tmp_path / f"words-{rank}").read_text() for rank in range(2)]
    assert words == [
        f"checkpoint: another process is training on {tmp_path / 'net'}",
        f"checkpoint: the first process was refused {tmp_path / 'net'}",
    ]


def test_what_a_killed_training_left_unfinished_is_removed(checkpoint: Path) -> None:
    leftover = checkpoint.with_name(f".{checkpoint.name}.0123456789ab.pathnet-temporary")
    stranger = checkpoint.with_name(".other.safetensors.0123456789ab.pathnet-temporary")
    for file in (leftover, stranger):
        file.write_bytes(b"half")
    train(fresh(), images(), RECIPE, checkpoint)
    assert not leftover.exists() and stranger.exists()
