from __future__ import annotations

import dataclasses
import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import Ended, pathnet_
from typer.testing import CliRunner

import pathnet
from pathnet import cli, models, results, training
from pathnet.experiments.path_gradients import PathGradients
from pathnet.models.weights import read_tensors

DIGITS_NET = ["--data", "digits", "--depth", "8", "--width", "4"]
QUICK = ["--epochs", "1", "--batch-size", "400", "--warmup-steps", "1"]
FEW = ["--batches", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    models.save(models.preact_resnet(20, 4, in_channels=1), path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--run", folder, *FEW)
    assert ended.status == 0, ended.err
    return folder


# What the commands do


def test_train_writes_weights_that_load_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "net" / "weights.safetensors"
    ended = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK)
    assert ended.status == 0 and ended.out.splitlines()[-1] == str(out)
    assert "test accuracy" in ended.out and "training: 3/3" in ended.err
    assert models.load(out).config == models.preact_resnet(8, 4, in_channels=1).config
    before = models.fingerprint(models.load(out))
    again = pathnet_("train", *DIGITS_NET, "--out", out, *QUICK, "--json")
    assert json.loads(again.out)["epochs"][0]["epoch"] == 0 and models.fingerprint(models.load(out)) == before


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
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert (recipe["modules"], recipe["undrawn"]) == (given.get("--modules", 0), given.get("--undrawn", "none"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--survival", "0"], "survival: expected a finite number above 0 and at most 1, got 0.0"),
        (["--modules", "4"], "modules: expected at most 3 (the network's), got 4"),
        (["--modules", "-1"], "modules: expected an integer of at least 0, got -1"),
        (["--modules", "1", "--survival", "0.5"], "modules: expected 0 for a network with stochastic depth, got 1"),
        (["--model", "vgg", "--survival", "0.5"], "config: vgg() got an unexpected keyword argument 'survival'"),
        (["--model", "vgg", "--depth", "6"], "depth: expected at least 7 layers for 4 stages, got 6"),
        (["--model", "highway", "--block", "basic"], "config: highway() got an unexpected keyword argument 'block'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_names_flags_that_do_not_fit_the_network(tmp_path: Path, flags: list[str], words: str) -> None:
    ended = pathnet_("train", *DIGITS_NET, "--out", tmp_path / "w.safetensors", *QUICK, *flags)
    assert_one_line(ended, words)


def test_processes_of_torchrun_share_out_the_batches_and_the_first_one_tells(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pathnet", "train", *DIGITS_NET, "--out", str(out), *QUICK, "--modules", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(out) and ended.stdout.count("test accuracy") == 2
    assert models.load(out).n == 3


def test_gradients_prints_the_table_and_writes_the_figure(run: Path, weights: Path) -> None:
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--run", run, *FEW)
    assert "path gradients" not in ended.err, "nothing was missing"
    lines = ended.out.splitlines()
    assert "digits; preact_resnet, depth 20, width 4, 9 blocks" in lines[0]
    assert [line.split()[:2] for line in lines[2:11]] == [[str(length), "3"] for length in range(1, 10)]
    assert "27 measurements on 3 batches" in lines[11]
    assert any("effective paths: lengths" in line for line in lines) and any("a module" in line for line in lines)
    for written in lines[-3:]:
        assert Path(written).exists()
    assert lines[-3:] == [str(run), *(str(run / "figures" / f"figure-6.{suffix}") for suffix in ("png", "svg"))]


def test_gradients_finds_the_runs_own_weights_and_goes_on(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(weights.read_bytes())
    for batches in (1, 3):
        ended = pathnet_(
            "gradients", "--data", "digits", "--run", tmp_path, "--batches", batches, "--batch-size", 8, "--json"
        )
        assert json.loads(ended.out)["measurements"] == 9 * batches
    assert "path gradients: 3/3 batches, engine" in ended.err


def test_other_methods_go_into_the_folder_and_the_figure(weights: Path, tmp_path: Path) -> None:
    flags = ["gradients", "--data", "digits", "--weights", weights, "--run", tmp_path, *FEW, "--engine", "reference"]
    for method in ("exact", "sampled", "signed"):
        ended = pathnet_(*flags, "--method", method)
        assert ended.status == 0 and "path gradients: 3/3 batches, engine reference" in ended.err, ended.err
    lines = ended.out.splitlines()
    stems = [f"{name}.{suffix}" for name in ("figure-6", "exact-sums") for suffix in ("png", "svg")]
    assert lines[-5:] == [str(tmp_path), *(str(tmp_path / "figures" / stem) for stem in stems)]
    headings = [line for line in lines if line.startswith("digits; preact_resnet, depth 20, width 4, 9 blocks")]
    assert [heading.rstrip().partition("blocks")[2] for heading in headings] == ["", ": exact", ": signed"]
    told = " ".join(lines)
    assert (
        "exact sums over all 2^9 paths, on 3 batches" in told
        and "3 signed draws on 3 batches, too few for a standard error; not to be" in told
    )
    assert "27 measurements on 3 batches" in told and "at lengths 1 to 9, these measurements do not decide" in told
    facts = json.loads(pathnet_("figures", tmp_path, "--json").out)
    assert facts["measurements"] == 27 and facts["exact"]["batches"] == facts["cost"]["batches"] == 3
    assert len(facts["signed"]["trusted"]) == 10 and len(facts["cancelling"]["mean"]) == 9
    assert [Path(file).name for file in facts["written"]] == stems and len(facts["claims"]) == 3


def test_the_device_is_no_part_of_a_run(run: Path, weights: Path) -> None:
    for device in ("cpu", "auto"):
        flags = ["--data", "digits", "--weights", weights, "--run", run, *FEW, "--device", device]
        assert pathnet_("gradients", *flags).status == 0
    assert "device" not in results.read(run).identity


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        assert cli._device("auto").type == ("cuda" if usable else "cpu") and cli._device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device: expected auto, cpu, got 'cuda'"):
        cli._device("cuda")


def test_figures_draws_again_from_the_folder(run: Path) -> None:
    for file in (run / "figures").iterdir():
        file.unlink()
    ended = pathnet_("figures", run)
    assert ended.status == 0 and (run / "figures" / "figure-6.svg").exists() and "27 measurements" in ended.out
    facts = json.loads(pathnet_("figures", run, "--json").out)
    assert facts["written"] == [str(run / "figures" / f"figure-6.{suffix}") for suffix in ("png", "svg")]
    assert facts["n"] == 9 and len(facts["mean"]) == 9


def test_the_demo_trains_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEMO_WIDTH", 2)
    monkeypatch.setattr(cli, "DEMO_RECIPE", dataclasses.replace(cli.DEMO_RECIPE, epochs=1, batch_size=700))
    monkeypatch.setattr(cli, "DEMO_PLAN", PathGradients(batches=2, batch_size=4))
    ended = pathnet_("demo", "--run", tmp_path / "demo", "--json")
    facts = json.loads(ended.out)
    assert ended.status == 0 and facts["measurements"] == 36 and 0 <= facts["test_accuracy"] <= 1
    assert all(Path(file).exists() for file in facts["written"])
    assert pathnet_("demo", "--run", tmp_path / "demo").status == 0


def test_the_demo_is_what_it_promises() -> None:
    blocks = (cli.DEMO_DEPTH - 2) // 2
    assert blocks >= 18 and blocks * cli.DEMO_PLAN.batches >= 500


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
    (own,) = (own for own in cli.app.registered_commands if own.callback and own.callback.__name__ == command)
    help_ = pathnet_(command, "--help").out
    assert own.callback is not None and "Traceback" not in help_
    flags = own.callback.__signature__.parameters  # type: ignore[attr-defined]
    for field in dataclasses.fields(kind):
        assert flags[field.name].default == field.default
    assert pathnet_("--version").out == f"pathnet {pathnet.__version__}\n"


# What goes wrong is told in one line


def assert_one_line(ended: Ended, *words: object) -> None:
    assert ended.status == 1 and ended.out == ""
    (line,) = (line for line in ended.err.splitlines() if not line.startswith(("path gradients:", "training:")))
    assert line.startswith("pathnet: ") and all(str(word) in line for word in words), line


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
        (["--weights", "/nowhere.safetensors"], ["weights: /nowhere.safetensors is not a readable"]),
        (["--run", "/dev/null/run"], ["/dev/null/run"]),
        (["--engine", "cuda", "--device", "cpu"], ["engine: 'cuda' cannot serve"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_gradients_names_bad_input(weights: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    usual = {"--data": "digits", "--weights": weights, "--run": tmp_path / "run", "--batches": 1, "--batch-size": 8}
    usual |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert_one_line(pathnet_("gradients", *(word for flag in usual.items() for word in flag)), *words)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_none(tmp_path: Path, run: Path) -> None:
    broken = tmp_path / "weights.safetensors"
    for content in (b"", b"not safetensors at all", b"\xff" * 64):
        broken.write_bytes(content)
        ended = pathnet_("gradients", "--data", "digits", "--weights", broken, "--run", tmp_path / "run")
        assert_one_line(ended, broken, "is not a readable safetensors file")


def test_a_run_of_other_weights_is_refused(tmp_path: Path, run: Path) -> None:
    torch.manual_seed(1)
    models.save(models.preact_resnet(20, 4, in_channels=1), tmp_path / "other.safetensors")
    ended = pathnet_("gradients", "--data", "digits", "--weights", tmp_path / "other.safetensors", "--run", run, *FEW)
    assert_one_line(ended, run, "holds another run", "model.hash: expected")


def test_folders_that_hold_no_run_and_parts_that_are_cut_short(tmp_path: Path, weights: Path) -> None:
    assert_one_line(pathnet_("figures", tmp_path / "nowhere"), "run: expected the folder of a run", "nowhere")
    flags = ["--data", "digits", "--weights", weights, "--run", tmp_path, *FEW]
    assert pathnet_("gradients", *flags).status == 0
    (part,) = results.read(tmp_path).parts
    part.write_bytes(part.read_bytes()[:-20])
    for ended in (pathnet_("figures", tmp_path), pathnet_("gradients", *flags)):
        assert_one_line(ended, part, "is not a readable part")


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["gradients"],
        ["gradients", "--data", "digits", "--run", "r", "--bn", "frozen"],
        ["gradients", "--data", "digits", "--run", "r", "--batches", "many"],
        ["gradients", "--data", "digits", "--run", "r", "--method", "guessed"],
        ["train", "--data", "digits", "--out", "w", "--block", "dense"],
        ["demo", "--speed", "fast"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    ended = pathnet_(*arguments)
    assert ended.status == 2 and ended.out == "" and "Usage: " in ended.err and "Traceback" not in ended.err


def test_a_bug_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(cli, "compare", bug)
    assert isinstance(CliRunner().invoke(cli.app, ["figures", str(run)]).exception, AssertionError)


def test_an_interrupt_says_what_is_kept(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pathnet.Recorder, "__call__", interrupt)
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--run", tmp_path / "run", *FEW)
    assert ended.status == 130 and ended.out == ""
    kept = f"what was measured is kept in {tmp_path / 'run'}"
    assert ended.err == f"pathnet: interrupted; {kept}; the same command goes on from there\n"


def test_the_real_command_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pathnet", "figures", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), "run: expected the folder of a run")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_real_command_keeps_what_it_measured_when_it_is_stopped(
    weights: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    script = "from pathnet import cli, progress; progress.LINE_SECONDS = 0; cli.main()"
    flags = ["--data", "digits", "--weights", str(weights), "--run", str(tmp_path), "--batch-size", "8"]
    command = [sys.executable, "-c", script, "gradients", *flags, "--engine", "reference", "--batches", "100000"]
    # Tests that run in the background of a script have their interrupts ignored, and hand that on.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeding)
    assert process.stderr is not None
    seen = [process.stderr.readline() for _ in range(2)]
    process.send_signal(kind)
    out, err = process.communicate(timeout=120)
    assert seen[1] == "path gradients: 2/100000 batches, engine reference\n"
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"pathnet: interrupted; what was measured is kept in {tmp_path}")
    assert len(results.read(tmp_path).measurements()) >= 2 * 9
