"""The benchmarks rehearsed on the CPU: the run's machinery, the baselines' numbers, which kernels no GPU has run."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.cases import SMALL, Case
from helpers.oracles import detach_loop as true_gradient
from helpers.oracles import relative_error

import pathnet
from pathnet import native

sys.path.insert(0, str(ROOT))

from benchmarks import budget, fused, gpu, processes, report, results, tools, truth  # noqa: E402
from benchmarks.baselines import BatchedGradients, Composed, detach_loop, norms  # noqa: E402
from benchmarks.cases import FULL, REHEARSAL, batch, module_flops, network, path_flops  # noqa: E402
from benchmarks.facts import commit_here  # noqa: E402
from benchmarks.outcome import Failed, Found, Unavailable  # noqa: E402
from benchmarks.timing import interleaved  # noqa: E402

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.fixture(scope="module", autouse=True)
def without_the_interpreter() -> Iterator[None]:
    """A rehearsal on a CPU runs blocks' own modules, as a person's does."""
    with pytest.MonkeyPatch.context() as changed:
        changed.delenv("TRITON_INTERPRET", raising=False)
        yield


CHAINS = [case for case in SMALL if case.block == "basic"]


def rehearse(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--rehearse", "--in-process", "--folder", str(folder), "--commit", "abc123", *arguments])
    (file,) = folder.glob("*.json")
    return status, results.read(file)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    return rehearse(tmp_path_factory.mktemp("results"))


def test_a_whole_rehearsal(rehearsal: tuple[int, dict[str, Any]]) -> None:
    status, found = rehearsal
    assert status == 0
    assert list(found["steps"]) == list(gpu.STEPS)
    ended = {name: step["status"] for name, step in found["steps"].items()}
    # What a CPU has not is told, and is no failure.
    assert {name for name in ended if ended[name] != "passed"} <= {"compile", "sanitizer", "profile"}
    assert found["commit"] == "abc123" and found["rehearsal"]
    assert found["kernels"] == results.kernel_hashes()
    assert found["facts"]["torch"] == torch.__version__


def test_what_a_rehearsal_finds(rehearsal: tuple[int, dict[str, Any]]) -> None:
    steps = {name: step["found"] for name, step in rehearsal[1]["steps"].items() if "found" in step}
    names = {"loop", "batched gradients", "pathnet float32", "composed, a graph a path", "composed, all at once"}
    assert names <= steps["sweep"]["timings"].keys()
    assert names <= steps["sweep"]["check"].keys()
    assert all(own["passed"] for own in steps["sweep"]["check"].values())
    assert "pathnet bfloat16" in steps["sweep"]["timings"] and steps["sweep"]["unavailable"] == {}
    assert {row["length"] for row in steps["paths"]["rows"]} == set(REHEARSAL.lengths)
    assert {row["varied"] for row in steps["scaling"]["rows"]} == {"paths", "batch", "depth", "width"}
    whole = steps["whole_sweep"]["precisions"]["float32"]
    assert whole["positive_and_finite"] and not whole["complete"]
    assert whole["measurements"] == REHEARSAL.sweep_batches * 6
    for tests in (steps["cuda_tests"], steps["triton_tests"]):
        assert tests["passed"] > 0 and tests["failures"] == 0


def test_goals_stand_beside_what_was_measured(rehearsal: tuple[int, dict[str, Any]]) -> None:
    goals = {own["goal"]: own for own in rehearsal[1]["goals"]}
    error = goals["error of a batch norm against float64, float32"]
    assert error["met"] and 0 < error["measured"] < 1e-5
    assert goals["54,000 measurements, float32, s"]["extrapolated"]
    assert goals["times faster than the loop, bfloat16"]["measured"] > 0
    assert [own["met"] for own in report.goals({})] == [None] * len(goals)
    exceeded = {"accuracy": {"found": {"rows": [{"precision": "float32", "batch_norm": 1.0, "sample_norm": 0.0}]}}}
    assert [own["met"] for own in report.goals(exceeded) if own["measured"] is not None] == [False, True]


@pytest.mark.parametrize("name", [name for name in gpu.STEPS if not name.endswith("_tests")])
def test_each_step_alone(name: str, tmp_path: Path) -> None:
    status, found = rehearse(tmp_path, name)
    assert status == 0
    assert list(found["steps"]) == [name]


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


Steps = dict[str, Callable[[Any], Found]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Steps], None]:
    def replace_them(own: Steps) -> None:
        monkeypatch.setattr(gpu, "STEPS", own)
        monkeypatch.setattr(gpu, "limit_s", lambda name: 60.0)

    return replace_them


def test_steps_that_end_badly_stop_no_other(steps: Callable[[Steps], None], tmp_path: Path) -> None:
    """And what came before is on disk when the next begins."""
    on_disk: dict[str, Any] = {}

    def raises(_: Any) -> Found:
        raise ZeroDivisionError("one\nline")

    def fails(_: Any) -> Found:
        raise Failed("wrong", {"by": 3})

    def refused(_: Any) -> Found:
        raise Unavailable("no such tool")

    def last(_: Any) -> Found:
        (file,) = tmp_path.glob("*.json")
        on_disk.update(results.read(file)["steps"])
        return {"infinite": float("inf")}

    steps({"raises": raises, "fails": fails, "refused": refused, "last": last})
    status, found = rehearse(tmp_path)
    assert status == 1
    assert found["steps"]["raises"]["reason"] == "ZeroDivisionError: one line"
    assert "raises" in found["steps"]["raises"]["found"]["traceback"]
    assert found["steps"]["fails"]["found"] == {"by": 3}
    assert found["steps"]["refused"]["status"] == "unavailable"
    assert found["steps"]["last"]["found"] == {"infinite": "inf"}
    assert on_disk == {name: found["steps"][name] for name in ("raises", "fails", "refused")}


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


def fake(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("name", ["sanitizer", "profile"])
def test_a_missing_tool_is_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "PLACES", ())
    status, found = rehearse(tmp_path, name)
    assert status == 0
    assert found["steps"][name]["status"] == "unavailable"
    assert "is not on this machine" in found["steps"][name]["reason"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed", None),
        ("echo '========= ERROR SUMMARY: 2 errors'; exit 66", "failed", "memcheck, racecheck: see the output"),
        ("echo '========= Error: Device not supported'; exit 1", "unavailable", "Error: Device not supported"),
        ("echo Traceback; exit 1", "failed", "memcheck, racecheck: see the output"),
        ("exit 0", "failed", "memcheck, racecheck: see the output"),
    ],
)
def test_what_compute_sanitizer_says(
    body: str, status: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, "compute-sanitizer", body, monkeypatch)
    exit_status, found = rehearse(tmp_path, "sanitizer")
    assert found["steps"]["sanitizer"]["status"] == status
    assert found["steps"]["sanitizer"].get("reason") == said
    assert exit_status == (status == "failed")


def test_the_sanitizer_runs_over_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command behind the tool's own flags is what it is meant to be."""
    fake(tmp_path, "compute-sanitizer", 'while [ "$1" != all ]; do shift; done; shift; exec "$@"', monkeypatch)
    monkeypatch.setattr(gpu, "REHEARSAL", replace(REHEARSAL, precisions=("float32",)))
    _, found = rehearse(tmp_path, "sanitizer")
    output = found["steps"]["sanitizer"]["found"]["memcheck"]["output"]
    assert output.count(": done") == 4


