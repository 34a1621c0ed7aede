"""The benchmarks, rehearsed on the CPU: baselines are right, steps are independent, results reach the disk."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from oracles import detach_loop
from torch import Tensor

import pathnet
from benchmarks import baselines, gpu, results
from benchmarks.cases import PAPER, module_operations, network
from benchmarks.timing import interleaved
from pathnet import native

needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

CASE = Case("baseline", 14, width=4, side=8, batch=3)


def in_float32(net: Any, images: Tensor, labels: Tensor) -> Any:
    return baselines.Composition(net, images, labels, torch.float32)


@pytest.mark.parametrize("baseline", [baselines.DetachLoop, in_float32, baselines.BatchedGradients])
def test_baselines_give_the_norm_of_the_path(baseline: Any) -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    run = baseline(net, images, labels)
    for path in pathnet.paths.enumerate_all(6)[::7]:
        expected = detach_loop(net, images, labels, path).norm()
        torch.testing.assert_close(torch.as_tensor(run(path)).squeeze().double(), expected, rtol=1e-4, atol=0)


def test_many_paths_in_one_batched_call() -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    paths = pathnet.paths.enumerate_all(6)[::7]
    run = baselines.BatchedGradients(net, images, labels)
    torch.testing.assert_close(run(paths), torch.cat([run(path) for path in paths]), rtol=1e-5, atol=0)


def test_operations_of_a_module() -> None:
    """9.44 million in every stage of the paper's network; a transition's first convolution has half of one."""
    operations = module_operations(network(PAPER.depth, PAPER.width), PAPER.side)
    assert operations[0] == 2 * 2 * 9 * 16 * 16 * 32 * 32 == 9_437_184
    assert operations[18] == operations[36] == 0.75 * operations[0]
    assert set(operations) == {operations[0], operations[18]}


def test_rounds_go_through_all_competitors() -> None:
    calls: list[str] = []
    timed = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"), warm_up=1
    )
    assert calls == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert timed["a"].rounds == 3 and timed["a"].lower <= timed["a"].median <= timed["a"].upper


@needs_native
def test_the_command_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--rehearse", "--commit", "0123456789abcdef", "--folder", str(tmp_path)]
    assert gpu.main(["build", "sweep", "lengths", "profile", *folder]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("rehearsal-") and file.name.endswith("-0123456789ab.json")
    run = json.loads(file.read_text())
    steps = run["steps"]
    assert [steps[step]["status"] for step in ("build", "sweep", "lengths")] == ["ok"] * 3
    assert steps["profile"]["status"] in ("unavailable", "ok")
    assert run["facts"]["kernels"] == results.kernel_hashes()
    assert steps["sweep"]["measurements"] == 18 and steps["sweep"]["float32"]["seconds"] > 0
    assert {"detach loop", "composition", "is_grads_batched", "cpu float32"} == set(steps["lengths"]["seconds"]["5"])
    assert "at most 20 s" in capsys.readouterr().out


@needs_native
@pytest.mark.parametrize("step", ["accuracy", "lesions", "scaling"])
def test_each_step_alone(step: str) -> None:
    outcome = gpu.one_step(step, gpu.Setting(rehearse=True))
    assert outcome["status"] == "ok", outcome


def test_a_step_that_fails_or_hangs_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[list[str]] = []

    def run(command: list[str], limit: int) -> subprocess.CompletedProcess[str]:
        """As the steps' own processes: the first gives no outcome, the second hangs."""
        on_disk.append([step for file in tmp_path.glob("*.json") for step in json.loads(file.read_text())["steps"]])
        if "build" in command:
            return subprocess.CompletedProcess(command, 139, "", "Segmentation fault")
        if "sweep" in command:
            raise subprocess.TimeoutExpired(command, limit)
        Path(command[command.index("--outcome") + 1]).write_text(json.dumps({"status": "ok", "seconds_taken": 0.1}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu, "_run", run)
    arguments = ["build", "sweep", "accuracy", "--rehearse", "--commit", "c", "--folder", str(tmp_path)]
    assert gpu.main(arguments) == 1
    (file,) = tmp_path.iterdir()
    steps = json.loads(file.read_text())["steps"]
    assert steps["build"] == {"status": "failed", "reason": "ended with 139: Segmentation fault"}
    assert steps["sweep"]["reason"].startswith("took more than")
    assert steps["accuracy"]["status"] == "ok"
    assert on_disk == [[], ["build"], ["build", "sweep"]]


def test_a_tool_that_finds_something_fails_and_one_that_is_refused_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = gpu.Setting(rehearse=True)
    monkeypatch.setattr(gpu, "_tool", lambda name: name)
    for code, status in ((86, "failed"), (1, "unavailable"), (0, "ok")):
        done = subprocess.CompletedProcess([], code, "some lines\nthe last line", "")
        monkeypatch.setattr(gpu, "_run", lambda command, limit, done=done: done)
        assert gpu.one_step("sanitizer", setting)["status"] == status


def test_an_unknown_step_and_a_machine_without_a_gpu_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["swep"])
    assert "expected build, tests" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main([]) == 1
        assert "sees no CUDA device" in capsys.readouterr().out


def test_goals_are_judged_by_what_was_measured() -> None:
    sweep = {"measurements": 54_000, "bfloat16": {"seconds": 5.4, "record_share": 0.2}}
    seconds = {"5": {"detach loop": {"median": 0.02}, "composition": {"median": 0.0004}}}
    steps = {"sweep": sweep, "lengths": {"seconds": seconds}}
    assert [(row[2], row[3]) for row in gpu.goals(steps)] == [
        ("5.4 s", True),
        ("0.2", False),
        ("200", True),
        ("4", False),
    ]


def test_kernels_that_no_gpu_has_confirmed(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints them; what stands in a results file is told apart from what has changed since."""
    run = results.newest()
    with capsys.disabled():
        files = results.unverified(run)
        if files:
            print(f"\nunverified on a GPU: {', '.join(files)}")
    same = {"facts": {"kernels": results.kernel_hashes()}}
    assert results.unverified(same) == []
    same["facts"]["kernels"]["csrc/cuda/walk.cuh"] = "of another time"
    assert results.unverified(same) == ["csrc/cuda/walk.cuh"]
    assert "csrc/cuda/routed_backward.cu" in results.unverified(None)
