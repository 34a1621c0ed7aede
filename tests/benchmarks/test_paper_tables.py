"""Tables of the paper's claims, and the results files behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scipy
import torch
from helpers.runs import one_of_each, write_run

import pathnet
from benchmarks import paper, results
from benchmarks.tables import paper as paper_tables
from benchmarks.tables import paths
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a run of every experiment, as a file holds them."""
    folder = tmp_path_factory.mktemp("study")
    one_of_each(folder)
    file = folder / "results.json"
    command = "pathnet figures --all --preset digits"
    assert paper.main([str(file), str(folder), "--command", command, "--commit", "abc"]) == 0
    return results.read_object(file)


def test_a_file_of_the_paper_holds_its_claims_and_numbers(gathered: dict[str, Any]) -> None:
    assert (gathered["data"], gathered["date"], gathered["commit"]) == ("made up", "2016-05-20", "abc")
    single = gathered["experiments"]["lesion-single"][0]
    assert [claim["verdict"] for claim in single["claims"]] == ["did not hold", "held", "held"]
    residual = single["numbers"]["residual"]
    assert residual["rate"] == [[0.12, 0.21, 0.5, 0.11, 0.4, 0.1]] and residual["images"] == 100_000
    (rate, low, high), *_ = residual["intact"]
    assert (rate, low, high) == pytest.approx((0.1, 0.09816, 0.10188), abs=1e-5)  # Wilson, 10,000 of 100,000
    assert gathered["networks"]["highway"][1]["hash"] == "highway 1"
    assert gathered["experiments"]["path-gradients"][0]["numbers"]["decay"][0] == pytest.approx(0.3, rel=1e-5)
    assert "NaN" not in json.dumps(gathered)


def test_the_tables_of_the_paper_quote_the_file(gathered: dict[str, Any]) -> None:
    files = {"paper/a.json": gathered}
    text = paper_tables.verdicts(files)
    assert "| **did not hold** | the worst, block 1, costs 11 points (10.8 to 11.2), the median block 1.5 |" in text
    lines = paths.deletions(files).splitlines()
    worst = "1: 21 % (20.7 to 21.3); 0: 12 % (11.8 to 12.2); 3: 11 % (10.8 to 11.2)"
    assert f"| residual | 100000 | 10 % (9.82 to 10.2) | {worst} | 11 % |" in lines[2]
    assert "| 2 | 21 % |" in paths.sizes(files)