def test_what_ncu_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        '"ID","Kernel Name","lts__t_sectors.avg.pct_of_peak_sustained_elapsed","launch__registers"',
        '"","","%","register/thread"',
        '"0","routed_backward_kernel(Plan)","41.5","128"',
    ]
    body = "echo '==PROF== Connected'; cat <<'END'\n" + "\n".join(rows) + "\nEND"
    fake(tmp_path, "ncu", body, monkeypatch)
    _, found = rehearse(tmp_path, "profile")
    launch = {
        "Kernel Name": "routed_backward_kernel(Plan)",
        "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "41.5 %",
    }
    assert found["steps"]["profile"]["found"] == {"launches": [launch]}
    fake(tmp_path, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", monkeypatch)
    assert rehearse(tmp_path, "profile")[1]["steps"]["profile"]["status"] == "unavailable"


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.id)
def test_baselines_against_the_detach_loop_in_float64(case: Case) -> None:
    net, (images, labels) = case.net(), case.images()
    codes = pathnet.paths.enumerate_all(net.n)[:: 1 if net.n < 4 else 7]
    expected = torch.stack([true_gradient(net, images, labels, code) for code in codes])
    batched = BatchedGradients(net, images, labels)
    batched.forward()
    composed = Composed(net, images, labels, torch.float32)
    along = composed.module_graphs(lambda work: work)
    walks = {
        "loop": torch.stack([detach_loop(net, images, labels, code) for code in codes.tolist()]),
        "batched": batched.walk(codes),
        "composed": composed.walk(composed.rows(codes), len(codes)).permute(0, 1, 4, 2, 3),
        "one by one": torch.cat([composed.walk(composed.rows(code[None]), 1) for code in codes]).permute(
            0, 1, 4, 2, 3
        ),
        "by modules": torch.cat([along(code).clone() for code in codes.tolist()]).permute(0, 1, 4, 2, 3),
    }
    for name, walked in walks.items():
        for own, truth_ in zip(walked, expected, strict=True):
            assert relative_error(own, truth_) < 1e-4, name
    torch.testing.assert_close(norms(expected.float()), expected.flatten(1).norm(dim=1).float())


