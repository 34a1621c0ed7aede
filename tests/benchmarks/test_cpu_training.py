"""The benchmark of the training step: wrong gradients are not timed, and every form is measured by itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_benchmarks import QUICK as REHEARSAL
from torch import Tensor

from benchmarks import results
from benchmarks.cases import batch, network
from benchmarks.cpu.budget import Budget
from benchmarks.cpu.field import Field
from benchmarks.cpu.run import Run, measure
from benchmarks.cpu.training import accuracy, step
from benchmarks.cpu.training.accuracy import gradient_errors
from benchmarks.cpu.training.admission import WARM_UP, Admitted, admitted_forms
from benchmarks.cpu.training.bounds import bounds
from benchmarks.cpu.training.forms import FORMS, Form, Trainer
from benchmarks.cpu.training.kept import KEEPING, steps_with_kept_memory
from benchmarks.cpu.training.memory import memory_of_a_step
from benchmarks.outcome import Failed
from pathnet import native
from pathnet.models import PreactBlock, ResidualNet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

QUICK = replace(REHEARSAL, training=replace(REHEARSAL.training, memory_forms=0))
"""Without processes of their own for memory, which the rehearsal of the command starts."""

CHANNELS_LAST = Form("torch", "float32")
TIMED = (CHANNELS_LAST, Form("pathnet", "float32"), Form("torch", "bfloat16"), Form("pathnet", "bfloat16"))


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = measure(QUICK, tmp_path_factory.mktemp("results"), steps=["training"])
    # The step checks itself, so the competitors of other steps are not built.
    assert list(run.results["found"]) == ["training"] and run.wrong is None
    return dict(run.results["found"]["training"])


# Findings


def test_every_form_is_timed_but_compiled_ones_in_a_rehearsal(findings: dict[str, Any]) -> None:
    rows = {row["form"]: row for row in findings["forms"]}
    assert list(rows) == [str(form) for form in FORMS if not form.compiled] and len(rows) == 6
    for form in TIMED:
        drawn = rows[str(form)]["drawn"]
        assert drawn["rounds"] == len(drawn["seconds"]) == 2
        assert drawn["share"] == drawn["median_s"] / rows[str(form)]["median_s"]
    for row in rows.values():
        parts = row["parts"]
        assert 0 < parts["forward_s"] + parts["backward_s"] + parts["update_s"] < 2 * row["median_s"]
        assert row["rounds"] == 2 and row["first_s"] > 0
    assert (findings["drawn"], findings["modules"], findings["batch"]) == (2, 6, 2)


def test_each_block_of_pathnets_forms_is_fused(findings: dict[str, Any]) -> None:
    engines = [row["engines"] for row in findings["forms"] if row["by"] == "pathnet"]
    assert engines == [{"cpu": 6}, {"cpu": 6}]


def test_ratios_are_to_the_best_of_pytorch(findings: dict[str, Any]) -> None:
    seconds = {row["form"]: row["median_s"] for row in findings["forms"]}
    for precision, rivals in (("float32", ("float32",)), ("bfloat16", ("float32", "bfloat16"))):
        best = min((name for name in seconds if name.startswith("torch") and name.endswith(rivals)), key=seconds.get)  # type: ignore[arg-type]
        conclusion = findings["conclusions"][precision]
        ours = seconds[f"pathnet, {precision}"]
        assert conclusion["best"] == best and conclusion["times_faster"] == seconds[best] / ours
        pipeline = findings["input_pipeline"]["median_s"]
        assert conclusion["pipeline_share"] == pipeline / ours
        assert conclusion["epoch_s"] == pytest.approx(25_000 * (ours + pipeline))
    assert findings["share"] == findings["conclusions"]["float32"]["drawn_share"]


def test_the_errors_of_all_precisions_are_recorded(findings: dict[str, Any]) -> None:
    errors = findings["error"]
    assert 0 <= errors["torch, float64"] < 1e-12
    assert 0 < errors["pathnet, float32"] < 1e-4
    assert 1e-3 < errors["pathnet, bfloat16"] < 0.2 and 1e-3 < errors["torch, bfloat16"] < 0.2
    assert 0 < errors["pathnet, bfloat16, in times of autocast's error"] < 2


def test_operations_and_bytes_of_a_step_by_hand() -> None:
    """A block of 3 to 3 channels on 4 x 4 pixels; one of 3 to 6 channels on every second, with a projection."""
    blocks = [PreactBlock(3, (3, 3), (3, 3), 1, "pad"), PreactBlock(3, (3, 3), (6, 6), 2, "projection")]
    net = ResidualNet(torch.nn.Identity(), blocks, torch.nn.Identity())
    counted = bounds(net, images=5, side=4, seconds=0.01)
    products = 2 * 3 * 3 * 9 * 16 + (3 * 6 * 9 + 6 * 6 * 9 + 3 * 6) * 4
    assert counted["operations"] == 3 * 2 * products * 5
    assert counted["bytes"] == 17 * 4 * (3 * 16 + 6 * 4) * 5
    assert counted["copied_bytes_per_s"] > 1e7 and (counted["peak_flops_per_s"] or 1e9) > 1e8


# Refusals


def left_in(self: ResidualNet, x: Tensor, drawn: Any = None) -> Tensor:
    """Run one module more than drawn."""
    drawn = drawn if drawn is None else [True, *drawn[1:]]
    return forward(self, x, drawn)


def computed(self: ResidualNet, x: Tensor, drawn: Any = None) -> Tensor:
    """Give modules that are not drawn gradients of zero in place of none."""
    y = self.stem(x)
    for i, block in enumerate(self):
        skip, residual = block.branches(y)
        y = skip + (1.0 if drawn is None or drawn[i] else 0.0) * residual
    return torch.as_tensor(self.head(y))


def not_a_number(self: ResidualNet, x: Tensor, drawn: Any = None) -> Tensor:
    return forward(self, x, drawn) * float("nan")


forward = ResidualNet.forward


@pytest.mark.parametrize("wrong", [left_in, computed, not_a_number])
def test_a_step_with_other_gradients_is_not_timed(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Run(QUICK, tmp_path)
    monkeypatch.setattr(ResidualNet, "forward", wrong)
    with pytest.raises(Failed, match="gradients of torch, .*, are off by (inf|nan|[0-9.e+-]+), hence not timed"):
        run.perform("training")
    assert "forms" not in run.results["failed"]["training"]["found"]
    recorded = results.read_cpu(run.file)
    assert all(figure["counted"] is None for figure in recorded["figures"] if "training step" in figure["figure"])


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1 + 1e-3, "pathnet, float32"), (1 + 1e-5, None)],
)
def test_a_fused_gradient_off_by_a_thousandth_is_not_timed(
    factor: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_one_gradient(monkeypatch, "pathnet", "float32", factor)
    net, steps = step._checked(Field(QUICK))
    if said is None:
        assert accuracy.check_gradients(net, steps)["pathnet, float32"] < 1e-4
        return
    with pytest.raises(Failed, match=f"gradients of {said}, are off by 0.001, hence not timed"):
        accuracy.check_gradients(net, steps)


def test_a_gradient_of_a_third_of_its_digits_is_refused_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_one_gradient(monkeypatch, "pathnet", "bfloat16", 1.2)
    with pytest.raises(Failed, match="pathnet, bfloat16, in times of autocast's error, are off by [0-9.]+, hence"):
        accuracy.check_gradients(*step._checked(Field(QUICK)))


def scale_one_gradient(monkeypatch: pytest.MonkeyPatch, by: str, precision: str, factor: float) -> None:
    backward = Trainer.backward_alone

    def scaled(self: Trainer, drawn: Any = None) -> Tensor:
        loss = backward(self, drawn)
        if (self.form.by, self.form.precision) == (by, precision):
            dict(self.net.named_parameters())["stem.weight"].grad.mul_(factor)  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(Trainer, "backward_alone", scaled)


def test_statistics_that_are_not_updated_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(QUICK.checked)
    images, labels = batch(QUICK.checked)
    assert max(gradient_errors(CHANNELS_LAST, net, images, labels, None).values()) < 1e-4
    backward = Trainer.backward_alone

    def forgets(self: Trainer, drawn: Any = None) -> Tensor:
        saved = copy.deepcopy(dict(self.net.named_buffers()))
        loss = backward(self, drawn)
        self.net.load_state_dict(saved, strict=False)
        return loss

    monkeypatch.setattr(Trainer, "backward_alone", forgets)
    errors = gradient_errors(CHANNELS_LAST, net, images, labels, None)
    assert {name.rpartition(".")[2] for name, error in errors.items() if error > 1e-4} == {
        "running_mean",
        "running_var",
    }


@pytest.mark.parametrize(("factor", "error"), [(1.1, "0.1"), (float("nan"), "nan")])
def test_a_form_that_differs_on_the_timed_network_is_not_timed(
    factor: float, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer.backward_alone

    def scaled(self: Trainer, drawn: Any = None) -> Tensor:
        loss = backward(self, drawn)
        if self.form == Form("torch", "bfloat16", "NCHW"):
            for parameter in self.net.parameters():
                parameter.grad.mul_(factor)  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(Trainer, "backward_alone", scaled)
    with pytest.raises(Failed, match=f"the gradient of torch, NCHW, bfloat16, is off by {error} on the network"):
        admitted_forms(Field(QUICK), Budget())


# Budget


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Clock, Callable[[Form], float]]]:
    """Return a clock, and replace building a form by one that takes two seconds on it; compiled ones take 20 more."""
    clock = Clock()

    def build(self: Admitted, form: Form, field: Field) -> None:
        self.loss, self.norm, self.seconds = 1.0, 1.0, 2.0 if form.layout == "NCHW" else 1.0
        self.first_s = 20.0 if form.compiled else 0.0
        clock.now += self.first_s + WARM_UP * self.seconds

    monkeypatch.setattr(Admitted, "__init__", build)
    yield clock, lambda form: 1.0


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [(1.0, 2), (30.0, 3), (60.0, 5), (100.0, 6), (150.0, 7), (1000.0, 8)],
)
def test_forms_that_time_does_not_allow_are_left_out_and_recorded(
    slow: tuple[Clock, object], seconds: float, kept: int
) -> None:
    field = Field(replace(QUICK, compiled=True))
    budget = Budget(seconds, slow[0], "training")
    forms = [
        *(form for form in FORMS if not form.compiled),
        *(form for form in FORMS if form.compiled and form.layout == "channels_last"),
    ]
    assert list(admitted_forms(field, budget)) == forms[:kept]
    assert [cut["what"] for cut in budget.cuts] == [f"training step of {form}" for form in forms[kept:]]
    assert all("the fewest rounds would take some" in cut["because"] for cut in budget.cuts)


def test_blocks_that_cannot_be_compiled_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Trainer.__init__

    def refuses(self: Trainer, form: Form, *arguments: Any) -> None:
        if form.compiled:
            raise RuntimeError("no C++ compiler\nfound")
        built(self, form, *arguments)

    monkeypatch.setattr(Trainer, "__init__", refuses)
    budget = Budget(step="training")
    admitted = admitted_forms(Field(replace(QUICK, compiled=True)), budget)
    assert len(admitted) == 6 and not any(form.compiled for form in admitted)
    assert [cut["because"] for cut in budget.cuts] == 2 * ["it could not be compiled (no C++ compiler)"]


# Forms


def test_compiled_blocks_take_the_same_step() -> None:
    net, (images, labels) = network(QUICK.setup), batch(QUICK.setup)
    plain, compiled = (
        Trainer(form, net, images, labels, "eager") for form in (CHANNELS_LAST, replace(CHANNELS_LAST, compiled=True))
    )
    for _ in range(2):
        plain.step()
        compiled.step()
    assert all(block._compiled_call_impl is not None for block in compiled.net)
    assert torch.allclose(plain.loss, compiled.loss, rtol=1e-5)
    assert plain.gradient_norm() == pytest.approx(compiled.gradient_norm(), rel=1e-4)


def test_the_memory_of_a_step_grows_with_the_batch() -> None:
    small, large = (memory_of_a_step(CHANNELS_LAST, images, small=True)["step_bytes"] for images in (2, 2000))
    # 2000 images of 8 x 8 with 4 channels at 13 BNs and ReLUs, float32.
    assert large - small > 2000 * 8 * 8 * 4 * 4 * 10


def test_steps_with_kept_memory_are_compared_with_the_best_of_pytorch(findings: dict[str, Any]) -> None:
    kept = steps_with_kept_memory(images=2, rounds=1, budget=Budget(), small=True)
    assert list(kept) == list(map(str, TIMED)) and all(timing["median_s"] > 0 for timing in kept.values())
    seconds = dict(zip(map(str, TIMED), (4.0, 2.0, 5.0, 1.0), strict=True))
    kept = {name: {"median_s": each} for name, each in seconds.items()}
    conclusions = step._conclusions(findings | {"kept": kept}, 1.0)["conclusions"]
    assert [conclusions[precision]["kept_times_faster"] for precision in ("float32", "bfloat16")] == [2.0, 4.0]


def test_a_process_of_its_own_keeps_what_it_frees() -> None:
    """It touches few new pages to allocate as much again; by default it touches as many."""
    code = (
        "import resource\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    held = [bytes([i]) * (1 << 22) for i in range(32)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(faults() > 4 * (faults() + 1))"
    )
    for environment, keeps in (({}, "False"), (KEEPING, "True")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.stdout.strip() == keeps


def test_the_parts_of_a_step_are_timed_in_it() -> None:
    trainer = Trainer(CHANNELS_LAST, network(QUICK.setup), *batch(QUICK.setup))
    start = time.perf_counter()
    trainer.step()
    whole = time.perf_counter() - start
    trainer.step([False] * 6)
    (parts,) = trainer.parts
    assert all(part > 0 for part in parts) and 0.5 * whole < sum(parts) < whole
