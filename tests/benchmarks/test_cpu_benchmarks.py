"""The benchmarks on a processor rehearsed: a whole run, ratios from findings, refusals of the wrong, the command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import pathnet
from pathnet import cli, native
from pathnet.models import ResidualNet

sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from benchmarks.baselines import Convolution  # noqa: E402
from benchmarks.cases import batch, network  # noqa: E402
from benchmarks.cpu import competitors, figures, fitting, steps  # noqa: E402
from benchmarks.cpu.cases import FULL, SMALL  # noqa: E402
from benchmarks.cpu.competitors import BUILDERS, Competitor, Key  # noqa: E402
from benchmarks.cpu.facts import processor_facts  # noqa: E402
from benchmarks.cpu.field import Field  # noqa: E402
from benchmarks.cpu.peaks import Peaks, matrix_product  # noqa: E402
from benchmarks.cpu.report import show  # noqa: E402
from benchmarks.cpu.run import Run, measure  # noqa: E402
from benchmarks.cpu.ways import Kept, compiled_normalize, fastest, normalize, ways  # noqa: E402
from benchmarks.outcome import Failed  # noqa: E402

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

QUICK = replace(SMALL, setup=replace(SMALL.setup, rounds=2, seconds=0.2))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("results")
    return CliRunner().invoke(cli.app, ["bench", "--small", "--json", "--out", str(folder)]), folder


def found_by(ended: Any) -> dict[str, Any]:
    return dict(json.loads(ended[0].stdout))


# A whole run


def test_the_command_measures_everything(ended: Any) -> None:
    assert ended[0].exit_code == 0, ended[0].stderr
    found = found_by(ended)
    assert found["kind"] == "cpu" and found["rehearsal"] and found["failed"] == {}
    assert list(found["found"]) == list(steps.STEPS)
    assert found["facts"]["instruction_set"] in found["facts"]["instruction_sets"]
    assert all(own["passed"] for own in found["found"]["checks"]["float64"].values())
    assert len(found["found"]["checks"]["timed"]) == len(BUILDERS) == 9
    (file,) = found.pop("written")
    assert results.read_cpu(Path(file)) == found and Path(file).parent == ended[1]
    assert "benchmarks: 10/10" in ended[0].stderr


def test_every_figure_is_measured(ended: Any) -> None:
    rows = found_by(ended)["figures"]
    assert len(rows) == 20 and all(own["walks"] or own["counted"] for own in rows)
    goals = [30, 80, 4.5, 7, 2.5, 2.5, 0.85, 0.25, 0.25, *(4 * [1.3]), 0.5]
    assert [own["goal"] for own in rows if own["goal"]] == goals
    assert all((own["met"] is None) == (own["goal"] is None) for own in rows)


def test_what_a_rehearsal_finds(ended: Any) -> None:
    found = found_by(ended)["found"]
    assert {row["part"] for row in found["lengths"]["rows"]} == {"forward", "walk"}
    assert not [row for row in found["lengths"]["rows"] if row["name"] == "loop" and row["part"] == "forward"]
    assert found["peak_share"]["instruction_set"] != "amx"
    assert all(share > 0 for share in found["peak_share"]["share_of_peak"].values())
    assert [row["paths"] for row in found["fits"]["paths"]["rows"]] == [6, 12, 18]
    assert all(own["growth_bytes"] < 64e6 for own in found["memory"].values() if isinstance(own, dict))
    assert found["deletions"]["eager_forward_passes"] == 7
    sums = found["sums"]
    assert [(row["bn"], row["batch"], row["share"] > 0 < row["norms_share"]) for row in sums["rows"]] == [
        ("running", 2, 1),
        ("batch", 2, 1),
    ]
    assert len(sums["error"]) == 4 and all(error < 2e-2 for error in sums["error"].values())
    training = found["training"]
    assert (training["drawn"], training["modules"]) == (2, 6) and 0 <= training["error"] < 1e-10
    assert training["share"] > 0 and {own["rounds"] for own in training["timings"].values()} == {2}
    assert {(row["length"], row["paths"]) for row in found["sharing"]["rows"]} == {(2, 1), (2, 4), (4, 1), (4, 4)}


def test_the_tables_show_it(ended: Any) -> None:
    show(found_by(ended), Console(width=130, file=(file := io.StringIO())))
    text = file.getvalue()
    for said in (
        "times faster than the loop, running, float32",
        "at least 30",
        "a rehearsal",
        "R²",
        "growth of",
        "2 of 6 modules drawn",
        "a training step",
    ):
        assert said in text
    assert ("this processor has AMX" in text) == found_by(ended)["facts"]["amx"]


def test_results_on_a_processor_are_none_of_a_gpu(ended: Any, tmp_path: Path) -> None:
    (file,) = ended[1].glob("*.json")
    with pytest.raises(ValueError, match="no results of a GPU run"):
        results.read(file)
    results.write(tmp_path / "cpu" / "file.json", found_by(ended))
    assert results.newest(tmp_path) is None
    results.write(tmp_path / "gpu.json", {"began": 1, "kernels": {}, "rehearsal": False, "steps": {}})
    with pytest.raises(ValueError, match="no results of a run on a processor"):
        results.read_cpu(tmp_path / "gpu.json")


def test_results_in_the_repository_are_whole() -> None:
    for file in results.CPU_FOLDER.glob("*.json"):
        found = results.read_cpu(file)
        assert not found["rehearsal"] and not found["failed"]


def test_without_a_checkout_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    result = CliRunner().invoke(cli.app, ["bench", "--small"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"pathnet: bench: expected a checkout of pathnet, found no benchmarks in {tmp_path}\n"


# Refusals


def broken(key: Key, change: Callable[[Tensor], Tensor]) -> dict[Key, competitors.Builder]:
    """Everyone of the same BN mode in float32, one of them wrong."""

    def build(*arguments: Any) -> Competitor:
        own = BUILDERS[key](*arguments)
        return replace(own, norms=lambda paths: change(own.norms(paths)))

    field = {own: build for own, build in BUILDERS.items() if (own.bn, own.precision) == (key.bn, "float32")}
    return field | {key: build}


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
    (figure,) = [own for own in run.results["figures"] if own["figure"] == title]
    assert figure["walks"] is figure["met"] is None
    found = results.read_cpu(run.file)
    assert found["failed"]["checks"]["reason"] in (run.wrong or "")


def test_who_is_wrong_only_on_the_timed_network_is_not_timed() -> None:
    key, timed = Key("composition", "running", "float32"), QUICK.setup.batch

    def build(net: Any, images: Tensor, *arguments: Any) -> Competitor:
        own = BUILDERS[key](net, images, *arguments)
        return replace(own, norms=lambda paths: own.norms(paths) * (1.1 if len(images) == timed else 1))

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


def left_in(self: ResidualNet, x: Tensor, drawn: Any = None) -> Tensor:
    """A module more than is drawn."""
    drawn = drawn if drawn is None else [True, *drawn[1:]]
    return forward(self, x, drawn)


def computed(self: ResidualNet, x: Tensor, drawn: Any = None) -> Tensor:
    """What is not drawn has gradients of zero in place of none."""
    y = self.stem(x)
    for i, block in enumerate(self):
        skip, residual = block.branches(y)
        y = skip + (1.0 if drawn is None or drawn[i] else 0.0) * residual
    return self.head(y)


def not_a_number(self: ResidualNet, x: Tensor, drawn: Any = None) -> Tensor:
    return forward(self, x, drawn) * float("nan")


forward = ResidualNet.forward


@pytest.mark.parametrize("wrong", [left_in, computed, not_a_number])
def test_a_training_step_with_other_gradients_is_not_timed(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Run(QUICK, tmp_path)
    monkeypatch.setattr(ResidualNet, "forward", wrong)
    with pytest.raises(Failed, match="gradients with modules drawn are off by (inf|nan|[0-9.e+-]+), hence not timed"):
        run.perform("training")
    assert "timings" not in run.results["failed"]["training"]["found"]
    assert results.read_cpu(run.file)["figures"][-1]["counted"] is None


def one_off(self: pathnet.Tape, scaled: bool = False) -> Any:
    """The sums, those of lengths 1 and 2 exchanged."""
    made = by_length(self, scaled)
    return made if scaled else made[[0, 2, 1, *range(3, len(made))]]


by_length = pathnet.Tape.gradient_by_length


def test_sums_of_other_lengths_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(QUICK, tmp_path)
    monkeypatch.setattr(pathnet.Tape, "gradient_by_length", one_off)
    with pytest.raises(Failed, match=r"sums by length, running, float32, are off by [0-9.e+-]+, hence not timed"):
        run.perform("sums")
    assert run.results["failed"]["sums"]["found"]["rows"] == []


# Arithmetic


def row(name: str, precision: str, part: str, length: int | None, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "bn": "running",
        "precision": precision,
        "part": part,
        "length": length,
        "median_s": seconds,
    }


def test_ratios_by_hand() -> None:
    """Four blocks; the loop takes 10 s a path, the composition 2 s a module, we 1 s a module and 8 s forward."""
    rows = [row("loop", "float32", "walk", length, 10.0) for length in (1, 4)]
    rows += [row("composition", "float32", "walk", length, 2.0 * length) for length in (1, 4)]
    rows += [row("pathnet", "float32", "walk", length, 1.0 * length) for length in (1, 4)]
    rows += [row("composition", "float32", "forward", None, 20.0), row("pathnet", "float32", "forward", None, 8.0)]
    sweep = {"rows": [{"bn": "running", "precision": "float32", "median_s": 5.0}]}
    found = {
        "lengths": {"rows": rows, "blocks": 4},
        "sweep": sweep,
        "deletions": {"share_of_eager": {"float32": 0.3}},
        "sums": {
            "rows": [
                {
                    "bn": "running",
                    "precision": "float32",
                    "batch": 32,
                    "share": 0.9,
                    "timings": {"sums": {"median_s": 0.6}},
                }
            ]
        },
        "training": {"share": 0.48, "drawn": 23, "modules": 54},
    }
    own = {figure["figure"]: figure for figure in figures.figures(found)}
    loop = own["times faster than the loop, running, float32"]
    assert (loop["walks"], loop["counted"], loop["met"]) == (10 / 2.5, 10 / (2.5 + 8 / 4), False)
    composition = own["times faster than the composition, running, float32"]
    assert (composition["walks"], composition["counted"]) == (2.0, (5 + 20 / 4) / (2.5 + 8 / 4))
    together = own["times faster than the composition, running, float32, one call"]
    assert (together["walks"], together["counted"]) == (5 / 1.25, (5 + 20 / 4) / (1.25 + 8 / 4))
    assert own["deletions, share of eager forward passes, float32"]["met"] is False
    assert own["training step with 23 of 54 modules drawn, share of a whole one, float32"]["met"] is True
    share = "exact sums by length, share of as many modules one by one, running, float32, 32 images"
    assert (own[share]["walks"], own[share]["met"]) == (0.9, True)
    assert own["exact sums by length, seconds, running, float32, 32 images"]["met"] is False
    assert own["times faster than the loop, running, bfloat16"]["met"] is None
    assert figures.lines_by_length(found)["composition, running, float32"]["slope"] == pytest.approx(2)


def test_lines_and_means() -> None:
    line = fitting.straight_line([1, 2, 3], [5.0, 7.0, 9.0])
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((2, 3, 1))
    assert fitting.straight_line([1, 2, 3], [1.0, 2.0, 1.0]).r_squared == pytest.approx(0)
    assert fitting.straight_line([1, 2, 3], [2.0, 2.0, 2.0]).r_squared == 1
    # A kink at length 2, as of caches.
    assert fitting.mean_over_lengths([1, 2, 4], [1.0, 2.0, 8.0], 4) == pytest.approx(np.mean([1, 2, 5, 8]))


def test_equal_tails_are_walked_once() -> None:
    paths = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 0, 1]])
    assert fitting.modules_walked(paths) == (2 + 3 + 1 + 2, 1 + 1 + 2)


def test_the_sizes_are_those_of_the_goals() -> None:
    setup = FULL.setup
    assert (setup.depth, setup.width, setup.batch, setup.side) == (110, 16, 128, 32)
    assert setup.lengths[0] == 1 and setup.lengths[-1] == 54
    assert FULL.drawn == 23 and figures.TRAINING_SHARE == 0.5


# Baselines


@pytest.mark.parametrize("stride", [1, 2])
def test_all_ways_back_are_one(stride: int) -> None:
    """Also those that are not the fastest here."""
    generator = torch.Generator().manual_seed(stride)

    def random(*shape: int) -> Tensor:
        images = torch.randn(shape, generator=generator, requires_grad=len(shape) == 4)
        return images.to(memory_format=torch.channels_last) if len(shape) == 4 else images

    x, weight, gamma, beta = random(3, 5, 8, 8), random(6, 5, 3, 3).detach(), random(5).abs(), random(5)
    out = torch.nn.functional.batch_norm(x, None, None, gamma, beta, True, 0, 1e-5)
    y = torch.nn.functional.conv2d(out.relu(), weight, None, stride, 1)
    grad = torch.randn(y.shape, generator=generator).to(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(y, x, grad)
    normalized, _, inverse = torch.native_batch_norm(x.detach(), None, None, None, None, True, 0.0, 1e-5)
    kept = Kept((out > 0).float(), normalized.contiguous(memory_format=torch.channels_last), gamma * inverse)
    found = ways(Convolution(weight, stride, 1, (5, 8, 8)), True, normalize_masked)
    assert len(found) >= 6
    for way in found.values():
        torch.testing.assert_close(way(grad, kept), expected, rtol=1e-4, atol=1e-5)


def normalize_masked(grad: Tensor, kept: Kept) -> Tensor:
    """Stands for the compiled form, which takes seconds to compile."""
    return normalize(grad * kept.mask, kept)


def test_what_is_refused_is_not_the_fastest() -> None:
    def refuses() -> None:
        raise RuntimeError("not on this processor")

    assert fastest({"refuses": refuses, "slow": lambda: torch.randn(1 << 16), "quick": lambda: None}) == "quick"


def test_the_compositions_slices_are_the_batch() -> None:
    setup = replace(SMALL.checked, batch=5)
    net, (images, labels) = network(setup), batch(setup)
    composition = competitors.Composition(net, images, labels, "running", torch.float32)
    path, code = [1, 0] * 3, pathnet.paths.sample(net.n, 2, 1)[0].tolist()
    for samples in (5, 2, 1):
        composition.samples = samples
        assert len(composition.walk(path)) == -(-5 // samples)
        whole = torch.cat(composition.walk(code))
        torch.testing.assert_close(composition.norm(code), whole.norm())
        torch.testing.assert_close(
            whole, competitors.loop(net, images, labels, False).gradients(torch.tensor([code]))[0]
        )


# The machine


def test_peaks() -> None:
    peaks, product = Peaks.compile(), matrix_product(torch.float32, 0.02)
    assert product > 0
    if peaks.fma is None:
        assert peaks.why_not
    else:
        assert peaks.fma(0.02) > 1e9


def test_without_a_compiler_there_is_no_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Peaks.compile().why_not == "no C++ compiler"


def test_facts_name_no_place() -> None:
    text = json.dumps(processor_facts())
    assert "/" not in text.replace("+cpu", "") and processor_facts()["cores_usable"]


def test_torch_compile_takes_part_in_full_runs_only() -> None:
    assert FULL.compiled and not SMALL.compiled and callable(compiled_normalize)
