"""The run on a GPU rehearsed on the CPU: its steps, its findings, and its failures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_rehearsal import rehearse
from helpers import ROOT

import pathnet
from benchmarks import fused, gpu, processes, report, results, truth
from benchmarks.cases import REHEARSAL, batch, network
from benchmarks.outcome import Failed, Findings, Unavailable
from pathnet import native

pytestmark = [
    pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT),
    pytest.mark.usefixtures("without_the_interpreter"),
]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    return rehearse(tmp_path_factory.mktemp("results"))


def test_a_whole_rehearsal(rehearsal: tuple[int, dict[str, Any]]) -> None:
    status, recorded = rehearsal
    assert status == 0
    assert list(recorded["steps"]) == list(gpu.STEPS)
    ended = {name: step["status"] for name, step in recorded["steps"].items()}
    # Steps that a CPU cannot run are recorded, and no failures.
    assert {name for name in ended if ended[name] != "passed"} <= {"compile", "sanitizer", "profile"}
    assert recorded["commit"] == "abc123" and recorded["rehearsal"]
    assert recorded["kernels"] == results.kernel_hashes()
    assert recorded["facts"]["torch"] == torch.__version__


def test_what_a_rehearsal_finds(rehearsal: tuple[int, dict[str, Any]]) -> None:
    steps = {name: step["found"] for name, step in rehearsal[1]["steps"].items() if "found" in step}
    names = {"loop", "batched gradients", "pathnet float32", "composed, a graph a path", "composed, all at once"}
    assert names <= steps["sweep"]["timings"].keys()
    assert names <= steps["sweep"]["check"].keys()
    assert all(result["passed"] for result in steps["sweep"]["check"].values())
    assert "pathnet bfloat16" in steps["sweep"]["timings"] and steps["sweep"]["unavailable"] == {}
    assert {row["length"] for row in steps["paths"]["rows"]} == set(REHEARSAL.lengths)
    assert {row["varied"] for row in steps["scaling"]["rows"]} == {"paths", "batch", "depth", "width"}
    whole = steps["whole_sweep"]["precisions"]["float32"]
    assert whole["positive_and_finite"] and not whole["complete"]
    assert whole["measurements"] == REHEARSAL.sweep_batches * 6
    models = steps["models"]["models"]
    assert len(models) == 3 and all(model["ratios"]["wall"].keys() >= {"few", "many"} for model in models.values())
    assert steps["models"]["cuts"] == []
    for tests in (steps["cuda_tests"], steps["triton_tests"]):
        assert tests["passed"] > 0 and tests["failures"] == 0


def test_goals_stand_beside_what_was_measured(rehearsal: tuple[int, dict[str, Any]]) -> None:
    goals = {goal["goal"]: goal for goal in rehearsal[1]["goals"]}
    error = goals["error of a batch norm against float64, float32"]
    assert error["met"] and 0 < error["measured"] < 1e-5
    assert goals["54,000 measurements, float32, s"]["extrapolated"]
    assert goals["GPT: times faster than fifteen lines, 1000 random paths in one call"]["measured"] > 0
    assert goals["times faster than the loop, bfloat16"]["measured"] > 0
    assert [goal["met"] for goal in report.goals({})] == [None] * len(goals)
    exceeded = {"accuracy": {"found": {"rows": [{"precision": "float32", "batch_norm": 1.0, "sample_norm": 0.0}]}}}
    assert [goal["met"] for goal in report.goals(exceeded) if goal["measured"] is not None] == [False, True]


@pytest.mark.parametrize("name", [name for name in gpu.STEPS if not name.endswith("_tests")])
def test_each_step_alone(name: str, tmp_path: Path) -> None:
    status, recorded = rehearse(tmp_path, name)
    assert status == 0
    assert list(recorded["steps"]) == [name]


def test_a_step_in_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--folder", str(tmp_path), "build"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "build: passed" in done.stdout and "Goals" in done.stdout
    (file,) = tmp_path.glob("*.json")
    assert results.read(file)["steps"].keys() == {"build"}


def test_without_a_gpu_there_is_no_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["build"]) == 2
    assert "--rehearse" in capsys.readouterr().err


Steps = dict[str, Callable[[Any], Findings]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Steps], None]:
    def replace_steps(replacements: Steps) -> None:
        monkeypatch.setattr(gpu, "STEPS", replacements)
        monkeypatch.setattr(gpu, "limit_s", lambda name: 60.0)

    return replace_steps


def test_steps_that_end_badly_stop_no_other(steps: Callable[[Steps], None], tmp_path: Path) -> None:
    """Each step's entry is on disk when the next step begins."""
    on_disk: dict[str, Any] = {}

    def raises(_: Any) -> Findings:
        raise ZeroDivisionError("one\nline")

    def fails(_: Any) -> Findings:
        raise Failed("wrong", {"by": 3})

    def refused(_: Any) -> Findings:
        raise Unavailable("no such tool")

    def last(_: Any) -> Findings:
        (file,) = tmp_path.glob("*.json")
        on_disk.update(results.read(file)["steps"])
        return {"infinite": float("inf")}

    steps({"raises": raises, "fails": fails, "refused": refused, "last": last})
    status, recorded = rehearse(tmp_path)
    assert status == 1
    assert recorded["steps"]["raises"]["reason"] == "ZeroDivisionError: one line"
    assert "raises" in recorded["steps"]["raises"]["found"]["traceback"]
    assert recorded["steps"]["fails"]["found"] == {"by": 3}
    assert recorded["steps"]["refused"]["status"] == "unavailable"
    assert recorded["steps"]["last"]["found"] == {"infinite": "inf"}
    assert on_disk == {name: recorded["steps"][name] for name in ("raises", "fails", "refused")}


