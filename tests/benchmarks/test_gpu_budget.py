"""The budget of a run on a GPU against the kernels and tests that it counts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks import budget, gpu
from benchmarks.cases import FULL
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.fixture(scope="module")
def kernels() -> tuple[dict[str, int], int]:
    """Return the kernels of each step and of a user's first number, counted without Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    count = "import json; from benchmarks.kernels import counted; print(json.dumps(counted()))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run([sys.executable, "-c", count], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_step, first = json.loads(done.stdout)
    return by_step, first


def test_the_budget_is_that_of_the_kernels_that_are_counted(kernels: tuple[dict[str, int], int]) -> None:
    """A count beyond the budget means that one of them has to change."""
    by_step, first = kernels
    assert 0.9 * budget.KERNELS < sum(by_step.values()) <= budget.KERNELS
    assert 0.8 * budget.FIRST_NUMBER.kernels < first <= budget.FIRST_NUMBER.kernels
    # The tests have run these kernels.
    assert by_step["batch_sweep"] == by_step["running_triton"] == 0


@pytest.mark.parametrize("step", budget.TESTS)
def test_the_budget_is_that_of_the_tests_that_are_collected(step: str) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", getattr(FULL, step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith(f"{budget.TESTS[step]} tests collected"), done.stdout[-500:]


def test_a_run_keeps_to_its_seconds() -> None:
    assert list(budget.COSTS) == list(gpu.STEPS)
    assert budget.limits_s() <= budget.RUN_S == 490
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
