"""Arrays that figures refuse: each error is one line, and names the array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from helpers.wrong_values import VALUES

from pathnet import figures
from pathnet.experiments import effective_training
from pathnet.figures import sources

GATES = {"openness": [0.2, 0.3], "bias": [0, 0], "skip": [1, 1], "residual": [1, 1], "gate": [1, 1]}


@pytest.mark.parametrize(
    ("draw", "value", "message"),
    [
        ("figure_6", {}, "results: expected arrays 'length' and 'norm', or 'exact' or 'signed', got none of them"),
        ("figure_6", {"norm": [1.0]}, "results: expected an array 'length' beside 'norm', got none"),
        ("figure_6", {"length": [1], "norms": [1.0]}, "results: expected arrays among .*, got 'norms'"),
        (
            "figure_6",
            {"length": [1], "norm": [1.0, 2.0]},
            r"results\['length'\]: expected as many values as of 'norm', .*",
        ),
        (
            "figure_6",
            {"length": [0], "norm": [1.0]},
            r"results\['length'\]: expected numbers of at least 1, .*, got 0.0",
        ),
        ("figure_6", {"length": [1.5], "norm": [1.0]}, r"results\['length'\]: expected integers, got 1.5"),
        ("figure_6", {"length": [3], "norm": [1.0], "blocks": 2}, r"results\['length'\]: .* at most 2, got 3.0"),
        (
            "figure_6",
            {"length": [1], "norm": [np.nan]},
            r"results\['norm'\]: expected numbers of at least 0, .*, got nan",
        ),
        (
            "figure_6",
            {"length": [1], "norm": [0.0]},
            r"results\['norm'\]: expected some norms above zero, got none .*",
        ),
        (
            "figure_6",
            {"length": [1], "norm": ["0.1"]},
            r"results\['norm'\]: expected numbers, got a list of type <U3",
        ),
        ("figure_6", {"length": [1], "norm": [[1.0]]}, r"results\['norm'\]: expected values in 1 dimension, .*"),
        (
            "figure_6",
            {"length": [], "norm": []},
            r"results\['norm'\]: expected values in 1 dimension, got the shape \[0\]",
        ),
        ("figure_sums", [], "results: expected a run of path-gradients, .*, got .*"),
        ("figure_sums", {"exact": {"batch": [0]}}, r"results\['exact'\]: expected an array 'length', got batch"),
        ("figure_3", {}, "results: expected error rates by 1 to 4 kinds of network, got 0"),
        ("figure_3", {"a": [1.2]}, r"results\['a'\]\['rate'\]: expected numbers of at least 0, at most 1, got 1.2"),
        ("figure_3", {"a": {"wrong": [1]}}, r"results\['a'\]: expected 'rate', or 'wrong' and 'images', got neither"),
        ("figure_3", {"a": {"rate": [0.1], "intact": [0, 0]}}, r"results\['a'\]\['intact'\]: .* 1 networks, got 2"),
        ("figure_5a", {"rate": [0.1], "blocks": 3}, "results: expected an array 'size', got rate, blocks"),
        ("figure_5b", {"rate": [0.1]}, "results: expected an array 'tau' or 'order', got both or neither"),
        (
            "figure_5b",
            {"rate": [0.1], "order": [[0, 0]]},
            r"results\['order'\]: expected orders of the blocks 0 to 1, .*",
        ),
        (
            "figure_5a",
            pandas.DataFrame({"size": [1, 2], "rate": [0.1, 0.2], "blocks": [3, 4]}),
            r"results\['blocks'\]: expected one value in all rows, got 3 and 4",
        ),
        (
            "figure_6",
            {"length": [1], "norm": [1.0], "gates": [True, False]},
            r"results\['gates'\]: expected True or False, got a list",
        ),
        ("figure_7", {"blocks": 3, "deleted": [4]}, r"results\['deleted'\]: expected numbers of .* most 3, got 4.0"),
        (
            "figure_7",
            {"blocks": 9, "deleted": range(5)},
            r"results\['deleted'\]: expected 1 to 4 different numbers, .*",
        ),
        (
            "figure_8",
            {"deletions": {"a": [0.1]}},
            "results: expected 'survival', or 'drawn' and 'expected', got neither",
        ),
        (
            "figure_8",
            {"deletions": {"a": 7}},
            r"results\['deletions'\]\['a'\]\['rate'\]: expected values in 1 or 2 .*",
        ),
        (
            "figure_effective",
            {"modules": 5, "blocks": 4, "full": [0], "effective": [0]},
            r"results\['modules'\]: .*got 5",
        ),
        ("figure_highway", GATES, "results: expected an array 'path_norms', got openness, .*"),
        (
            "figure_highway",
            {**GATES, "path_norms": [1.0], "deletions": [0.1, 0.2]},
            r"results\['path_norms'\]: expected 2 columns, as in openness, got 1",
        ),
        ("figure_depth", {"step": [0]}, "results: expected an array 'depth', got step"),
    ],
)
def test_a_wrong_array_is_named(draw: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        getattr(figures, draw)(value)


WHOLE: dict[str, dict[str, Any]] = {
    "figure_6": {"length": [1, 2], "norm": [0.2, 0.1], "batch": [0, 0], "blocks": 2, "exact": [], "signed": []},
    "figure_3": {"mine": {"rate": [0.1, 0.2], "intact": 0.1, "images": 9, "downsampling": [1], "chance": 0.9}},
    "figure_5a": {"size": [1, 2], "rate": [0.1, 0.2], "blocks": 3, "seed": [0, 1], "intact": 0.1, "chance": 0.9},
    "figure_5b": {"tau": [0.9, 0.5], "rate": [0.1, 0.2], "size": [1, 2], "order": [[0, 1], [1, 0]]},
    "figure_7": {"blocks": 2, "deleted": [1], "drawn": [[1.0, 0.5, 0.0]]},
    "figure_8": {"deletions": {"mine": [0.1]}, "survival": [0.5], "drawn": [1, 1], "expected": [0.5, 0.5]},
    "figure_effective": {"modules": 1, "blocks": 2, "full": [0.1], "effective": {"as it is": [0.1]}},
    "figure_highway": {**GATES, "path_norms": [1.0, 0.5], "deletions": [0.1, 0.2]},
    "figure_depth": {"step": [0], "depth": [1.0], "first": [0], "last": [2], "half": [1], "loss": [2.3]},
}
SOURCES = {
    "figure_6": sources.comparison_of,
    "figure_3": sources.deletions_of,
    "figure_5a": lambda value: sources.errors_of(value, "5a"),
    "figure_5b": lambda value: sources.errors_of(value, "5b"),
    "figure_7": sources.remaining_of,
    "figure_8": sources.stochastic_depth_of,
    "figure_effective": sources.effective_of,
    "figure_highway": sources.highway_of,
    "figure_depth": sources.depths_of,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_whatever_an_array_is_it_is_refused_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (effective_training, sources.paths):  # takes a fifth of a second
        monkeypatch.setattr(module, "drawn_paths", lambda *_: None)
    refused = 0
    for value in VALUES.values():
        nested = [
            {kind: {**rates, key: value()}} for kind, rates in WHOLE[name].items() for key in nested_keys(rates)
        ]
        for results_ in [value(), *({**WHOLE[name], key: value()} for key in WHOLE[name]), *nested]:
            try:
                SOURCES[name](sources.opened(results_) if name != "figure_depth" else results_)
            except ValueError as error:
                assert str(error).startswith(("results", "run:", "out:", "folder:", "path:")), (results_, str(error))
                refused += 1
            except OSError:
                assert isinstance(results_, str | Path)
    assert refused > 50


def nested_keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []
