"""Settings of the paper's experiments: flags, presets, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TINY, pathnet_

from pathnet import lesion
from pathnet.commands import experiments
from pathnet.commands.app import app
from pathnet.commands.studies import StudySettings
from pathnet.experiments.run import Plan
from pathnet.paper import EXPERIMENTS
from pathnet.study import PRESETS, Study
from pathnet.training import Recipe


def test_every_setting_is_a_flag_and_nothing_changes_unless_given() -> None:
    names = {field.name for kind in (Study, Recipe, Plan) for field in dataclasses.fields(kind)}
    wanted = names - {"recipe", "plan"} | {"preset", "out", "device", "as_json"}
    for command in app.registered_commands:
        assert command.callback is not None
        flags = command.callback.__signature__.parameters if hasattr(command.callback, "__signature__") else {}
        if command.name in EXPERIMENTS:
            assert set(flags) == wanted | {"weights", "folder"}
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
            ["--schedule", "one-cycle", "--flips", "alternating", "--label-smoothing", "0.1"],
            {"schedule": "one-cycle", "flips": "alternating", "label_smoothing": 0.1},
        ),
        (
            ["--modules", "5", "--bn", "recalibrated", "--images", "7"],
            {"modules": 5, "bn": "recalibrated", "images": 7},
        ),
    ],
    ids=["nothing", "a preset", "study", "recipe", "shorter recipe", "plan"],
)
def test_flags_change_the_preset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], change: dict[str, Any]
) -> None:
    seen: list[Study] = []

    def noted(settings: StudySettings, _: object) -> None:
        seen.append(settings.study)
        raise ValueError("seen")

    monkeypatch.setattr(experiments, "study_on", noted)
    assert pathnet_("lesion-many", *flags).err == "pathnet: seen\n"
    base = PRESETS["cifar10" if "cifar10" in flags else "digits"]
    parts = {}
    for name, part in (("study", base), ("recipe", base.recipe), ("plan", base.plan)):
        fields = {field.name for field in dataclasses.fields(part)}
        parts[name] = dataclasses.replace(part, **{key: value for key, value in change.items() if key in fields})
    parts["recipe"] = dataclasses.replace(parts["recipe"], modules=0)
    assert seen == [dataclasses.replace(parts["study"], recipe=parts["recipe"], plan=parts["plan"])]


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
        (["lesion-many", "--weights", "/nowhere"], "weights: /nowhere does not exist"),
        (["lesion-many", "--draws", "0"], "draws: expected an integer of at least 1, got 0"),
        (["lesion-many", "--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["lesion-many", "--depth", "15"], "depth: basic blocks need a depth of 6n + 2"),
        (
            ["lesion-many", "--preset", "cifar10"],
            "data: expected digits, synthetic or an existing folder, got 'cifar10'",
        ),
        (
            ["lesion-many", "--label-smoothing", "2"],
            "label_smoothing: expected a finite number from 0 to 1, got 2.0",
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
    ended = pathnet_(*arguments, "--out", tmp_path / "study")
    assert ended.status == 1 and ended.out == ""
    line = ended.err.splitlines()[-1]
    assert line.startswith("pathnet: ") and words.replace("W", str(residual)) in line, line
    assert not (tmp_path / "study" / arguments[0]).exists()


def test_an_interrupt_says_what_is_kept_and_the_run_goes_on(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--weights", residual, "--out", tmp_path, "--draws", 2, "--deletions", 1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lesion, "errors", interrupt)
        ended = pathnet_("lesion-many", *flags)
    assert ended.status == 130 and ended.out == ""
    kept = f"what was trained and measured is kept in {tmp_path}"
    assert ended.err == f"pathnet: interrupted; {kept}; the same command resumes from there\n"
    unfinished = pathnet_("figures", tmp_path / "lesion-many")
    assert unfinished.status == 1
    assert unfinished.err == f"pathnet: run: {tmp_path / 'lesion-many'} is not complete; start its command again\n"
    assert pathnet_("lesion-many", *flags).status == 0 == pathnet_("figures", tmp_path / "lesion-many").status
