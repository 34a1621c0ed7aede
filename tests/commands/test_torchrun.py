"""Commands under torchrun: processes share the work, and what they measure is what one process measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TINY, pathnet_
from helpers.elastic import torchrun, torchrun_program

from pathnet import results
from pathnet.commands import watcher
from pathnet.commands.app import app
from pathnet.commands.shared import device_of, reporter_of
from pathnet.paper import EXPERIMENTS
from pathnet.workers import Workers

PLAN = ["--batches", "12", "--batch-size", "8"]


@pytest.fixture(scope="module")
def alone(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of measurements of a single process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--out", folder, *PLAN)
    assert ended.status == 0, ended.err
    return measurements(folder)


def measurements(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "measurements").iterdir()}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("pathnet: ")]


def test_two_processes_measure_the_same_bytes_as_one(weights: Path, alone: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = torchrun(tmp_path, "gradients", "--data", "digits", "--weights", weights, "--out", run, "--json", *PLAN)
    assert ended.returncode == 0, ended.stderr
    assert measurements(run) == alone and json.loads(ended.stdout)["run"] == str(run)
    assert lines(ended.stderr) == [] and "path gradients: 12/12 batches, engine " in ended.stderr
    attempt = results.read(run).facts["attempts"][-1]
    assert attempt["processes"] == 2


def test_the_death_of_a_process_costs_its_open_batch(weights: Path, alone: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("gradients", "--data", "digits", "--weights", weights, "--out", run, "--json", *PLAN)
    ended = torchrun(tmp_path, *arguments, victim=1)
    killed, warning = lines(ended.stderr)
    assert killed.startswith("pathnet: process 1 of 2 was killed (SIGKILL); the others go on")
    assert warning.startswith("pathnet: warning: workers: process 1 of 2 is gone")
    assert ended.returncode == 1 and json.loads(ended.stdout)["batches"] == 11
    assert pathnet_(*arguments).status == 0 and measurements(run) == alone


def test_torchrun_starts_all_again_if_it_may(weights: Path, alone: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("gradients", "--data", "digits", "--weights", weights, "--out", run, "--json", *PLAN)
    ended = torchrun(tmp_path, *arguments, victim=0, restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert "process 0 of 2 was killed (SIGKILL); torchrun starts all again" in ended.stderr
    assert json.loads(ended.stdout)["batches"] == 12 and measurements(run) == alone


def test_each_network_of_a_study_is_trained_by_one_process(tmp_path: Path) -> None:
    words = ("lesion-single", "--data", "digits", "--json", *TINY, "--seeds", "2", "--out")
    ended = torchrun(tmp_path, *words, tmp_path / "pair")
    assert ended.returncode == 0, ended.stderr
    assert pathnet_(*words, tmp_path / "alone").status == 0
    run = Path("lesion-single")
    assert measurements(tmp_path / "pair" / run) == measurements(tmp_path / "alone" / run)
    networks = [results.read(tmp_path / name / run).fact("networks") for name in ("pair", "alone")]
    assert networks[0] == networks[1] and len(networks[0]["residual"]) == 2


SCRIPT = """
import sys
import pathnet
from pathnet.experiments import path_gradients
from helpers.gradient_runs import PLAN, small_data, small_net

group = pathnet.workers.torchrun()
path_gradients.measure(small_net(), small_data(), PLAN, sys.argv[0] + " shared", workers=group)
if group.leads:
    path_gradients.measure(small_net(), small_data(), PLAN, sys.argv[0] + " first")
"""


def test_a_script_of_ones_own_shares_its_batches_or_leaves_them_to_the_first(tmp_path: Path) -> None:
    program = tmp_path / "script.py"
    program.write_text(SCRIPT)
    ended = torchrun_program(program)
    assert ended.returncode == 0, ended.stderr
    shared, first = (Path(f"{program} {name}") for name in ("shared", "first"))
    assert measurements(shared) == measurements(first)
    attempts = [results.read(folder).facts["attempts"][0].get("processes") for folder in (shared, first)]
    assert attempts == [2, None]


def test_every_command_is_shared_or_runs_in_one_process() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    shared = {name for name in commands if not watcher.in_one_process([name, "--all"])}
    assert shared == {"gradients", "figures", "train", *EXPERIMENTS}
    assert watcher.in_one_process(["figures", "runs/run"]) and watcher.in_one_process(["gradients", "--help"])


def test_a_command_of_one_process_ends_in_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pathnet.workers._torchrun", lambda: Workers())
    watcher.watch(["doctor"])
    assert capsys.readouterr().err == "pathnet: this command runs in one process; 2 of 3 have nothing to do\n"
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit) as end:
        watcher.watch(["doctor"])
    assert end.value.code == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("by_user", "count", "threads"), [(None, 2, "4"), ("1", 3, "2"), ("1", 100, "1"), ("5", 2, "5")]
)
def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch, by_user: str | None, count: int, threads: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", by_user or "1")
    environment = {"LOCAL_WORLD_SIZE": str(count)} | ({} if by_user is None else {"OMP_NUM_THREADS": by_user})
    watcher.share_cores(environment)
    assert watcher.os.environ["OMP_NUM_THREADS"] == threads


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    chosen = list[Any]()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    second = Workers(3, 4, 1, 2, HashStore())
    assert str(device_of("auto", second)) == "cuda:1" and str(device_of("cpu", second)) == "cpu"
    assert [str(device) for device in chosen] == ["cuda:1"]
    with pytest.raises(ValueError, match="device: expected a GPU for each of 4 processes on this machine, got 2"):
        device_of("cuda", Workers(0, 4, 0, 4, HashStore()))


def test_the_first_process_alone_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    for rank in range(2):
        with reporter_of(Workers(rank, 2, rank, 2, HashStore()))("job") as progress:
            progress(3 + rank, 10, "batches")
    assert capsys.readouterr().err.startswith("job: 3/10") and "4/10" not in capsys.readouterr().err
