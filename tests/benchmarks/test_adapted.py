"""The timed models and what competes on them: the mathematics, the checks, the figures, the cuts."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import pathnet
from benchmarks.adapted import memory, step
from benchmarks.adapted.__main__ import main
from benchmarks.adapted.cases import FULL, NAMES, ON_GPU, SMALL, Case, structure
from benchmarks.adapted.measuring import PARTS, measure
from benchmarks.adapted.report import GOALS, figures, tables
from benchmarks.adapted.rivals import KeptGraphs, detach_loop, sums_along
from benchmarks.adapted.subject import Subject
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.outcome import Failed
from benchmarks.processes import Done

each_case = pytest.mark.parametrize("case", SMALL.cases, ids=NAMES)


def doubled(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    inputs, target = case.batch()
    return case.model().double(), inputs.double() if inputs.is_floating_point() else inputs, target


def ordinary_gradient(model: Any, inputs: Tensor, target: Tensor) -> Tensor:
    """Return the gradient at the input of the first block, by a hook on the model itself."""
    seen: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(arguments[0].requires_grad_())
        return (seen[0],)

    first = model.stages[0][0] if hasattr(model, "stages") else model.layers[0]
    with first.register_forward_pre_hook(enter):
        output = model(inputs)
    return torch.autograd.grad(F.cross_entropy(output.flatten(0, -2), target.flatten()), seen[0])[0]


# The competitors


@each_case
def test_the_paths_of_all_competitors_add_up_to_the_ordinary_gradient(case: Case) -> None:
    model, inputs, target = doubled(case)
    parts = structure(model)
    kept, paths = KeptGraphs(parts, inputs, target), list(itertools.product((0, 1), repeat=len(parts.modules)))
    gradients = torch.stack([kept.gradient(path) for path in paths])
    torch.testing.assert_close(gradients.sum(0), ordinary_gradient(model, inputs, target))
    torch.testing.assert_close(gradients, torch.stack([detach_loop(parts, inputs, target, path) for path in paths]))
    torch.testing.assert_close(kept.norms(torch.tensor(paths)), gradients.flatten(1).norm(dim=1))
    for point in (-1.0, 0.5):
        weighted = sum(point ** sum(path) * gradient for path, gradient in zip(paths, gradients, strict=True))
        torch.testing.assert_close(sums_along(parts, inputs, target, point), weighted)


@each_case
def test_the_sums_take_as_many_modules_as_their_formula(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptGraphs(structure(case.model()), *case.batch())
    visited: list[Tensor] = []
    monkeypatch.setattr(torch.autograd, "grad", lambda output, *_, **__: visited.append(output))
    kept.sums()
    n = len(kept.graphs)
    assert len(visited) == n * (n + 1) // 2
    assert [sum(output is residual for output in visited) for _, _, residual in kept.graphs] == list(range(n, 0, -1))


def test_another_model_has_no_structure() -> None:
    with pytest.raises(ValueError, match="timed models, got Linear"):
        structure(nn.Linear(2, 2))


# The sizes


def test_the_models_are_those_of_the_goals() -> None:
    gpt, vit, convnext = (case.model() for case in FULL.cases)
    assert [len(structure(model).modules) for model in (gpt, vit, convnext)] == [24, 24, 18]
    assert [round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for m in (gpt, vit, convnext)] == [10.0, 5.7, 28.6]
    assert [list(case.batch()[0].shape) for case in FULL.cases] == [[4, 64], [2, 3, 224, 224], [1, 3, 224, 224]]
    assert FULL.paths == (100, 1000) and [GOALS[name][2] for name in ("few", "many", "single")] == [1.3, 1.5, 0.95]
    assert len({case.name for case in ON_GPU.cases}) == 6


# The checks before all timings


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(SMALL.cases[0], "auto")


def test_what_is_right_passes_the_check(subject: Subject) -> None:
    errors = subject.check()["errors"]
    assert len(errors) == 7 and all(0 <= error < 1e-5 for error in errors.values())


def wrong(work: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    return lambda *arguments, **options: factor * work(*arguments, **options)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize(
    ("owner", "method", "named"),
    [
        (KeptGraphs, "gradient", "fifteen lines"),
        (KeptGraphs, "norms", "norms of the fifteen lines"),
        (Subject, "loop", "norms of the loop"),
        (pathnet.Tape, "path_gradients", "pathnet, a call a path"),
        (pathnet.Tape, "path_gradient_norms", "norms of pathnet"),
        (pathnet.Tape, "gradient_by_length", "sums by length"),
    ],
)
def test_what_is_wrong_is_not_timed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, named: str, factor: float
) -> None:
    monkeypatch.setattr(owner, method, wrong(getattr(owner, method), factor))
    with pytest.raises(Failed, match=f"GPT: wrong, hence not timed: .*{named} by"):
        subject.check()


def test_a_wrong_model_leaves_the_findings_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Subject.check

    def failing(subject: Subject) -> Any:
        return check(subject) if subject.case.name == "GPT" else (_ for _ in ()).throw(Failed("wrong", {"by": 3}))

    monkeypatch.setattr(Subject, "check", failing)
    with pytest.raises(Failed, match="wrong") as failed:
        step.models(SMALL, "auto", Budget(), lambda *_: {})
    assert list(failed.value.findings) == ["models", "ViT-Tiny"]
    assert list(failed.value.findings["models"]) == ["GPT"] and failed.value.findings["ViT-Tiny"] == {"by": 3}


# The timings, and what is cut


def test_all_is_measured(subject: Subject) -> None:
    findings = measure(subject, SMALL, budget := Budget())
    assert budget.cuts == [] and list(PARTS) == [name for name in findings if name in PARTS]
    assert [entry["paths"] for entry in findings["visits"]] == [6, 20] and findings["blocks"] == 4
    for clock in ("wall", "processor"):
        assert findings["ratios"][clock].keys() == {"first", "few", "many", "single", "loop", "sums", "record"}
        assert all(ratio > 0 for ratio in findings["ratios"][clock].values())
    assert {timing["rounds"] for timing in findings["few"].values()} == {2}


def test_what_does_not_fit_is_cut_and_told(subject: Subject) -> None:
    findings = measure(subject, SMALL, budget := Budget(-1.0))
    assert not findings.keys() & PARTS.keys() and findings["ratios"] == {"wall": {}, "processor": {}}
    assert [cut["what"] for cut in budget.cuts if cut["kept"] is None] == [f"GPT, {name}" for name in PARTS]
    judged = figures({"GPT": findings})
    assert [figure["met"] for figure in judged if figure["figure"] != GOALS["adapt"][0]] == [None] * 8


def test_a_short_time_leaves_single_rounds(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of 3 s, one of which warms up, need 9 s; a single one 3 s."""
    monkeypatch.setattr("benchmarks.adapted.measuring._expected_s", lambda *_: 3.0)
    for seconds, rounds in ((10.0, 2), (5.0, 1)):
        # A clock that hardly moves, so that each part has its whole share.
        remaining = sum(PARTS.values()) - PARTS["first"]
        budget = Budget(seconds * remaining / PARTS["few"], itertools.count(0.0, 1e-6).__next__)
        findings = measure(subject, replace(SMALL, rounds=2), budget)
        assert findings["few"]["pathnet"]["rounds"] == rounds
        cut = {"what": "rounds of GPT, few", "wanted": 2, "kept": 1, "because": "one takes some 3 s"}
        assert any(cut.items() <= entry.items() for entry in budget.cuts) == (rounds == 1)