def test_the_float64_walk_is_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to a walk that is float32 itself: the two bfloat16 terms of AMX have 17 bits."""
    monkeypatch.setenv("PATHNET_ISA", "base")
    case = CHAINS[1]
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="cpu")
    codes = pathnet.paths.enumerate_all(net.n)[::5]
    for code, walked in zip(codes, truth.walk(tape, pathnet.paths.routing(codes)), strict=True):
        assert relative_error(walked, true_gradient(net, images, labels, code)) < 1e-5
    routing = torch.randn(3, net.n, 2, generator=torch.Generator().manual_seed(0))
    assert truth.errors(tape, routing).gradient < 1e-5
    wrong = routing.clone()
    wrong[:, 2, 1] += 0.1
    assert relative_error(tape.routed_gradients(wrong), truth.walk(tape, routing)) > 1e-3


def test_a_module_is_9_44_mflop_at_cifar_sizes() -> None:
    net = pathnet.models.preact_resnet(110)
    residual, skip = zip(*module_flops(net, 32), strict=True)
    assert residual[1] == residual[20] == residual[-1] == 2 * 2 * 9 * 16 * 16 * 32 * 32
    assert [i for i, cost in enumerate(skip) if cost] == [18, 36]
    assert skip[18] == 2 * 16 * 32 * 16 * 16
    codes = torch.tensor([[1] * 54, [0] * 54])
    assert path_flops(net, 32, codes) == sum(residual) + sum(skip)


def test_the_network_of_the_benchmarks_has_gradients_along_every_path() -> None:
    setup = replace(FULL, device="cpu", engine="cpu", batch=2, side=8)
    net, generator = network(setup), torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    tape = pathnet.record(net, images, torch.tensor([0, 1]), engine="cpu")
    sizes = tape.path_gradient_norms(pathnet.paths.one_of_each_length(net.n), per_sample=True)
    assert (sizes > 0).all() and tape.loss < 100


def test_timings_are_interleaved() -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = interleaved(replace(REHEARSAL, rounds=3), work)  # type: ignore[arg-type]
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert timings["a"].facts()["rounds"] == 3 and timings["a"].median > 0


def test_the_commit_comes_from_git(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert commit_here(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = commit_here(tmp_path)
    assert clean is not None and len(clean) == 10
    (tmp_path / "file").write_text("2")
    assert commit_here(tmp_path) == f"{clean}-changed"


def sources(root: Path) -> Path:
    for path in ("csrc/plan.h", "csrc/cuda/a.cu", "csrc/cuda/b.cuh", "pathnet/engines/triton/c.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return root


def vouch(folder: Path, root: Path, began: str, tests: str = "passed", rehearsal: bool = False) -> None:
    steps = {"cuda_tests": {"status": "passed"}, "triton_tests": {"status": tests}}
    found = {"began": began, "kernels": results.kernel_hashes(root), "rehearsal": rehearsal, "steps": steps}
    results.write(folder / f"{began}.json", found)


def test_kernels_changed_since_the_newest_results(tmp_path: Path) -> None:
    root, folder = sources(tmp_path / "repository"), tmp_path / "results"
    every = ["csrc/cuda/a.cu", "csrc/cuda/b.cuh", "csrc/plan.h", "pathnet/engines/triton/c.py"]
    assert results.changed_kernels(folder, root) == every
    vouch(folder, root, "2026-01-01")
    assert results.changed_kernels(folder, root) == []
    (root / "csrc/cuda/a.cu").write_text("changed")
    (root / "csrc/cuda/new.cu").write_text("new")
    (root / "csrc/plan.h").unlink()
    changed = ["csrc/cuda/a.cu", "csrc/cuda/new.cu", "csrc/plan.h"]
    assert results.changed_kernels(folder, root) == changed
    # A rehearsal and a run whose tests failed vouch for nothing.
    vouch(folder, root, "2026-01-02", rehearsal=True)
    vouch(folder, root, "2026-01-03", tests="failed")
    assert results.changed_kernels(folder, root) == changed
    vouch(folder, root, "2026-01-04")
    assert results.changed_kernels(folder, root) == []


def test_results_that_are_none_are_told(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", '{"began": 1'):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(ValueError, match="results: .*file.json"):
            results.changed_kernels(tmp_path)


def test_a_write_that_fails_leaves_the_old_results(tmp_path: Path) -> None:
    results.write(tmp_path / "file.json", {"a": 1})
    with pytest.raises(ValueError):
        results.write(tmp_path / "file.json", {"a": float("nan")})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}


def test_names_of_results() -> None:
    name = results.file_name("NVIDIA H100 80GB HBM3", "2026-11-23", "16c0608abc")
    assert name == "nvidia-h100-80gb-hbm3-2026-11-23-16c0608abc.json"


def test_results_in_the_repository_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for file in results.FOLDER.glob("*.json"):
        assert not results.read(file)["rehearsal"]
    with capsys.disabled():
        if changed := results.changed_kernels():
            print(f"\nunverified on a GPU: {', '.join(changed)}")


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
    monkeypatch.setattr(kind, "norms", lambda *given: right(*given) * 1.01)
    assert 0.009 < truth.sample_error(tape, routing) < 0.011


@pytest.fixture(scope="module")
def kernels() -> tuple[dict[str, int], int]:
    """By step, and of a user's first number; counted in a process without Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    count = "import json; from benchmarks.kernels import counted; print(json.dumps(counted()))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run([sys.executable, "-c", count], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_step, first = json.loads(done.stdout)
    return by_step, first