def test_the_agreement_of_rankings_is_kendalls_tau(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(depth=14, width=4, in_channels=1)
    pathnet.models.save(net, tmp_path / "net.safetensors")
    (row,) = paper.rankings([tmp_path / "net.safetensors"], "digits", 32)
    ranking = pathnet.lesion.rank(net.eval(), pathnet.data.digits(), images=32)
    tau = scipy.stats.kendalltau(ranking.loss, ranking.taylor).statistic
    assert row["agreement"]["taylor"] == pytest.approx(tau) and row["blocks"] == 6
    text = paths.rankings({"paper/a.json": {"data": "digits", "rankings": [row]}})
    assert f"| digits | net | 6 | 32 | {tau:.2g} |" in text


def of_figure_6(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the three claims of Figure 6, all held, with the measurement of one."""
    words = ("The gradient along a path falls", "The gradient comes from paths", "Almost all of the gradient")
    return [{**claim, "paper": paper, "verdict": "held"} for paper in words]


def test_a_claim_held_only_if_it_held_for_every_network(gathered: dict[str, Any]) -> None:
    file = json.loads(json.dumps(gathered))
    explained = {key: [value] * 7 for key, value in (("mean", 0.97), ("low", 0.96), ("high", 0.98))}
    (entry,) = file["experiments"]["path-gradients"]
    entry["numbers"]["exact"] = {"explained": explained}
    entry["numbers"]["decay"] = [0.3, 0.25, 0.35]
    entry["claims"] = of_figure_6(entry["claims"][0])
    other = {**entry, "claims": [{**claim, "verdict": "did not hold"} for claim in entry["claims"]]}
    file["experiments"]["path-gradients"].append(other)
    del file["experiments"]["effective-training"]
    rise = file["experiments"]["lesion-reorder"][0]["numbers"]["means"][-1]
    rise |= {"mean": 0.5, "low": 0.25, "high": 0.75}
    text = paper_tables.claims({"paper/a.json": file})
    assert "| claim | made up, 6 blocks, 90 % accuracy |" in text
    assert "to 50 % (25 to 75); largest step" in text
    assert "| **did not hold**: factor 0.3 (0.25 to 0.35) and 0.3 (0.25 to 0.35) |" in text
    assert "| **did not hold**: lengths up to 2 of 6 explain 97 % (96 to 98) and 97 % (96 to 98) |" in text
    assert "| training on short paths only is not worse | not measured |" in text
    assert "| **did not hold**: the worst, block 1, costs 11 points (10.8 to 11.2), the median block 1.5 |" in text
    assert "| open: from 10 % to 39 %; largest step 34.5 % of the rise |" in text
    assert "| gates biased towards carrying prefer short paths | held: 20.5 % (20.2 to 20.8) in the mean, " in text


def test_claims_that_a_file_lacks_are_not_measured(gathered: dict[str, Any]) -> None:
    file = json.loads(json.dumps(gathered))
    file["experiments"] = {name: file["experiments"][name] for name in ("lesion-single", "effective-training")}
    single, effective = (file["experiments"][name][0] for name in ("lesion-single", "effective-training"))
    single["claims"] = [claim for claim in single["claims"] if "VGG" not in claim["paper"]]
    for difference in effective["numbers"]["difference"].values():
        difference |= {"low": None, "high": None}
    text = paper_tables.claims({"paper/a.json": file})
    assert text.count("| not measured |") == 10 and "points more error, scaled by k/n |" in text
    assert paper_tables.verdicts({"paper/a.json": file}).count("(section") == 4
    single["settings"]["bn"] = "batch"
    assert "| **did not hold** in mode `batch`: the worst, block 1" in paper_tables.claims({"paper/a.json": file})
    assert "Figures 3 and 4, in mode `batch`)" in paper_tables.verdicts({"paper/a.json": file})


def test_a_claim_that_only_some_runs_test_is_shown_for_those(gathered: dict[str, Any]) -> None:
    file = json.loads(json.dumps(gathered))
    (entry,) = file["experiments"]["path-gradients"]
    entry["claims"] = of_figure_6(entry["claims"][0])
    file["experiments"]["path-gradients"].insert(0, {**entry, "claims": entry["claims"][:2]})
    rows = [line for line in paper_tables.verdicts({"paper/a.json": file}).splitlines() if "Almost all" in line]
    assert len(rows) == 1 and "| network 1: " in rows[0] and "network 0: " not in rows[0]


def test_runs_of_one_data_set_have_a_column_each(gathered: dict[str, Any]) -> None:
    file = json.loads(json.dumps(gathered))
    for name in ("lesion-many", "lesion-reorder"):
        (entry,) = file["experiments"][name]
        entry["settings"]["bn"] = "running"
        file["experiments"][name].append({**entry, "settings": {**entry["settings"], "bn": "batch"}})
    head = paths.sizes({"paper/a.json": file}).splitlines()[0]
    assert head == "| blocks deleted | made up, mode `running` | made up, mode `batch` |"
    assert "| tau, made up, mode `batch` | error |" in paths.orders({"paper/a.json": file})
    assert "made up, 6 blocks |" in paths.sizes({"a": gathered, "b": gathered})
    lacking = {**gathered, "experiments": {}}
    assert paths.sizes({"a": gathered, "b": lacking}).splitlines()[0].count("|") == 3


def test_the_papers_mode_decides_the_short_table_and_each_mode_has_a_verdict(gathered: dict[str, Any]) -> None:
    file = json.loads(json.dumps(gathered))
    (entry,) = file["experiments"]["path-gradients"]
    entry["settings"]["bn"] = "running"
    entry["numbers"]["exact"] = {"explained": {key: [1.0] * 7 for key in ("mean", "low", "high")}}
    entry["claims"] = of_figure_6(entry["claims"][0])
    claims = [{**claim, "verdict": "did not hold", "measured": "so and so"} for claim in entry["claims"]]
    numbers = {**entry["numbers"], "decay": [0.9, 0.8, 1.0]}
    other = {**entry, "settings": {**entry["settings"], "bn": "batch"}, "claims": claims, "numbers": numbers}
    file["experiments"]["path-gradients"].append(other)
    assert "| held: factor 0.3 |" in paper_tables.claims({"paper/a.json": file})
    text = paper_tables.verdicts({"paper/a.json": file})
    assert text.count("(section 5, Figure 6, in mode `running`)") == 3
    assert text.count("(section 5, Figure 6, in mode `batch`)") == 3 and text.count("| so and so |") == 3


def test_runs_on_two_data_sets_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, "unraveled", {}, [], data=name) for name in ("one", "two")]
    with pytest.raises(ValueError, match="runs: expected runs on one data set, got one, two"):
        paper.gathered(runs, ["pathnet unraveled"], "abc")


@pytest.mark.parametrize("file", sorted((results.FOLDER / "paper").glob("*.json")), ids=lambda file: file.stem)
def test_the_commands_of_a_file_are_those_of_its_experiments(file: Path) -> None:
    content = results.read_object(file)
    paper.check_commands(content["commands"], content["experiments"])


@pytest.mark.parametrize(
    ("commands", "experiments", "error"),
    [
        (["pathnet unraveled"], ["unraveled", "highway"], "expected a command that runs highway"),
        (["pathnet unraveled --preset digits", "pathnet highway"], ["unraveled"], "expected runs of highway"),
        (["pathnet figures --all"], ["unraveled"], "expected runs of effective-training, highway, lesion"),
        (["pathnet gradients --run a"], ["unraveled"], "expected a command that runs unraveled"),
        (["pathnet train"], ["unraveled"], "expected `pathnet EXPERIMENT ...`.*, got 'pathnet train'"),
        (["pathnet figures runs/digits"], ["unraveled"], "expected `pathnet EXPERIMENT ...`"),
        (["unraveled"], ["unraveled"], "expected `pathnet EXPERIMENT ...`"),
        ([], ["unraveled"], "expected a command that runs unraveled"),
    ],
)
def test_commands_that_did_not_measure_the_runs_are_refused(
    commands: list[str], experiments: list[str], error: str
) -> None:
    with pytest.raises(ValueError, match=f"^commands: {error}"):
        paper.check_commands(commands, experiments)


def test_commands_are_compared_with_the_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", "unraveled", {}, [], data="one")
    with pytest.raises(ValueError, match="commands: expected a command that runs unraveled"):
        paper.gathered([run], ["pathnet highway"], "abc")
    commands = ["pathnet gradients --run a", "pathnet gradients --run a --method exact"]
    paper.check_commands(commands, ["path-gradients"])
