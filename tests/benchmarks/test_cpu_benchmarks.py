"""The run on a processor rehearsed: the command, its findings, and the refusal of wrong competitors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import pathnet
from benchmarks import results
from benchmarks.cpu import competitors, steps
from benchmarks.cpu.cases import SMALL
from benchmarks.cpu.competitors import BUILDERS, Competitor, Key
from benchmarks.cpu.field import Field
from benchmarks.cpu.report import show
from benchmarks.cpu.run import Run, measure
from benchmarks.outcome import Failed
from pathnet import native
from pathnet.commands.app import app

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

QUICK = replace(SMALL, setup=replace(SMALL.setup, rounds=2, seconds=0.2))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("results")
    return CliRunner().invoke(app, ["bench", "--small", "--json", "--out", str(folder)]), folder


def results_of(ended: Any) -> dict[str, Any]:
    return dict(json.loads(ended[0].stdout))


# A whole run


def test_the_command_measures_everything(ended: Any) -> None:
    assert ended[0].exit_code == 0, ended[0].stderr
    run = results_of(ended)
    assert run["kind"] == "cpu" and run["rehearsal"] and run["failed"] == {}
    assert list(run["found"]) == list(steps.STEPS)
    assert run["facts"]["instruction_set"] in run["facts"]["instruction_sets"]
    assert all(result["passed"] for result in run["found"]["checks"]["float64"].values())
    assert len(run["found"]["checks"]["timed"]) == len(BUILDERS) == 9
    (file,) = run.pop("written")
    assert results.read_cpu(Path(file)) == run and Path(file).parent == ended[1]
    assert "benchmarks: 11/11" in ended[0].stderr


def test_every_figure_is_measured(ended: Any) -> None:
    rows = results_of(ended)["figures"]
    assert len(rows) == 31
    unmeasured = [row["figure"] for row in rows if not row["walks"] and not row["counted"]]
    # A rehearsal measures the memory of two forms, both in float32, and starts no other process.
    kept = "training step, the same if the process keeps freed memory"
    memory = "memory of a training step, share of PyTorch's least, bfloat16"
    assert unmeasured == [f"{kept}, float32", f"{kept}, bfloat16", memory]
    amx = results_of(ended)["facts"]["amx"]
    goals = [30, 80, 4.5, 7, 2.5, 2.5, 0.85, 0.25, 0.25, *(4 * [1.3])]
    goals += [2, *([3] if amx else []), 0.45, 0.45, 1, 1, 0.05, 0.05, *([210] if amx else [])]
    assert [row["goal"] for row in rows if row["goal"]] == goals
    assert all((row["met"] is None) == (row["goal"] is None or row["figure"] in unmeasured) for row in rows)


def test_what_a_rehearsal_finds(ended: Any) -> None:
    findings = results_of(ended)["found"]
    assert {row["part"] for row in findings["lengths"]["rows"]} == {"forward", "walk"}
    assert not [row for row in findings["lengths"]["rows"] if row["name"] == "loop" and row["part"] == "forward"]
    assert findings["peak_share"]["instruction_set"] != "amx"
    assert all(share > 0 for share in findings["peak_share"]["share_of_peak"].values())
    assert [row["paths"] for row in findings["fits"]["paths"]["rows"]] == [6, 12, 18]
    assert all(entry["growth_bytes"] < 64e6 for entry in findings["memory"].values() if isinstance(entry, dict))
    assert findings["deletions"]["eager_forward_passes"] == 7
    sums = findings["sums"]
    assert [(row["bn"], row["batch"], row["share"] > 0 < row["norms_share"]) for row in sums["rows"]] == [
        ("running", 2, 1),
        ("batch", 2, 1),
    ]
    assert len(sums["error"]) == 4 and all(error < 2e-2 for error in sums["error"].values())
    models = findings["models"]
    assert list(models["models"]) == ["GPT", "ViT-Tiny", "ConvNeXt-Tiny"] and len(models["figures"]) == 27
    assert all(figure["wall"] > 0 for figure in models["figures"])
    assert all(
        0 <= error < 1e-4 for model in models["models"].values() for error in model["check"]["errors"].values()
    )
    assert {(row["length"], row["paths"]) for row in findings["sharing"]["rows"]} == {(2, 1), (2, 4), (4, 1), (4, 4)}


def test_memory_of_the_first_forms_is_that_of_processes_of_their_own(ended: Any) -> None:
    findings = results_of(ended)["found"]["training"]
    measured = {row["form"]: row["memory"] for row in findings["forms"] if "memory" in row}
    assert list(measured) == ["torch, channels_last, float32", "pathnet, float32"]
    for memory in measured.values():
        assert memory["bytes"] == memory["kept_bytes"] + memory["step_bytes"] and 0 < memory["bytes"] < 200e6
    shares = findings["conclusions"]
    assert shares["float32"]["memory_share"] == (
        measured["pathnet, float32"]["bytes"] / measured["torch, channels_last, float32"]["bytes"]
    )
    assert "memory_share" not in shares["bfloat16"]


def test_the_tables_show_it(ended: Any) -> None:
    show(results_of(ended), Console(width=130, file=(file := io.StringIO())))
    text = file.getvalue()
    for said in (
        "times faster than the loop, running, float32",
        "at least 30",
        "a rehearsal",
        "R²",
        "growth of",
        "2 of 6 modules drawn",
        "A training step, batch 2",
        "torch, NCHW, bfloat16",
        "exact sums by length, share of n",
        "Medians behind them",
        "ConvNeXt-Tiny",
    ):
        assert said in text
    assert ("this processor has AMX" in text) == results_of(ended)["facts"]["amx"]


def test_results_on_a_processor_are_none_of_a_gpu(ended: Any, tmp_path: Path) -> None:
    (file,) = ended[1].glob("*.json")
    with pytest.raises(ValueError, match="no results of a GPU run"):
        results.read(file)
    results.write(tmp_path / "cpu" / "file.json", results_of(ended))
    assert results.newest(tmp_path) is None
    results.write(tmp_path / "gpu.json", {"began": 1, "kernels": {}, "rehearsal": False, "steps": {}})
    with pytest.raises(ValueError, match="no results of a run on a processor"):
        results.read_cpu(tmp_path / "gpu.json")


def test_results_in_the_repository_are_whole() -> None:
    for file in results.CPU_FOLDER.glob("*.json"):
        recorded = results.read_cpu(file)
        assert not recorded["rehearsal"] and not recorded["failed"]


def test_without_a_checkout_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pathnet.commands.bench.CHECKOUT", tmp_path)
    result = CliRunner().invoke(app, ["bench", "--small"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"pathnet: bench: expected a checkout of pathnet, found no benchmarks in {tmp_path}\n"


# Refusals


def broken(key: Key, change: Callable[[Tensor], Tensor]) -> dict[Key, competitors.Builder]:
    """Return all competitors of a BN mode in float32, one of them wrong."""

    def build(*arguments: Any) -> Competitor:
        competitor = BUILDERS[key](*arguments)
        return replace(competitor, norms=lambda paths: change(competitor.norms(paths)))

    same_mode = {
        other: build for other, build in BUILDERS.items() if (other.bn, other.precision) == (key.bn, "float32")
    }
    return same_mode | {key: build}


WRONG = {"by a percent": lambda norms: norms * 1.01, "nan": lambda norms: norms * float("nan")}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(
    "key", [Key("composition", "batch", "float32"), Key("pathnet", "running", "float32")], ids=str
)
def test_who_is_wrong_is_not_timed(key: Key, change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    run = Run(QUICK, tmp_path, broken(key, change))
    with pytest.raises(Failed, match=f"not timed: {key}, off by"):
        run.perform("checks")
    rows = run.perform("lengths")["rows"]
    assert rows and str(key) not in {f"{row['name']}, {row['bn']}, {row['precision']}" for row in rows}
    title = f"times faster than the composition, {key.bn}, float32"
    (figure,) = [row for row in run.results["figures"] if row["figure"] == title]
    assert figure["walks"] is figure["met"] is None
    recorded = results.read_cpu(run.file)
    assert recorded["failed"]["checks"]["reason"] in (run.wrong or "")


def test_who_is_wrong_only_on_the_timed_network_is_not_timed() -> None:
    key, timed = Key("composition", "running", "float32"), QUICK.setup.batch

    def build(net: Any, images: Tensor, *arguments: Any) -> Competitor:
        competitor = BUILDERS[key](net, images, *arguments)
        factor = 1.1 if len(images) == timed else 1
        return replace(competitor, norms=lambda paths: competitor.norms(paths) * factor)

    field = Field(QUICK, {Key("loop", "running", "float32"): competitors.loop, key: build})
    assert list(field.competitors) == [Key("loop", "running", "float32")]
    assert "on the network that is timed" in field.refused[str(key)]


def test_a_step_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: Field) -> Any:
        raise Failed("wrong", {"by": 3})

    monkeypatch.setitem(steps.STEPS, "sweep", fails)
    run = measure(QUICK, tmp_path, steps=["sweep", "deletions"])
    assert list(run.results["found"]) == ["checks", "deletions"]
    assert run.results["failed"] == {"sweep": {"reason": "wrong", "found": {"by": 3}}}
    assert run.wrong == "sweep: wrong"


def one_off(self: pathnet.Tape, scaled: bool = False) -> Any:
    """Return the sums with those of lengths 1 and 2 exchanged."""
    sums = by_length(self, scaled)
    return sums if scaled else sums[[0, 2, 1, *range(3, len(sums))]]


by_length = pathnet.Tape.gradient_by_length


def test_sums_of_other_lengths_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(QUICK, tmp_path)
    monkeypatch.setattr(pathnet.Tape, "gradient_by_length", one_off)
    with pytest.raises(Failed, match=r"sums by length, running, float32, are off by [0-9.e+-]+, hence not timed"):
        run.perform("sums")
    assert run.results["failed"]["sums"]["found"]["rows"] == []
