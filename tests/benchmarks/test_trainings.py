"""Trainings, effective depth and times in results files of the paper, and their tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_folders import measured
from helpers.runs import ATTEMPT, one_of_each

import pathnet
from benchmarks import paper, results
from benchmarks import trainings as recorded
from benchmarks.tables import runs as runs_tables
from benchmarks.tables import trainings as tables
from pathnet import effective_depth, models, native
from pathnet.data import Data, synthetic
from pathnet.effective_depth import Depth
from pathnet.effective_depth.rows import HEADER
from pathnet.progress import reporter
from pathnet.results import writing
from pathnet.study import PRESETS, trained
from pathnet.training import Epoch, Recipe, train

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

RECIPE = Recipe(epochs=3, batch_size=16, schedule="one-cycle", warmup_steps=2, label_smoothing=0.1, weight_decay=5e-4)
STEPS = 4
"""Steps an epoch of `RECIPE` on `images`."""


def images(seed: int = 0) -> Data:
    return synthetic(images=16 * STEPS, shape=(3, 8, 8), seed=seed)


def tiny_net() -> models.ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(depth=8, width=4)


@dataclass(frozen=True)
class Files:
    """The files and results of a training of `tiny_net`."""

    checkpoint: Path
    depths: Path
    net: models.ResidualNet
    history: list[Epoch]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, data, net = tmp_path_factory.mktemp("training"), images(), tiny_net()
    checkpoint, depths = folder / "tiny.checkpoint.safetensors", folder / "tiny.csv"
    measure = pathnet.EffectiveDepth(data.random_batch(8, 0, 0), depths, every=3, share=math.inf)
    history = train(net, data, RECIPE, checkpoint, callback=measure, engine="none")
    return Files(checkpoint, depths, net, history)


def test_a_training_is_what_its_checkpoint_says(files: Files) -> None:
    (entry,) = recorded.trainings([files.checkpoint], {"abc", images().fingerprint()})
    assert entry["name"] == "tiny" and entry["config"] == files.net.config
    assert entry["hash"] == models.fingerprint(files.net)
    assert entry["start"] == models.fingerprint(tiny_net())
    half = files.checkpoint.with_name("stored.safetensors")
    models.save(files.net, half, torch.float16)
    assert entry["stored_as_float16"] == models.fingerprint(models.load(half)) != entry["hash"]
    changed = {"epochs", "batch_size", "schedule", "warmup_steps", "label_smoothing", "weight_decay"}
    assert entry["recipe"] == {name: getattr(RECIPE, name) for name in changed}
    assert entry["engines"] == ["none"] and entry["steps_an_epoch"] == STEPS
    assert [Epoch(number, **epoch) for number, epoch in enumerate(entry["history"])] == files.history
    assert recorded.changed_settings(Recipe()) == {"epochs": 200}


def test_the_networks_of_a_study_are_checkpoints_too(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=16, warmup_steps=0)
    study = replace(PRESETS["digits"], seeds=1, depth=8, width=4, recipe=recipe)
    trained(study, images(), ["stochastic depth"], tmp_path, torch.device("cpu"), reporter)
    (entry,) = recorded.trainings([*(tmp_path / "networks").glob("*.safetensors")], [])
    assert entry["name"] == "stochastic-depth-0" and entry["config"]["survival"] == 0.5
    assert len(entry["history"]) == 1


def test_checkpoints_that_say_nothing_here_are_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^trained: expected a training on the data of the runs, got .*tiny"):
        recorded.trainings([files.checkpoint], {images(seed=1).fingerprint()})
    with pytest.raises(ValueError, match="^trained: expected files of different names, got several named tiny"):
        recorded.trainings([files.checkpoint] * 2, [])
    weights = tmp_path / "net.safetensors"
    models.save(files.net, weights)
    with pytest.raises(ValueError, match="^trained: expected the checkpoint of a training, got .*weights alone"):
        recorded.trainings([weights], [])

    def interrupt(step: int, _: object) -> None:
        if step == 2 * STEPS:
            raise KeyboardInterrupt

    half = tmp_path / "half.checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_net(), images(), RECIPE, half, callback=interrupt, engine="none")
    with pytest.raises(ValueError, match="^trained: expected a training that has ended, got .* 2 of 3 epochs"):
        recorded.trainings([half], [])


def test_depths_are_those_of_the_first_measurement_after_each_epoch(files: Files) -> None:
    measured_at = {row.step: row for row in effective_depth.read(files.depths)}
    assert list(measured_at) == [0, 3, 6, 9, 12]
    (entry,) = recorded.depths([files.depths], recorded.trainings([files.checkpoint], []))
    assert entry["name"] == "tiny"
    assert [(row["step"], row["epoch"]) for row in entry["rows"]] == [(0, 0), (6, 1), (9, 2), (12, 3)]
    for row in entry["rows"]:
        at = measured_at[row["step"]]
        assert (row["depth"], row["first"], row["last"]) == (at.depth, at.first, at.last)


def write_depths(file: Path, steps: list[int]) -> Path:
    rows = [Depth(step, 2.0, 1, 3, 2, 0.5, 0.1) for step in steps]
    lines = [",".join(HEADER), *(",".join(str(getattr(row, name)) for name in HEADER) for row in rows)]
    file.write_text("\n".join([*lines, ""]))
    return file


def test_an_epoch_without_a_measurement_has_no_depth(files: Files, tmp_path: Path) -> None:
    known = recorded.trainings([files.checkpoint], [])
    (entry,) = recorded.depths([write_depths(tmp_path / "tiny.csv", [10, 2])], known)
    assert [(row["step"], row["epoch"]) for row in entry["rows"]] == [(2, 0), (10, 2)]


def test_depths_of_another_training_are_refused(files: Files, tmp_path: Path) -> None:
    known = recorded.trainings([files.checkpoint], [])
    with pytest.raises(ValueError, match=r"^depths: expected a file with the name of a training \(tiny\), got .*big"):
        recorded.depths([write_depths(tmp_path / "big.csv", [0])], known)
    with pytest.raises(ValueError, match=r"^depths: expected .* \(none is here\), got"):
        recorded.depths([files.depths], [])
    with pytest.raises(ValueError, match="^depths: expected steps up to 12 .* got 15"):
        recorded.depths([write_depths(tmp_path / "tiny.csv", [0, 15])], known)


COMMAND = "pathnet figures --all"


def test_a_file_holds_trainings_depths_and_times(files: Files, tmp_path: Path) -> None:
    one_of_each(tmp_path)
    out = tmp_path / "results.json"
    flags = ["--trained", str(files.checkpoint), "--depths", str(files.depths)]
    assert paper.main([str(out), str(tmp_path), "--command", COMMAND, *flags]) == 0
    content = results.read_object(out)
    (training,), (depths,) = content["trainings"], content["depths"]
    assert training["name"] == depths["name"] == "tiny" and len(training["history"]) == 3
    assert training["history"][0]["train_loss"] == pytest.approx(files.history[0].train_loss, rel=1e-5)
    seconds = [entry["seconds"] for entries in content["experiments"].values() for entry in entries]
    assert len(seconds) == 9 and all(0 <= each < 60 for each in seconds)
    table = tables.trainings({"paper/a.json": content})
    assert f"| {100 * files.history[-1].test_accuracy:.3g} % | {files.history[-1].train_loss:.3g} |" in table


def test_a_file_without_trainings_says_so(tmp_path: Path) -> None:
    one_of_each(tmp_path)
    assert paper.main([str(tmp_path / "results.json"), str(tmp_path), "--command", COMMAND]) == 0
    content = results.read_object(tmp_path / "results.json")
    assert content["trainings"] == content["depths"] == []


def test_runs_in_the_papers_mode_come_first(tmp_path: Path) -> None:
    model = {"hash": "abc", "config": None, "blocks": 11}
    facts = {"experiment": "path-gradients", "model": model, "data": {"name": "made up", "hash": "abc"}}
    for name, bn in (("a", "batch"), ("b", "running"), ("c", "recalibrated")):
        with writing(tmp_path / name, {**facts, "bn": bn}, {"batches": 1}, ATTEMPT) as run:
            run.add([measured(0)])
    runs = [pathnet.results.read(tmp_path / name) for name in "abc"]
    entries = paper.gathered(runs, ["pathnet gradients"], "abc")["experiments"]["path-gradients"]
    assert [entry["settings"]["bn"] for entry in entries] == ["running", "batch", "recalibrated"]


def test_the_time_of_a_run_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    model = {"hash": "abc", "config": {"model": "residual"}, "blocks": 11}
    identity = {"experiment": "path-gradients", "model": model, "data": {"name": "made up", "hash": "abc"}}
    file = tmp_path / "run.json"

    def recorded_seconds(*attempts: float | None) -> float | None:
        facts = json.loads(file.read_text())
        facts.pop("sha256", None)  # that of other attempts
        facts["attempts"] = [ATTEMPT if each is None else {**ATTEMPT, "seconds": each} for each in attempts]
        file.write_text(json.dumps(facts))
        content = paper.gathered([pathnet.results.read(tmp_path)], ["pathnet gradients"], "abc")
        (entry,) = content["experiments"]["path-gradients"]
        return entry["seconds"]

    with writing(tmp_path, identity, {"batches": 1}, ATTEMPT) as run:
        run.add([measured(0)])
    assert recorded_seconds(60.5, 30.0) == 90.5
    # One that was killed took some time that nobody knows.
    assert recorded_seconds(60.5, None) is None


def training(name: str, survival: float = 1.0, **recipe: Any) -> dict[str, Any]:
    """Return a training as a file holds it, of two epochs that take an hour each."""
    config = {"model": "preact_resnet", "depth": 110, "width": 16, "num_classes": 10, "in_channels": 3}
    epochs = [{"train_loss": 2.0, "test_accuracy": 0.5, "seconds": 3600.0}]
    epochs.append({"train_loss": 0.1234, "test_accuracy": 0.9125, "seconds": 3600.0})
    config |= {"survival": survival} if survival < 1 else {}
    return {
        "name": name,
        "hash": f"hash of {name}",
        "stored_as_float16": f"half of {name}",
        "start": "new",
        "config": config,
        "recipe": {"epochs": 2, **recipe},
        "steps_an_epoch": 390,
        "history": epochs,
    }


def test_a_training_in_words() -> None:
    one = training(
        "one", schedule="one-cycle", learning_rate=0.4, flips="alternating", label_smoothing=0.2, momentum=0.85
    )
    drawing = [
        training("two", survival=0.5, augment=False, bfloat16=True),
        training("three", modules=23, undrawn="zero", seed=2, momentum=0.8),
    ]
    file = {"data": "CIFAR-10 (JPEG)", "trainings": [one, *drawing]}
    lines = tables.trainings({"paper/a.json": file}).splitlines()
    assert lines[2] == (
        "| CIFAR-10 (JPEG) | `one`: `preact_resnet`, depth 110, width 16 | 2 epochs of batches of 128, learning rate "
        "rising to 0.4, then falling to 0, in one cycle, whose rise takes 390 steps from 0.01, weight decay 0.0001, "
        "augmentation of the data set, flips alternating, label smoothing 0.2, momentum 0.85 | 91.2 % | 0.123 | 2 |"
    )
    assert "no augmentation, stochastic depth, the last module surviving with probability 0.5, bfloat16 |" in lines[3]
    assert (
        "augmentation of the data set, 23 modules drawn for each batch, momentum 0.8, undrawn zero, seed 2 |"
        in lines[4]
    )
    assert (
        "rate 0.1, divided by 10 after half of the steps and again after three quarters, after a warm-up of 400 "
        "steps at 0.01, weight decay" in lines[4]
    )
    at_once = {"data": "digits", "trainings": [training("four", warmup_steps=0)]}
    (*_, line) = tables.trainings({"paper/a.json": at_once}).splitlines()
    assert "warm-up" not in line


def test_trainings_that_differ_only_in_their_seeds_share_a_row() -> None:
    alike = [training(name, modules=23, seed=seed) for seed, name in enumerate(("one", "two", "three"))]
    alike.insert(1, training("other", modules=22))
    alike[2]["history"][-1]["test_accuracy"] = 0.25
    lines = tables.trainings({"paper/a.json": {"data": "digits", "trainings": alike}}).splitlines()
    assert len(lines) == 4 and "`other`" in lines[3]
    assert (
        lines[2].startswith("| digits | `one`, `two` and `three`: `preact_resnet`")
        and "seeds 0, 1 and 2 |" in lines[2]
    )
    assert "| 91.2 %, 25 % and 91.2 % | 0.123, 0.123 and 0.123 | 2, 2 and 2 |" in lines[2]


def test_trainings_say_which_trained_networks_they_began_with() -> None:
    first = [training(name, seed=seed) for seed, name in enumerate(("one", "two"))]
    second = [{**training(f"{name} again", seed=2), "start": f"half of {name}"} for name in ("one", "two")]
    third = {**training("last", momentum=0.8), "start": "hash of one again"}
    files = {
        "paper/a.json": {"data": "digits", "trainings": [*first, second[0]]},
        "paper/b.json": {"data": "digits", "trainings": [second[1], third]},
    }
    lines = [line.split(" | ")[2] for line in tables.trainings(files).splitlines()[2:]]
    assert [line.split(" epochs")[0] for line in lines] == [
        "2",
        "beginning with `one`, stored as float16, 2",
        "beginning with `two`, stored as float16, 2",
        "beginning with `one again`, 2",
    ]


def turned(value: Any) -> Any:
    """Return a value with the keys of all objects in the reverse order."""
    if isinstance(value, Mapping):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(item) for item in value] if isinstance(value, list) else value


def depths_of(name: str, rows: list[tuple[int, float | None]]) -> dict[str, Any]:
    listed = [{"step": 9 * e, "epoch": e, "depth": depth, "first": e, "last": e + 5} for e, depth in rows]
    return {"name": name, "rows": listed}


def test_depths_stand_in_the_row_of_their_epoch() -> None:
    some = [depths_of("one", [(0, 27.04), (1, 20.0), (2, None)]), depths_of("two", [(1, 8.51), (3, 8.0)])]
    lines = tables.depths({"paper/a.json": {"depths": some}}).splitlines()
    assert lines[0] == (
        "| epochs | effective depth, `one` | lengths with 95 % | effective depth, `two` | lengths with 95 % |"
    )
    assert lines[2:] == [
        "| 0 | 27 | 0 to 5 |  |  |",
        "| 1 | 20 | 1 to 6 | 8.51 | 1 to 6 |",
        "| 2 |  |  |  |  |",
        "| 3 |  |  | 8 | 3 to 8 |",
    ]


def test_a_long_training_shows_some_epochs_and_its_ends() -> None:
    rows: list[tuple[int, float | None]] = [(epoch, 9.0) for epoch in range(101)]
    lines = tables.depths({"paper/a.json": {"depths": [depths_of("one", rows)]}}).splitlines()
    shown = [int(line.split("|")[1]) for line in lines[2:]]
    assert shown[0] == 0 and shown[-1] == 100 and len(shown) <= 22 and shown == sorted(set(shown))


def entry(seconds: float | None, network: str = "abc", **settings: Any) -> dict[str, Any]:
    amounts = {"exact_batches": 50, "batches": 1000}
    timed = {} if seconds is None else {"seconds": seconds}
    return {"settings": settings, "amounts": amounts, "networks": {"residual": [network]}, **timed}


def test_times_tell_runs_apart() -> None:
    both = [entry(90.0, bn="running", seed=0), entry(None, bn="batch", seed=0)]
    experiments = {
        "path-gradients": both,
        "lesion-single": [entry(3600.0, bn="running", images=2000), entry(30.0, "xyz", bn="running", images=0)],
    }
    content = {"data": "digits", "experiments": experiments}
    lines = runs_tables.times({"paper/a.json": content}).splitlines()
    amounts = "batches 1,000, exact batches 50"
    assert lines[2:] == [
        f"| digits | lesion-single | network 0, mode `running` | {amounts}, test images 2,000 | 60 |",
        f"| digits | lesion-single | network 1, mode `running` | {amounts}, all test images | 0.5 |",
        f"| digits | path-gradients | mode `running` | {amounts} | 1.5 |",
        f"| digits | path-gradients | mode `batch` | {amounts} | not recorded |",
    ]


def test_the_order_of_keys_does_not_matter() -> None:
    file = {"data": "a", "trainings": [training("one", survival=0.5, modules=3, momentum=0.8, seed=2)]}
    file |= {"depths": [depths_of("one", [(0, 27.0), (1, 20.0)])]}
    runs = [entry(1.0, bn="running", at="y0"), entry(2.0, bn="batch", at="image")]
    file["experiments"] = {"highway": [entry(3.0)], "path-gradients": runs}
    for write in (tables.trainings, tables.depths, runs_tables.times):
        assert write({"paper/a.json": turned(file)}) == write({"paper/a.json": file})
