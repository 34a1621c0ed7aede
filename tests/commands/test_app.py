"""The demo, the doctor, devices and flags."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import typer
from helpers import ROOT
from helpers.command_line import pathnet_

import pathnet
from pathnet import training
from pathnet.commands.app import app
from pathnet.commands.shared import device_of
from pathnet.experiments.plans import PathGradients
from pathnet.study import PRESETS

DEMO = PRESETS["digits"]


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        assert device_of("auto").type == ("cuda" if usable else "cpu") and device_of("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"device: expected auto, cpu \(torch can use no GPU here\), got 'cuda'"):
        device_of("cuda")


def test_the_demo_trains_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(DEMO.recipe, epochs=1, batch_size=700)
    plan = dataclasses.replace(DEMO.plan, batches=2)
    monkeypatch.setitem(PRESETS, "digits", dataclasses.replace(DEMO, width=2, recipe=recipe, plan=plan))
    ended = pathnet_("demo", "--out", tmp_path / "demo", "--json")
    facts = json.loads(ended.out)
    assert ended.status == 0 and facts["measurements"] == 36 and 0 <= facts["test_accuracy"] <= 1
    assert all(Path(file).exists() for file in facts["written"])
    shown = pathnet_("demo", "--out", tmp_path / "demo")
    assert shown.status == 0 and re.search(r"\ntest accuracy \d+\.\d\d %\n", shown.out)
    (figure,) = (file for file in facts["written"] if file.endswith("figure-6.png"))
    assert shown.out.endswith(f"\nnext: open {figure}\n") and "product is" in shown.out


def test_gradients_measures_the_network_of_a_demo_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(DEMO.recipe, epochs=1, batch_size=700)
    plan = dataclasses.replace(DEMO.plan, batches=2)
    monkeypatch.setitem(PRESETS, "digits", dataclasses.replace(DEMO, recipe=recipe, plan=plan))
    assert pathnet_("demo", "--out", tmp_path / "demo", "--json").status == 0
    weights = ["--data", "digits", "--weights", tmp_path / "demo" / "weights.safetensors"]
    assert pathnet_("gradients", *weights, "--out", tmp_path / "again", "--batches", 2, "--json").status == 0
    files = [tmp_path / run / "measurements" / "part-000000.parquet" for run in ("demo", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_demo_is_what_it_promises() -> None:
    blocks = (DEMO.depth - 2) // 2
    assert blocks >= 18 and blocks * DEMO.plan.batches >= 500


def test_no_command_shows_the_help_alone() -> None:
    ended = pathnet_()
    assert ended.status == 2 and "Experiments of the paper" in ended.out and ended.err == ""


def test_doctor_tells_what_there_is() -> None:
    ended = pathnet_("doctor")
    assert ended.status == 0
    for word in (torch.__version__, "native library", "engine reference", "usable"):
        assert word in ended.out
    facts = json.loads(pathnet_("doctor", "--json").out)
    assert facts["pathnet"] == pathnet.__version__
    if pathnet.native.LOADED:
        assert facts["runs on torch"] == "2.11 and later" and facts["built with torch"].startswith("2.")
        assert ("built without CUDA" in facts) != ("CUDA architectures" in facts)


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


# Help

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_leaves_room_for_text_on_a_terminal_of_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = pathnet_(name, "--help").out
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= 80
    panels: defaultdict[str | None, list[list[str]]] = defaultdict(list)
    for option in COMMANDS[name].params:
        if option.opts[0].startswith("--") and not option.hidden:
            assert option.help
            words = [*option.opts, *(option.secondary_opts or [""]), option.metavar]
            panels[option.rich_help_panel].append(words)
    for rows in panels.values():
        assert sum(max(map(len, column)) for column in zip(*rows, strict=True)) <= 34


def test_help_imports_nothing_that_draws_reads_or_runs() -> None:
    script = "import sys; import pathnet.commands.app; print(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).split())
    slow = {"matplotlib", "pyarrow", "sklearn", "scipy.stats", "PIL", "torch._dynamo"}
    assert not modules & (slow | {"pathnet.engines", "pathnet.results", "pathnet.figures", "pathnet.tape"})
