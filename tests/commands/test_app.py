"""The demo, the doctor, devices and flags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import pathnet_

import pathnet
from pathnet import training
from pathnet.commands.app import app
from pathnet.commands.shared import device_of
from pathnet.experiments.plans import PathGradients
from pathnet.study import PRESETS

DEMO = PRESETS["demo"]


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        assert device_of("auto").type == ("cuda" if usable else "cpu") and device_of("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device: expected auto, cpu, got 'cuda'"):
        device_of("cuda")


def test_the_demo_trains_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(DEMO.recipe, epochs=1, batch_size=700)
    plan = dataclasses.replace(DEMO.plan, batches=2)
    monkeypatch.setitem(PRESETS, "demo", dataclasses.replace(DEMO, width=2, recipe=recipe, plan=plan))
    ended = pathnet_("demo", "--run", tmp_path / "demo", "--json")
    facts = json.loads(ended.out)
    assert ended.status == 0 and facts["measurements"] == 36 and 0 <= facts["test_accuracy"] <= 1
    assert all(Path(file).exists() for file in facts["written"])
    assert pathnet_("demo", "--run", tmp_path / "demo").status == 0


def test_the_demo_is_what_it_promises() -> None:
    blocks = (DEMO.depth - 2) // 2
    assert blocks >= 18 and blocks * DEMO.plan.batches >= 500


def test_doctor_tells_what_there_is() -> None:
    ended = pathnet_("doctor")
    assert ended.status == 0
    for word in (torch.__version__, "native library", "engine reference", "usable"):
        assert word in ended.out
    assert json.loads(pathnet_("doctor", "--json").out)["pathnet"] == pathnet.__version__


def test_doctor_tells_why_there_is_no_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathnet.native, "LOADED", False)
    monkeypatch.setattr(pathnet.native, "WHY_NOT", "it was never built")
    facts = json.loads(pathnet_("doctor", "--json").out)
    assert facts["native library"] == facts["engine cpu"] == "it was never built"


@pytest.mark.parametrize(("command", "kind"), [("train", training.Recipe), ("gradients", PathGradients)])
def test_every_field_of_the_settings_is_a_flag(command: str, kind: type) -> None:
    (callback,) = (
        each.callback for each in app.registered_commands if each.callback and each.callback.__name__ == command
    )
    help_ = pathnet_(command, "--help").out
    assert callback is not None and "Traceback" not in help_
    flags = callback.__signature__.parameters  # type: ignore[attr-defined]
    for field in dataclasses.fields(kind):
        assert flags[field.name].default == field.default
    assert pathnet_("--version").out == f"pathnet {pathnet.__version__}\n"