def test_single_steps_add_to_the_file_of_the_same_kernels(
    steps: Callable[[Steps], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps({"one": lambda _: {}, "other": lambda _: {}})
    rehearse(tmp_path, "one")
    assert rehearse(tmp_path, "other")[1]["steps"].keys() == {"one", "other"}
    monkeypatch.setattr(gpu, "kernel_hashes", lambda: {"csrc/plan.h": "changed"})
    assert rehearse(tmp_path, "one")[1]["steps"].keys() == {"one"}


def test_a_process_that_dies_or_hangs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "limit_s", lambda name: 60.0)
    for status, reason in ((-11, "its process ended with status -11"), (None, "stopped after 30 s")):
        done = processes.Done(status, "the last words")
        monkeypatch.setattr(processes, "execute", lambda command, limit, environment, done=done: done)
        arguments = ["--rehearse", "--folder", str(tmp_path), "--minutes", "0.5", "build"]
        assert gpu.main(arguments) == 1
        (file,) = tmp_path.glob("*.json")
        step = results.read(file)["steps"]["build"]
        assert step["reason"] == reason and step["found"] == {"output": "the last words"}
    assert gpu.main([*arguments[:3], "--minutes", "0.1", "build"]) == 1
    assert "left out" in results.read(file)["steps"]["build"]["reason"]


@pytest.mark.parametrize("step", [fused.batch_sweep, fused.running_triton])
def test_walks_that_are_wrong_are_not_timed(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.truth.sample_error", lambda tape, routing: 0.03)
    with pytest.raises(Failed, match="norms off in bfloat16, float32"):
        step(REHEARSAL)


def test_fused_blocks_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.fused_residual
    monkeypatch.setattr(fused, "fused_residual", lambda block, x, a=1.0, c=1.0: right(block, x, a, 0.5 * c))
    with pytest.raises(Failed, match="gradients through fused blocks are off by"):
        fused.training(REHEARSAL)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_the_error_of_a_sample_is_seen(bn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (images, labels) = network(REHEARSAL), batch(REHEARSAL, size=8)
    tape = pathnet.record(net, images, labels, bn=bn, engine="cpu")
    routing = pathnet.paths.routing(pathnet.paths.one_of_each_length(net.n))
    assert truth.sample_error(tape, routing) < 1e-4
    tape._record.start.mantissa[0] *= 1.01
    assert truth.sample_error(tape, routing) < 1e-4
    kind = type(tape._record.walk)
    right = kind.norms
    monkeypatch.setattr(kind, "norms", lambda *arguments: right(*arguments) * 1.01)
    assert 0.009 < truth.sample_error(tape, routing) < 0.011


def test_what_a_step_compiles_itself_is_told(steps: Callable[[Steps], None], tmp_path: Path) -> None:
    """Other programs' kernels and those on disk do not count."""
    knobs = pytest.importorskip("triton").knobs

    def step(_: Any) -> Findings:
        for module, hit in (
            ("pathnet.engines.triton.sums", False),
            ("pathnet.x", True),
            ("torch._inductor.x", False),
        ):
            source = SimpleNamespace(fn=SimpleNamespace(module=module), name="kernel")
            knobs.compilation.listener(src=source, cache_hit=hit)
        return {}

    steps({"one": step})
    assert rehearse(tmp_path)[1]["steps"]["one"]["kernels_compiled"] == 1
    assert knobs.compilation.listener is None
