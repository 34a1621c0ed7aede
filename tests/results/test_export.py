"""An exported run: the same rows for every reader, and a card that says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.run_folders import ATTEMPT, IDENTITY, READINGS, add, add_readings, measured

from pathnet import results


@pytest.fixture
def run(tmp_path: Path) -> results.Run:
    for batches in ((3, 1), (2,), (0, 3)):
        add(tmp_path / "run", *batches)
    add_readings(tmp_path / "run", *READINGS)
    return results.read(tmp_path / "run")


def front_matter(card: Path) -> dict[str, Any]:
    _, front, _ = card.read_text().split("---\n", 2)
    return dict(yaml.safe_load(front))


def test_every_row_is_exported_once_and_sorted(tmp_path: Path, run: results.Run) -> None:
    written = results.export(run, tmp_path / "out")
    names = ["README.md", "data/path_gradients.parquet", "data/readings.parquet"]
    assert [str(file.relative_to(tmp_path / "out")) for file in written] == names
    query = f"SELECT batch, length, path, norm FROM '{written[1]}'"
    rows = duckdb.sql(query).fetchall()
    expected = [
        (batch, length, "".join(map(str, path)), norm)
        for batch in range(4)
        for length, path, norm in zip(
            range(1, 12), measured(batch).path.tolist(), measured(batch).norm.tolist(), strict=True
        )
    ]
    assert rows == expected
    assert duckdb.sql(f"SELECT name, blocks FROM '{written[2]}'").fetchall()[-1] == (READINGS[3].name, [0, 0])


def test_the_card_lists_every_subset_and_its_file(tmp_path: Path, run: results.Run) -> None:
    card, *files = results.export(run, tmp_path / "out")
    facts = front_matter(card)
    listed = {config["config_name"]: tmp_path / "out" / config["data_files"] for config in facts["configs"]}
    assert listed == {file.stem: file for file in files} and facts["size_categories"] == ["n<1K"]
    assert "license" not in facts


def test_the_card_says_what_was_measured_on_what_and_by_what(tmp_path: Path, run: results.Run) -> None:
    text = results.export(run, tmp_path / "out")[0].read_text()
    assert "11 blocks" in text and f"weights `{IDENTITY['model']['hash']}`" in text
    assert "seed `0`" in text and "batches `10`" in text and f"| {ATTEMPT['pathnet']} |" in text
    assert "| `path` | `string` | " in text and "Blocks are numbered from 0" in text


def test_columns_carry_their_meaning(tmp_path: Path, run: results.Run) -> None:
    _, file, _ = results.export(run, tmp_path / "out")
    for field in pq.read_schema(file):
        assert field.metadata[b"description"], field.name


def test_a_name_from_a_file_cannot_break_the_card(tmp_path: Path) -> None:
    identity = {**IDENTITY, "data": {"name": "---\n# | heading", "hash": "x"}}
    add(tmp_path / "run", 0, identity=identity)
    card = results.export(results.read(tmp_path / "run"), tmp_path / "out")[0]
    assert front_matter(card)["configs"] and "\n# | heading" not in card.read_text()


def test_odd_names_are_shown_as_they_are(tmp_path: Path) -> None:
    model = {**IDENTITY["model"], "config": {"name": "`a` | ``b``"}}
    identity = {**IDENTITY, "experiment": "one\n# two \N{GRINNING FACE}", "model": model, "data": {"name": "<b>`"}}
    add(tmp_path / "run", 0, identity=identity)
    card = results.export(results.read(tmp_path / "run"), tmp_path / "out")[0]
    assert front_matter(card)["pretty_name"] == "one\\x0a# two \N{GRINNING FACE} by pathnet"
    headings = [line for line in card.read_text().splitlines() if line.startswith("# ")]
    assert headings == ["# one\\x0a# two \N{GRINNING FACE} by pathnet"]
    assert 'built as ``` {"name": "`a` | ``b``"} ```, ' in card.read_text()
    assert "- **data**: `` <b>` ``, content `None`" in card.read_text()


def test_what_is_only_in_a_journal_is_exported(tmp_path: Path) -> None:
    with results.writing(tmp_path / "run", IDENTITY, {"batches": 1}, ATTEMPT) as run:
        run.add([measured(0)])
        files = results.export(results.read(tmp_path / "run"), tmp_path / "out")
    assert pq.read_table(files[1])["norm"].to_pylist() == measured(0).norm.tolist()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, run: results.Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("precious")
    with pytest.raises(ValueError, match=r"^out: expected a new or empty folder, got .*out, which holds"):
        results.export(run, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes"]
    (tmp_path / "out" / "notes").unlink()
    assert results.export(run, tmp_path / "out")


def test_a_failure_leaves_nothing_behind(tmp_path: Path, run: results.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"^export: .*out cannot be written \(No space left on device\); nothing"):
        results.export(run, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


def test_a_run_without_measurements_is_refused(tmp_path: Path) -> None:
    add(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^run: expected measurements in .*run, got none"):
        results.export(results.read(tmp_path / "run"), tmp_path / "out")


def test_a_damaged_part_is_not_exported(tmp_path: Path, run: results.Run) -> None:
    part = run.parts[0]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=part.name):
        results.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_are_text_that_numpy_and_sql_index_alike(tmp_path: Path, run: results.Run) -> None:
    _, file, _ = results.export(run, tmp_path / "out")
    entered = duckdb.sql(
        f"SELECT path[i + 1] = '1' FROM '{file}', range(11) AS blocks(i) WHERE batch = 2 AND length = 4"
    )
    assert np.array(entered.fetchall())[:, 0].tolist() == (measured(2).path[3] == 1).tolist()
