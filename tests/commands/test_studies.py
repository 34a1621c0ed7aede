"""All of the paper, and one experiment at a time, on networks of a few steps of training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from helpers.command_line import TINY, Ended, pathnet_

from pathnet import results
from pathnet.commands.app import app
from pathnet.paper import EXPERIMENTS
from pathnet.study import PRESETS

FIGURES = {
    "unraveled": ["figure-1", "figure-2"],
    "lesion-single": ["figure-3"],
    "lesion-many": ["figure-5a"],
    "lesion-reorder": ["figure-5b"],
    "path-gradients": ["figure-6", "exact-sums"],
    "effective-training": ["effective-training"],
    "remaining-paths": ["figure-7"],
    "lesion-stochastic-depth": ["figure-8"],
    "highway": ["highway"],
}


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A study's folder, and what the command that made it printed."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    ended = pathnet_("figures", "--all", "--out", folder, *TINY)
    assert ended.status == 0, ended.err
    return folder, ended


def counted(said: list[dict[str, str]]) -> str:
    """Return the line that counts the verdicts on claims."""
    verdicts = [claim["verdict"] for claim in said]
    number = {verdict: verdicts.count(verdict) for verdict in ("held", "did not hold", "open")}
    open_ones = "1 is open" if number["open"] == 1 else f"{number['open']} are open"
    return f"of {len(said)} claims, {number['held']} held, {number['did not hold']} did not hold and {open_ones}"


def written(folder: Path, name: str) -> list[str]:
    return [str(folder / name / "figures" / f"{stem}.{end}") for stem in FIGURES[name] for end in ("png", "svg")]


def test_figures_all_trains_measures_and_writes_the_report(studied: tuple[Path, Ended]) -> None:
    folder, ended = studied
    lines = ended.out.splitlines()
    assert lines[-2:] == [str(folder), str(folder / "report.html")]
    said = [claim for name in EXPERIMENTS for claim in results.read(folder / name).facts["results"]["claims"]]
    assert lines[-3] == counted(said)
    page = (folder / "report.html").read_text()
    assert "<h1>All of the paper on digits</h1>" in page and page.count("<img ") == 11
    for name in EXPERIMENTS:
        assert (
            all(Path(file).is_file() for file in written(folder, name)) and f'<h2 id="{name}-{name}">{name}:' in page
        )
    kinds = ("residual", "stochastic-depth", "effective", "vgg", "highway")
    assert {file.name for file in (folder / "networks").iterdir()} == {f"{kind}-0.safetensors" for kind in kinds}
    assert "training effective 1/1: 3/3" in ended.err and "lesion-many: " in ended.err


def test_figures_all_again_measures_nothing_and_says_the_same(studied: tuple[Path, Ended]) -> None:
    folder, ended = studied
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}
    again = pathnet_("figures", "--all", "--out", folder, *TINY, "--json")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")} == before
    assert "training" not in again.err and "lesion" not in again.err
    facts = json.loads(again.out)
    assert facts["written"] == [str(folder / "report.html")]
    assert counted(facts["claims"]) in ended.out


def test_what_was_given_is_in_the_runs(studied: tuple[Path, Ended]) -> None:
    folder, _ = studied
    many, gates = results.read(folder / "lesion-many"), results.read(folder / "highway")
    assert {name: many.identity[name] for name in ("images", "bn", "plan_seed")} == {
        "images": 50,
        "bn": "running",
        "plan_seed": 7,
    }
    assert (many.facts["draws"], many.facts["deletions"]) == (1, 2)
    assert (gates.facts["gate_batches"], gates.identity["batch_size"]) == (1, 16)
    assert results.read(folder / "lesion-reorder").facts["swaps"] == 2
    assert results.read(folder / "path-gradients").facts["batches"] == 1
    assert results.read(folder / "path-gradients").identity["seed"] == 7
    effective = results.read(folder / "effective-training")
    recipes = effective.facts["results"]["recipes"]
    expected = dataclasses.asdict(
        dataclasses.replace(
            PRESETS["digits"].recipe, epochs=1, batch_size=400, warmup_steps=1, learning_rate=0.01, seed=3
        )
    )
    assert recipes == {"residual": expected, "effective": {**expected, "modules": 2}}
    (net,) = effective.identity["networks"]["effective"]
    assert (net["config"]["depth"], net["config"]["width"], net["blocks"]) == (14, 2, 6)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_prints_its_claims_and_what_it_wrote(studied: tuple[Path, Ended], name: str) -> None:
    folder, _ = studied
    for file in (folder / name / "figures").iterdir():
        file.unlink()
    ended = pathnet_(name, "--out", folder, *TINY)
    assert ended.status == 0 and name not in ended.err, "all of it is there"
    lines = ended.out.splitlines()
    assert lines[-1 - len(written(folder, name)) :] == [str(folder / name), *written(folder, name)]
    assert all(Path(file).is_file() for file in written(folder, name))
    run = results.read(folder / name)
    words = " ".join(ended.out.split())
    claims = run.facts["results"]["claims"]
    assert claims and sum(map(words.count, ("held ", "did not hold", "open"))) >= len(claims)
    assert all(claim["measured"].split()[0] in words and f"{claim['paper'].split()[0]} " in words for claim in claims)
    facts = json.loads(pathnet_("figures", folder / name, "--json").out)
    assert facts["written"] == written(folder, name)
    assert facts["out"] == facts["run"] == str(folder / name) and facts["claims"] == claims


def test_an_experiment_trains_what_it_needs_on_any_data(tmp_path: Path) -> None:
    flags = ["--data", "synthetic", "--depth", 14, "--width", 1, "--seeds", 2, "--epochs", 1, "--batch-size", 256]
    small = ["--draws", 1, "--deletions", 1, "--images", 8, "--bn", "batch"]
    ended = pathnet_("lesion-many", "--out", tmp_path, *flags, *small)
    assert ended.status == 0 and "training residual 2/2: 2/2" in ended.err
    assert {file.name for file in tmp_path.iterdir()} == {"networks", "lesion-many"}
    assert ended.out.splitlines()[0] == "synthetic; residual, depth 14, width 1, 6 blocks, 2 seeds"
    assert results.read(tmp_path / "lesion-many").identity["bn"] == "batch"
    assert pathnet_("figures", tmp_path / "lesion-many").out == ended.out
    (line,) = pathnet_("path-gradients", "--out", tmp_path, *flags, "--batches", 1, "--json").out.splitlines()
    facts = json.loads(line)
    assert [run["n"] for run in facts["runs"]] == [6, 6] and len(facts["written"]) == 8
    assert [run["out"] for run in facts["runs"]] == [
        str(tmp_path / folder) for folder in ("path-gradients", "path-gradients/seed-1")
    ]


def test_folders_are_named_by_the_preset_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pathnet_("remaining-paths").out.splitlines()[-3:] == [
        "runs/digits/remaining-paths",
        "runs/digits/remaining-paths/figures/figure-7.png",
        "runs/digits/remaining-paths/figures/figure-7.svg",
    ]


@pytest.mark.parametrize("both", [False, True])
def test_figures_takes_a_run_or_all(studied: tuple[Path, Ended], both: bool) -> None:
    ended = pathnet_("figures", *([studied[0] / "unraveled", "--all"] if both else []))
    assert ended.status == 2 and ended.out == ""
    message = f"run: expected a run's folder or --all, got {'both' if both else 'neither'}"
    assert message in " ".join(ended.err.replace("│", "").split())


def test_a_study_of_other_networks_is_not_mixed_up(studied: tuple[Path, Ended], residual: Path) -> None:
    folder, _ = studied
    ended = pathnet_("lesion-many", "--out", folder, *TINY, "--epochs", 2)
    assert ended.status == 1 and "residual-0.safetensors is of another recipe" in ended.err.splitlines()[-1]
    ended = pathnet_("lesion-many", "--out", folder, *TINY, "--weights", residual)
    assert ended.status == 1 and "holds another run (networks.residual: expected" in ended.err.splitlines()[-1]


# One entry an experiment


def test_an_entry_has_the_name_that_its_runs_record(studied: tuple[Path, Ended]) -> None:
    folder, _ = studied
    for name in EXPERIMENTS:
        assert results.read(folder / name).experiment == name


OTHER_VALUES = {"--survival": 0.9, "--gate-bias": -4.0, "--bn": "batch", "--undrawn": "zero", "--momentum": 0.5}
OTHER_VALUES |= {"--schedule": "one-cycle", "--flips": "alternating", "--label-smoothing": 0.1}


def other_value(flag: str) -> list[object]:
    """The words that set a flag to something other than the study's value."""
    if flag in ("--augment", "--bfloat16"):
        return [flag.replace("--augment", "--no-augment")]
    return [flag, OTHER_VALUES.get(flag, 13)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_that_the_help_leaves_out_change_nothing(studied: tuple[Path, Ended], name: str) -> None:
    folder, _ = studied
    options = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    hidden = [option for option in options if option.hidden and option.name not in ("weights", "folder")]
    assert len(hidden) >= 8
    changes = [word for option in hidden for word in other_value(option.opts[0])]
    ended = pathnet_(name, "--out", folder, *TINY, *changes)
    assert ended.status == 0 and name not in ended.err, "all of it is there"
    assert ended.out == pathnet_(name, "--out", folder, *TINY).out