def by_hand(device: str = "cpu") -> dict[str, Any]:
    """Return findings whose ratios are round numbers, and others by processor seconds."""

    def both(wall: float, processor: float) -> dict[str, float]:
        return {"median_s": wall, "median_processor_s": processor}

    return {
        "blocks": 2,
        "engine": "auto",
        "device": device,
        "input": [1, 2],
        "adapt_s": [9.0, 2.0],
        "adapt_processor_s": [9.0, 4.0],
        "visits": [{"paths": 10, "modules": 50, "shared": 40}, {"paths": 100, "modules": 600, "shared": 300}],
        "first": {"fifteen lines": both(1, 1), "pathnet": both(2, 4)},
        "few": {"fifteen lines": both(3, 1), "pathnet": both(2, 1)},
        "many": {
            "fifteen lines, before": both(2, 2),
            "pathnet": both(12, 24),
            "fifteen lines, after": both(4, 4),
        },
        "single": {"fifteen lines": both(1, 1), "pathnet": both(1, 2), "loop": both(1, 1)},
        "sums": {"module VJPs": both(1, 1), "pathnet": both(1, 2)},
        "record": {"forward": both(1, 1), "pathnet": both(1, 2)},
        "memory": {"10": {"growth_bytes": 20_000_000}, "100": {"growth_bytes": 40_000_000}},
    }


