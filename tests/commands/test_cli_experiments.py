"""The commands of the paper's experiments, on networks of a few steps of training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import shaken
from helpers.command_line import Ended, pathnet_
from PIL import Image

from pathnet import data, lesion, models, results
from pathnet.commands import experiments
from pathnet.commands.app import app
from pathnet.commands.studies import OnStudy
from pathnet.experiments import remaining_paths
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Plan
from pathnet.figures import style
from pathnet.paper import EXPERIMENTS
from pathnet.study import PRESETS, Study
from pathnet.training import Recipe

STUDY = {"seeds": 1, "depth": 14, "width": 2, "vgg-depth": 6, "vgg-width": 2, "vgg-stages": 2, "highway-depth": 8}
RECIPE = {"epochs": 1, "batch-size": 400, "warmup-steps": 1, "lr": 0.01, "seed": 3}
PLAN = {"draws": 1, "deletions": 2, "swaps": 2, "batches": 1, "exact-batches": 1, "modules": 2, "images": 50}
PLAN |= {"gate-batches": 1, "gate-batch-size": 16, "plan-seed": 7}
TINY = [word for name, value in {**STUDY, **RECIPE, **PLAN}.items() for word in (f"--{name}", value)]

FIGURES = {
    "unraveled": ["figure-1", "figure-2"],
    "lesion-single": ["figure-3"],
    "lesion-many": ["figure-5a"],
    "lesion-reorder": ["figure-5b"],
    "path-gradients": ["figure-6", "exact-sums"],
    "effective-training": ["effective-training"],
    "remaining-paths": ["figure-7"],
    "lesion-stochastic-depth": ["figure-8"],
    "highway": ["highway"],
}


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remaining_paths, "DRAWS", 20)
        patch.setattr(style, "DOTS_PER_INCH", 30)
        yield


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A study's folder, and what the command that made it printed."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    ended = pathnet_("figures", "--all", "--folder", folder, *TINY)
    assert ended.status == 0, ended.err
    return folder, ended


def written(folder: Path, name: str) -> list[str]:
    return [str(folder / name / "figures" / f"{stem}.{end}") for stem in FIGURES[name] for end in ("png", "svg")]


# All of the paper


def test_figures_all_trains_measures_and_writes_the_report(studied: tuple[Path, Ended]) -> None:
    folder, ended = studied
    lines = ended.out.splitlines()
    assert lines[-2:] == [str(folder), str(folder / "report.html")]
    said = [claim for name in EXPERIMENTS for claim in results.read(folder / name).facts["results"]["claims"]]
    assert lines[-3] == f"{sum(claim['held'] for claim in said)} of {len(said)} claims held"
    page = (folder / "report.html").read_text()
    assert "<h1>All of the paper on digits</h1>" in page and page.count("<img ") == 11
    for name in EXPERIMENTS:
        assert (
            all(Path(file).is_file() for file in written(folder, name)) and f'<h2 id="{name}-{name}">{name}:' in page
        )
    kinds = ("residual", "stochastic-depth", "effective", "vgg", "highway")
    assert {file.name for file in (folder / "networks").iterdir()} == {f"{kind}-0.safetensors" for kind in kinds}
    assert "training effective 1/1: 3/3" in ended.err and "lesion-many: " in ended.err


def test_figures_all_again_measures_nothing_and_says_the_same(studied: tuple[Path, Ended]) -> None:
    folder, ended = studied
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}
    again = pathnet_("figures", "--all", "--folder", folder, *TINY, "--json")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")} == before
    assert "training" not in again.err and "lesion" not in again.err
    facts = json.loads(again.out)
    assert facts["written"] == [str(folder / "report.html")]
    assert f"{sum(claim['held'] for claim in facts['claims'])} of {len(facts['claims'])} claims held" in ended.out


def test_what_was_given_is_in_the_runs(studied: tuple[Path, Ended]) -> None:
    folder, _ = studied
    many, gates = results.read(folder / "lesion-many"), results.read(folder / "highway")
    assert {name: many.identity[name] for name in ("images", "bn", "plan_seed")} == {
        "images": 50,
        "bn": "running",
        "plan_seed": 7,
    }
    assert (many.facts["draws"], many.facts["deletions"]) == (1, 2)
    assert (gates.facts["gate_batches"], gates.identity["batch_size"]) == (1, 16)
    assert results.read(folder / "lesion-reorder").facts["swaps"] == 2
    assert results.read(folder / "path-gradients").facts["batches"] == 1
    assert results.read(folder / "path-gradients").identity["seed"] == 7
    effective = results.read(folder / "effective-training")
    recipes = effective.facts["results"]["recipes"]
    expected = dataclasses.asdict(
        dataclasses.replace(
            PRESETS["digits"].recipe, epochs=1, batch_size=400, warmup_steps=1, learning_rate=0.01, seed=3
        )
    )
    assert recipes == {"residual": expected, "effective": {**expected, "modules": 2}}
    (net,) = effective.identity["networks"]["effective"]
    assert (net["config"]["depth"], net["config"]["width"], net["blocks"]) == (14, 2, 6)


# One experiment at a time


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_prints_its_claims_and_what_it_wrote(studied: tuple[Path, Ended], name: str) -> None:
    folder, _ = studied
    for file in (folder / name / "figures").iterdir():
        file.unlink()
    ended = pathnet_(name, "--folder", folder, *TINY)
    assert ended.status == 0 and name not in ended.err, "all of it is there"
    lines = ended.out.splitlines()
    assert lines[-1 - len(written(folder, name)) :] == [str(folder / name), *written(folder, name)]
    assert all(Path(file).is_file() for file in written(folder, name))
    run = results.read(folder / name)
    words = " ".join(ended.out.split())
    claims = run.facts["results"]["claims"]
    assert claims and words.count("held ") + words.count("did not hold") >= len(claims)
    assert all(claim["measured"].split()[0] in words and f"{claim['paper'].split()[0]} " in words for claim in claims)
    facts = json.loads(pathnet_("figures", folder / name, "--json").out)
    assert facts["written"] == written(folder, name)
    assert facts["run"] == str(folder / name) and facts["claims"] == claims


def test_an_experiment_trains_what_it_needs_on_any_data(tmp_path: Path) -> None:
    flags = ["--data", "synthetic", "--depth", 14, "--width", 1, "--seeds", 2, "--epochs", 1, "--batch-size", 256]
    small = ["--draws", 1, "--deletions", 1, "--images", 8, "--bn", "batch"]
    ended = pathnet_("lesion-many", "--folder", tmp_path, *flags, *small)
    assert ended.status == 0 and "training residual 2/2: 2/2" in ended.err
    assert {file.name for file in tmp_path.iterdir()} == {"networks", "lesion-many"}
    assert ended.out.splitlines()[0] == "synthetic; residual, depth 14, width 1, 6 blocks, 2 seeds"
    assert results.read(tmp_path / "lesion-many").identity["bn"] == "batch"
    assert pathnet_("figures", tmp_path / "lesion-many").out == ended.out
    (line,) = pathnet_("path-gradients", "--folder", tmp_path, *flags, "--batches", 1, "--json").out.splitlines()
    facts = json.loads(line)
    assert [own["n"] for own in facts["runs"]] == [6, 6] and len(facts["written"]) == 8
    assert [own["run"] for own in facts["runs"]] == [
        str(tmp_path / own) for own in ("path-gradients", "path-gradients/seed-1")
    ]


def test_folders_are_named_by_the_preset_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pathnet_("remaining-paths").out.splitlines()[-3:] == [
        "runs/digits/remaining-paths",
        "runs/digits/remaining-paths/figures/figure-7.png",
        "runs/digits/remaining-paths/figures/figure-7.svg",
    ]


# Figure 4: ImageNet's form, from a tree of class folders


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for split, images in (("train", 4), ("val", 5)):
        for kind in ("cat", "dog", "owl"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")
    return folder


@pytest.mark.parametrize(("depth", "blocks", "changing"), [(50, 16, [0, 3, 7, 13]), (200, 66, [0, 3, 27, 63])])
def test_figure_4_is_drawn_from_a_tree_of_class_folders(
    tree: Path, tmp_path: Path, depth: int, blocks: int, changing: list[int]
) -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet_imagenet(depth, 3, 1)).eval()
    models.save(net, tmp_path / "net=1.safetensors")
    flags = ["--data", tree, "--weights", tmp_path / "net=1.safetensors", "--folder", tmp_path / "study"]
    ended = pathnet_("lesion-single", *flags)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[0] == f"pictures; residual, depth {depth}, width 1, {blocks} blocks"
    run = results.read(tmp_path / "study" / "lesion-single")
    rows = run.rows(ErrorCount)
    assert run.identity["networks"]["residual"][0]["downsampling"] == changing
    assert [row.deleted for row in rows] == [(), *((i,) for i in range(blocks))]
    images = data.load(str(tree))
    batch, labels = next(images.test_batches(15))
    with torch.no_grad():
        for row in (rows[0], rows[1], rows[5], rows[-1]):
            answers = lesion.delete(net, row.deleted)(batch).argmax(1)
            assert row.wrong == int((answers != labels).sum()) and row.images == 15
    assert "recipes" not in run.facts["results"] and "matters more" in ended.out
    assert not (tmp_path / "study" / "networks").exists()


# Flags


def test_every_setting_is_a_flag_and_nothing_changes_unless_given() -> None:
    names = {field.name for kind in (Study, Recipe, Plan) for field in dataclasses.fields(kind)}
    wanted = names - {"recipe", "plan"} | {"preset", "folder", "device", "as_json"}
    for command in app.registered_commands:
        assert command.callback is not None
        flags = command.callback.__signature__.parameters if hasattr(command.callback, "__signature__") else {}
        if command.name in EXPERIMENTS:
            assert set(flags) == wanted | {"weights"}
            assert all(flags[name].default is None for name in names - {"recipe", "plan"})
            assert flags["preset"].default == "digits"
    assert {command.name for command in app.registered_commands} > set(EXPERIMENTS)
    help_ = " ".join(pathnet_("lesion-many", "--help").out.split())
    assert "Delete several random blocks at once. (section 4.2, Figure 5 (a))" in help_


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        ([], {}),
        (["--preset", "cifar10", "--depth", "20"], {"depth": 20}),
        (
            ["--seeds", "2", "--survival", "0.8", "--gate-bias", "-3"],
            {"seeds": 2, "survival": 0.8, "gate_bias": -3.0},
        ),
        (
            ["--no-augment", "--undrawn", "zero", "--momentum", "0.5"],
            {"augment": False, "undrawn": "zero", "momentum": 0.5},
        ),
        (
            ["--modules", "5", "--bn", "recalibrated", "--images", "7"],
            {"modules": 5, "bn": "recalibrated", "images": 7},
        ),
    ],
    ids=["nothing", "a preset", "study", "recipe", "plan"],
)
def test_flags_change_the_preset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], change: dict[str, Any]
) -> None:
    seen: list[Study] = []

    def noted(settings: OnStudy) -> None:
        seen.append(settings.study)
        raise ValueError("seen")

    monkeypatch.setattr(experiments, "study_on", noted)
    assert pathnet_("lesion-many", *flags).err == "pathnet: seen\n"
    base = PRESETS["cifar10" if "cifar10" in flags else "digits"]
    parts = {}
    for name, own in (("study", base), ("recipe", base.recipe), ("plan", base.plan)):
        mine = {field.name for field in dataclasses.fields(own)}
        parts[name] = dataclasses.replace(own, **{key: value for key, value in change.items() if key in mine})
    parts["recipe"] = dataclasses.replace(parts["recipe"], modules=0)
    assert seen == [dataclasses.replace(parts["study"], recipe=parts["recipe"], plan=parts["plan"])]


# What goes wrong is told in one line


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "residual.safetensors"
    models.save(models.preact_resnet(14, 2, in_channels=1), file)
    return file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["lesion-many", "--weights", "abacus=W"],
            "weights: expected networks among residual, got abacus in abacus=W",
        ),
        (["highway", "--weights", "W"], "weights: expected networks among highway, got residual in W"),
        (["unraveled", "--weights", "W"], "weights: expected no networks, got residual in W"),
        (
            ["effective-training", "--weights", "W"],
            "networks: effective-training takes residual and effective, got residual",
        ),
        (
            ["lesion-many", "--weights", "W", "--images", "361"],
            "images: expected 0 (all) to 360 (the test images), got 361",
        ),
        (["lesion-many", "--weights", "W", "--data", "synthetic"], "data: expected images of 1 channels"),
        (["lesion-reorder", "--weights", "W", "--data", "synthetic"], "data: expected images of 1 channels"),
        (["lesion-many", "--weights", "/nowhere"], "weights: /nowhere is not a readable safetensors file"),
        (["lesion-many", "--draws", "0"], "draws: expected an integer of at least 1, got 0"),
        (["lesion-many", "--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["lesion-many", "--depth", "15"], "depth: basic blocks need a depth of 6n + 2"),
        (
            ["lesion-many", "--preset", "cifar10"],
            "data: expected digits, synthetic or an existing folder, got 'cifar10'",
        ),
        (["lesion-many", "--device", "abacus"], "device: expected auto, cpu"),
        (
            ["effective-training", *TINY[:6], "--modules", "7", "--epochs", "1", "--batch-size", "400"],
            "modules: expected at most 6",
        ),
    ],
    ids=lambda value: " ".join(map(str, value))[:50] if isinstance(value, list) else "",
)
def test_bad_input_is_named_and_leaves_no_run(
    residual: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    arguments = [str(word).replace("W", str(residual)) if "W" in str(word) else word for word in arguments]
    ended = pathnet_(*arguments, "--folder", tmp_path / "study")
    assert ended.status == 1 and ended.out == ""
    line = ended.err.splitlines()[-1]
    assert line.startswith("pathnet: ") and words.replace("W", str(residual)) in line, line
    assert not (tmp_path / "study" / arguments[0]).exists()


@pytest.mark.parametrize("both", [False, True])
def test_figures_takes_a_run_or_all(studied: tuple[Path, Ended], both: bool) -> None:
    ended = pathnet_("figures", *([studied[0] / "unraveled", "--all"] if both else []))
    assert ended.status == 2 and ended.out == ""
    assert "expected a run's folder, or --all, and not both" in " ".join(ended.err.replace("│", "").split())


def test_a_study_of_other_networks_is_not_mixed_up(studied: tuple[Path, Ended], residual: Path) -> None:
    folder, _ = studied
    ended = pathnet_("lesion-many", "--folder", folder, *TINY, "--epochs", 2)
    assert ended.status == 1 and "residual-0.safetensors is of another recipe" in ended.err.splitlines()[-1]
    ended = pathnet_("lesion-many", "--folder", folder, *TINY, "--weights", residual)
    assert ended.status == 1 and "holds another run (networks.residual: expected" in ended.err.splitlines()[-1]


def test_an_interrupt_says_what_is_kept_and_the_run_goes_on(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--weights", residual, "--folder", tmp_path, "--draws", 2, "--deletions", 1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lesion, "errors", interrupt)
        ended = pathnet_("lesion-many", *flags)
    assert ended.status == 130 and ended.out == ""
    kept = f"what was trained and measured is kept in {tmp_path}"
    assert ended.err == f"pathnet: interrupted; {kept}; the same command goes on from there\n"
    unfinished = pathnet_("figures", tmp_path / "lesion-many")
    assert unfinished.status == 1
    assert unfinished.err == f"pathnet: run: {tmp_path / 'lesion-many'} is not complete; start its command again\n"
    assert pathnet_("lesion-many", *flags).status == 0 == pathnet_("figures", tmp_path / "lesion-many").status