def test_the_budget_is_that_of_the_kernels_that_are_counted(kernels: tuple[dict[str, int], int]) -> None:
    """A count that has grown beyond the budget's is to be entered there, or brought down."""
    by_step, first = kernels
    assert 0.9 * budget.KERNELS < sum(by_step.values()) <= budget.KERNELS
    assert 0.8 * budget.FIRST_NUMBER.kernels < first <= budget.FIRST_NUMBER.kernels
    # Which the tests have run.
    assert by_step["batch_sweep"] == by_step["running_triton"] == 0


@pytest.mark.parametrize("step", budget.TESTS)
def test_the_budget_is_that_of_the_tests_that_are_collected(step: str) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", getattr(FULL, step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith(f"{budget.TESTS[step]} tests collected"), done.stdout[-500:]


def test_a_run_keeps_to_its_seconds() -> None:
    assert list(budget.COSTS) == list(gpu.STEPS)
    assert budget.limits_s() <= budget.RUN_S == 450
    for step, cost in budget.COSTS.items():
        assert budget.limit_s(step) > budget.seconds(step) >= cost.run_s > 0


def test_a_run_has_what_the_native_build_leaves_it_and_a_rehearsal_what_its_steps_may_take() -> None:
    assert 60 * gpu._parse([]).minutes == pytest.approx(budget.RUN_S - budget.native_s())
    assert 60 * gpu._parse(["--rehearse"]).minutes == pytest.approx(len(gpu.STEPS) * budget.REHEARSAL_LIMIT_S)


def test_the_first_figures_are_there_within_two_minutes() -> None:
    steps = list(gpu.STEPS)
    before = steps[: steps.index("sweep") + 1]
    assert before == ["build", "cuda_tests", "accuracy", "sweep"]
    assert budget.native_s() + sum(map(budget.seconds, before)) <= 120


def test_a_users_first_number_takes_twenty_seconds_at_most() -> None:
    assert budget.first_number_s() <= budget.FIRST_NUMBER_S == 20


def test_what_a_step_compiles_itself_is_told(steps: Callable[[Steps], None], tmp_path: Path) -> None:
    """Not other programs' kernels, nor those that are on disk."""
    knobs = pytest.importorskip("triton").knobs

    def step(_: Any) -> Found:
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