def test_ratios_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.adapted.measuring import _ratios

    findings = by_hand()
    ratios = _ratios(findings, SMALL)
    # 600 modules take the fifteen lines 12 times as long as 50; the loop runs half as many paths as there are calls.
    assert (ratios["wall"].pop("first"), ratios["processor"].pop("first")) == (0.5, 0.25)
    assert ratios["wall"] == {"few": 1.5, "many": 3.0, "single": 1.0, "loop": 2.0, "sums": 1.0, "record": 1.0}
    assert ratios["processor"] == {"few": 1.0, "many": 1.5, "single": 0.5, "loop": 1.0, "sums": 2.0, "record": 2.0}
    for device, met in (("cpu", [False, None, True, False, None, False, False, False, False]), ("cuda", None)):
        judged = figures({"GPT": {**by_hand(device), "ratios": ratios}})
        expected = met or [True, None, True, True, None, True, True, False, True]
        assert [figure["met"] for figure in judged] == expected


def test_the_tables_show_it() -> None:
    findings: dict[str, Any] = {"GPT": {**by_hand(), "ratios": {"wall": {"few": 1.5}, "processor": {"few": 1.25}}}}
    console = Console(width=150, file=(file := io.StringIO()))
    console.print(*tables({"models": findings, "figures": figures(findings)}))
    text = file.getvalue()
    for said in ("1.5 (1.25), NOT met", "10 random paths", "at least 1.3", "40 of 50; 300 of 600", "20.0 (10)"):
        assert said in text


# Memory


def test_growth_is_that_above_the_tape() -> None:
    held: list[bytearray] = []

    def norms(paths: Tensor) -> None:
        held.append(bytearray(b"x") * (len(paths) << 20))

    subject: Any = SimpleNamespace(
        device=torch.device("cpu"),
        paths=lambda count: torch.zeros(count, 1),
        tape=SimpleNamespace(path_gradient_norms=norms),
    )
    growth = memory.growth(subject, (8, 64))
    # The second number of paths counts from the same baseline, on top of what the first one keeps.
    assert 6 << 20 < growth["8"]["growth_bytes"] < 24 << 20
    assert 64 << 20 < growth["64"]["growth_bytes"] < 96 << 20


@pytest.mark.parametrize(("done", "raised"), [(Done(None, ""), LeftOut), (Done(1, "no memory"), Failed)])
def test_a_process_that_ends_badly(monkeypatch: pytest.MonkeyPatch, done: Done, raised: type[Exception]) -> None:
    monkeypatch.setattr(memory, "execute", lambda command, limit: done)
    with pytest.raises(raised):
        memory.growth_alone("GPT", SMALL, "auto", True, Budget(60.0))
    with pytest.raises(LeftOut):
        memory.growth_alone("GPT", SMALL, "auto", True, Budget(-1.0))


def test_the_command_of_the_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    grown = {str(count): {"growth_bytes": 0, "seconds": 0.0} for count in (1, *SMALL.paths)}
    monkeypatch.setattr("benchmarks.adapted.__main__.growth_alone", lambda *_, **__: grown)
    threads = torch.get_num_threads()
    try:
        assert main(["--small", "ConvNeXt-Tiny"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "ConvNeXt-Tiny" in printed and "GPT" not in printed and "module VJPs" in printed
    with pytest.raises(SystemExit):
        main(["ResNet"])
