"""``run.json``: whatever is wrong with it is named by the field, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folders import ATTEMPT, IDENTITY, add

from pathnet import results
from pathnet.results import read

NETWORK = {"config": None, "blocks": 3, "downsampling": [2], "survival": [1.0, 1.0, 0.5]}


def facts_with(**identity: Any) -> dict[str, Any]:
    return {"identity": {**IDENTITY, **identity}, "attempts": [ATTEMPT]}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], r"content: expected an object, got \[\]"),
        ("x", "content: expected an object, got 'x'"),
        ({"attempts": [ATTEMPT]}, "identity: expected an object, got none"),
        ({"identity": "x", "attempts": [ATTEMPT]}, "identity: expected an object, got 'x'"),
        ({"identity": IDENTITY}, "attempts: expected a list, got none"),
        ({"identity": IDENTITY, "attempts": []}, "attempts: expected at least one, got none"),
        ({"identity": IDENTITY, "attempts": ["x"]}, "attempts.0: expected an object, got 'x'"),
        ({"identity": IDENTITY, "attempts": {}}, "attempts: expected a list, got {}"),
        ({**facts_with(), "batches": "many"}, "batches: expected an integer of at least 0, got 'many'"),
        ({**facts_with(), "results": []}, r"results: expected an object, got \[\]"),
        (facts_with(experiment=7), "identity.experiment: expected a string, got 7"),
        (facts_with(model=None), "identity.model: expected an object, got None"),
        (facts_with(model={"config": None}), "identity.model.blocks: expected an integer of at least 1, got None"),
        (facts_with(model={"config": None, "blocks": 1.5}), "identity.model.blocks: expected an integer"),
        (facts_with(model={"blocks": 3}), "identity.model.config: expected an object, got none"),
        (facts_with(model={"blocks": 3, "config": {"model": 7}}), "identity.model.config.model: expected a string"),
        (facts_with(data="digits"), "identity.data: expected an object, got 'digits'"),
        (facts_with(data={"name": 3}), "identity.data.name: expected a string, got 3"),
        (facts_with(data={"name": "x", "classes": 0}), "identity.data.classes: expected an integer of at least 1"),
        (facts_with(modules="all"), "identity.modules: expected an integer of at least 1, got 'all'"),
        (facts_with(networks=[]), r"identity.networks: expected an object, got \[\]"),
        (facts_with(networks={"vgg": {}}), "identity.networks.vgg: expected a list, got {}"),
        (facts_with(networks={"vgg": []}), "identity.networks.vgg: expected at least one network, got none"),
        (facts_with(networks={"vgg": [3]}), "identity.networks.vgg.0: expected an object, got 3"),
        (
            facts_with(networks={"vgg": [{**NETWORK, "survival": [1.0]}]}),
            "survival: expected 3 probabilities .* got 1",
        ),
        (facts_with(networks={"vgg": [{**NETWORK, "survival": [1, 1, "x"]}]}), "survival: expected a finite number"),
        (facts_with(networks={"vgg": [{**NETWORK, "downsampling": [3]}]}), "downsampling: expected an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_json_of_other_kinds_of_values_is_refused_by_the_field(
    tmp_path: Path, facts: Any, message: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=rf"^run: .*run.json is not the run.json of a run \(.*{message}"):
        read(tmp_path)


@pytest.mark.parametrize("content", ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "1" * 5000])
def test_a_run_json_that_python_cannot_parse_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"^run: .*run.json is not the run.json of a run") as failure:
        read(tmp_path)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 1000


def test_what_an_experiment_asks_for_and_the_identity_lacks_is_named(tmp_path: Path) -> None:
    add(tmp_path, identity={"experiment": "lesion-single", "networks": {"vgg": [NETWORK]}})
    run = read(tmp_path)
    assert run.fact("networks", "vgg", 0, "blocks") == 3
    for keys in (("model", "blocks"), ("networks", "highway"), ("networks", "vgg", 0, "hash"), ("experiment", "x")):
        with pytest.raises(ValueError, match=rf"^run: .*run.json: expected identity.{'.'.join(map(str, keys))} in a"):
            run.fact(*keys)
    with pytest.raises(ValueError, match="expected identity.model.blocks in a run of lesion-single, got none"):
        run.measurements()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identity": {}}, "identity.experiment: expected a string, got none"),
        ({"identity": [1]}, "identity: expected an object, got a list"),
        ({"identity": {**IDENTITY, "some": {1, 2}}}, "identity: expected an object that JSON can hold"),
        ({"identity": {**IDENTITY, "some": float("nan")}}, "identity: expected an object that JSON can hold"),
        ({"planned": {"batches": -1}}, "planned.batches: expected an integer of at least 0, got -1"),
        ({"attempt": None}, "attempt: expected an object, got None"),
        ({"folder": 3}, "folder: expected the path of a file or folder, got 3"),
    ],
)
def test_no_run_is_begun_that_could_not_be_read(tmp_path: Path, arguments: Any, message: str) -> None:
    valid = {"folder": tmp_path / "run", "identity": IDENTITY, "planned": {"batches": 2}, "attempt": ATTEMPT}
    with pytest.raises(ValueError, match=f"^{message}"), results.writing(**{**valid, **arguments}):
        pass
    assert not (tmp_path / "run").exists()
