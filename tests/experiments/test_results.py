from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.full_disk import largest_file

from pathnet import results
from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Value
from pathnet.results import LARGEST, Measurements, Range, read, writing

IDENTITY: dict[str, Any] = {
    "experiment": "path-gradients",
    "seed": 0,
    "bn": "running",
    "model": {"hash": "abc", "config": None, "blocks": 11},
}
ATTEMPT = {"pathnet": "0.1.0"}


@dataclass(frozen=True)
class Reading:
    """A row with a field of every kind."""

    PART: ClassVar[str] = "readings"
    MEASURED: ClassVar[tuple[str, ...]] = ("count", "value")
    RANGES: ClassVar[Mapping[str, Range]] = {"count": Range(-LARGEST), "value": Range(-LARGEST, math.inf)}

    name: str
    place: int
    share: float
    blocks: tuple[int, ...]
    count: int
    value: float


READINGS = [
    Reading("a", 0, 0.1, (), 3, -1e-300),
    Reading("a", 0, 0.1, (2, 1), 2**53 + 1, 1 / 3),
    Reading("a", 10, 0.25, (53,), 0, float("inf")),
    Reading("b c \N{GREEK SMALL LETTER PI}", 2, 1.0, (0, 0), -5, 0.0),
]


def measured(batch: int, n: int = 11) -> Measurements:
    """One path of every length on one batch, its norms down to 1e-200."""
    rng = np.random.default_rng(batch)
    length = np.arange(1, n + 1, dtype=np.int16)
    path = (np.argsort(rng.random((n, n)), axis=1) < length[:, None]).astype(np.uint8)
    norm = rng.random(n) * 10.0 ** -np.linspace(0, 200, n)
    return Measurements(np.full(n, batch, np.int32), length, path, norm, ["cpu"] * n)


def add(folder: Path, *batches: int, identity: dict[str, Any] = IDENTITY, total: int = 10) -> None:
    with writing(folder, identity, {"batches": total}, ATTEMPT) as run:
        run.add([measured(batch) for batch in batches])


def test_what_was_written_is_read_back_sorted(tmp_path: Path) -> None:
    add(tmp_path / "run", 5, 2)
    add(tmp_path / "run", 0)
    run = read(tmp_path / "run")
    back = run.measurements()
    assert [part.name for part in run.parts] == ["part-000000.parquet", "part-000001.parquet"]
    assert back.batch.tolist() == [0] * 11 + [2] * 11 + [5] * 11 and back.length.tolist() == [*range(1, 12)] * 3
    for position, batch in enumerate([0, 2, 5]):
        own = slice(11 * position, 11 * position + 11)
        np.testing.assert_array_equal(back.norm[own], measured(batch).norm)
        np.testing.assert_array_equal(back.path[own], measured(batch).path)
    assert back.engine == ["cpu"] * 33 and (back.path.sum(1) == back.length).all()


def test_parts_are_zstd_parquet_of_the_stated_columns(tmp_path: Path) -> None:
    add(tmp_path, 0)
    (part,) = read(tmp_path).parts
    file = pq.ParquetFile(part)
    types = {field.name: str(field.type) for field in file.schema_arrow}
    assert types == {"batch": "int32", "length": "int16", "path": "binary", "norm": "double", "engine": "string"}
    assert file.metadata.row_group(0).column(3).compression == "ZSTD"
    first = file.read()["path"][0].as_py()
    assert np.frombuffer(first, np.uint8).tolist() == np.packbits(measured(0).path[0], bitorder="little").tolist()


def test_an_empty_run_has_no_measurements(tmp_path: Path) -> None:
    add(tmp_path)
    assert len(read(tmp_path).measurements()) == 0 and read(tmp_path).measurements().path.shape == (0, 11)


def test_run_json_keeps_identity_attempts_and_the_largest_number_of_batches(tmp_path: Path) -> None:
    add(tmp_path, total=20)
    add(tmp_path, total=10)
    with writing(tmp_path, IDENTITY, {"batches": 5}, ATTEMPT) as run:
        run.conclude({"decay": 0.5})
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["identity"] == IDENTITY and facts["batches"] == 20
    assert facts["attempts"] == [ATTEMPT] * 3 and facts["results"] == {"decay": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed: expected 1, found 0"),
        ({"model": {**IDENTITY["model"], "hash": "xyz"}}, r"model.hash: expected 'xyz', found 'abc'"),
        (
            {"model": {**IDENTITY["model"], "config": {"depth": 8}}},
            r"model.config: expected {'depth': 8}, found None",
        ),
        ({"at": "image"}, r"at: expected 'image', found None"),
    ],
)
def test_another_identity_is_refused_by_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    add(tmp_path, 0)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        add(tmp_path, 1, identity={**IDENTITY, **change})
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_field_that_only_the_folder_has_is_a_difference(tmp_path: Path) -> None:
    add(tmp_path, identity={**IDENTITY, "at": "image"})
    with pytest.raises(ValueError, match=r"at: expected None, found 'image'"):
        add(tmp_path)


def test_leftovers_of_a_killed_run_are_ignored_and_removed(tmp_path: Path) -> None:
    add(tmp_path, 0)
    end = ".0123456789ab.pathnet-temporary"
    leftovers = [tmp_path / f".run.json{end}", tmp_path / "measurements" / f".part-000001.parquet{end}"]
    for leftover in leftovers:
        leftover.write_bytes(b"PAR1 half a part")
    assert len(read(tmp_path).measurements()) == 11
    add(tmp_path, 1)
    assert not any(leftover.exists() for leftover in leftovers)
    assert len(read(tmp_path).measurements()) == 22


def test_a_part_takes_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(table: pa.Table, file: Any, **_: object) -> None:
        file.write(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(results.pq, "write_table", half_written)
    with pytest.raises(OSError, match="No space"):
        add(tmp_path, 0)
    assert read(tmp_path).parts == []


def test_a_new_part_never_replaces_one(tmp_path: Path) -> None:
    for batch in range(3):
        add(tmp_path, batch)
    (tmp_path / "measurements" / "part-000001.parquet").unlink()
    add(tmp_path, 7)
    add(tmp_path, 8)
    assert sorted(set(read(tmp_path).measurements().batch.tolist())) == [0, 2, 7, 8]


@pytest.mark.parametrize("kept", [0, 4, 300])
def test_a_truncated_part_is_an_error_that_names_it(tmp_path: Path, kept: int) -> None:
    add(tmp_path, 0)
    part = tmp_path / "measurements" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"run: .*part-000000.parquet is not a readable part"):
        read(tmp_path).measurements()


def test_a_part_of_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    add(tmp_path, 0)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "measurements" / "part-000001.parquet")
    with pytest.raises(ValueError, match=r"part-000001.parquet has other columns"):
        read(tmp_path).measurements()


def test_a_part_written_twice_counts_once(tmp_path: Path) -> None:
    add(tmp_path, 0)
    add(tmp_path, 1, 0)
    assert read(tmp_path).measurements().batch.tolist() == [0] * 11 + [1] * 11


def test_parts_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    add(tmp_path, 0)
    other = measured(0)
    other.norm[2] *= 1 + 1e-12
    with writing(tmp_path, IDENTITY, {"batches": 10}, ATTEMPT) as run:
        run.add([other])
    with pytest.raises(ValueError, match="hold batch 0, length 3 twice and differently"):
        read(tmp_path).measurements()


def test_two_processes_cannot_write_at_once(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, {"batches": 10}, ATTEMPT):
        with pytest.raises(ValueError, match="another process is writing"):
            add(tmp_path, 0)
        assert len(read(tmp_path).measurements()) == 0
    add(tmp_path, 0)


def test_folders_that_hold_no_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run: expected the folder of a run, got .*nowhere"):
        read(tmp_path / "nowhere")
    for content in ("{", "[]", "{}", '{"identity": {}}', "\x00"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run: .*run.json is not the run.json of a run"):
            read(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run: .*run.json is not the run.json of a run"):
        add(tmp_path, 0)


def test_a_folder_named_like_a_partition_adds_no_columns(tmp_path: Path) -> None:
    add(tmp_path / "seed=1", 0)
    assert len(read(tmp_path / "seed=1").measurements()) == 11


# Rows of dataclasses


def add_readings(folder: Path, *readings: Reading, identity: dict[str, Any] = IDENTITY) -> None:
    with writing(folder, identity, {}, ATTEMPT) as run:
        run.add_rows(readings)


def test_rows_come_back_equal_sorted_and_with_their_types(tmp_path: Path) -> None:
    add_readings(tmp_path, READINGS[3], READINGS[1])
    add_readings(tmp_path, READINGS[2], READINGS[0])
    back = read(tmp_path).rows(Reading)
    assert back == READINGS and [type(value) for value in vars(back[0]).values()] == [
        str,
        int,
        float,
        tuple,
        int,
        float,
    ]
    assert sorted(file.name for file in (tmp_path / "measurements").iterdir()) == [
        "readings-000000.parquet",
        "readings-000001.parquet",
    ]


def test_no_rows_write_no_part(tmp_path: Path) -> None:
    add_readings(tmp_path)
    assert read(tmp_path).rows(Reading) == [] and not list((tmp_path / "measurements").iterdir())


def test_a_row_written_twice_counts_once(tmp_path: Path) -> None:
    add_readings(tmp_path, *READINGS, READINGS[0])
    add_readings(tmp_path, READINGS[2])
    assert read(tmp_path).rows(Reading) == READINGS


@pytest.mark.parametrize("change", [{"count": 4}, {"value": 0.5}])
def test_rows_that_contradict_each_other_are_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    add_readings(tmp_path, *READINGS)
    add_readings(tmp_path, replace(READINGS[1], **change))
    with pytest.raises(
        ValueError, match=r"hold \{'name': 'a', 'place': 0, .*'blocks': \(2, 1\)\} twice and differently"
    ):
        read(tmp_path).rows(Reading)


def test_rows_that_measure_something_else_are_kept_apart(tmp_path: Path) -> None:
    add_readings(tmp_path, *(replace(READINGS[0], place=place) for place in (2, 1)))
    assert [row.place for row in read(tmp_path).rows(Reading)] == [1, 2]


def test_rows_of_other_columns_are_an_error_that_names_the_part(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Other:
        PART: ClassVar[str] = "readings"
        MEASURED: ClassVar[tuple[str, ...]] = ("value",)
        RANGES: ClassVar[Mapping[str, Range]] = {}

        name: str
        value: float

    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows([Other("a", 1.0)])
    with pytest.raises(ValueError, match=r"readings-000000.parquet has other columns: expected \['name', 'place',"):
        read(tmp_path).rows(Reading)


def test_kinds_of_rows_lie_side_by_side(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Note:
        PART: ClassVar[str] = "notes"
        MEASURED: ClassVar[tuple[str, ...]] = ("text",)
        RANGES: ClassVar[Mapping[str, Range]] = {}

        batch: int
        text: str

    notes = [Note(0, "x"), Note(1, "y")]
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows(READINGS)
        run.add_rows(notes)
        run.add([measured(0)])
    run = read(tmp_path)
    assert run.rows(Reading) == READINGS and run.rows(Note) == notes and len(run.measurements()) == 11


def test_a_half_written_part_of_rows_is_ignored_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_readings(tmp_path, READINGS[0])
    leftover = tmp_path / "measurements" / ".readings-000001.parquet.0123456789ab.pathnet-temporary"
    leftover.write_bytes(b"PAR1 half a part")
    assert read(tmp_path).rows(Reading) == READINGS[:1]
    add_readings(tmp_path, *READINGS[1:])
    assert read(tmp_path).rows(Reading) == READINGS and not leftover.exists()

    def half_written(table: pa.Table, file: Any, **_: object) -> None:
        file.write(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(results.pq, "write_table", half_written)
    with pytest.raises(OSError, match="No space"):
        add_readings(tmp_path, replace(READINGS[0], place=99))
    assert read(tmp_path).rows(Reading) == READINGS


# What is not this library's is not touched


def test_files_of_somebody_else_stay(tmp_path: Path) -> None:
    add(tmp_path, 0)
    strangers = [tmp_path / "notes.tmp", tmp_path / "measurements" / "notes.tmp", tmp_path / "run.json.tmp"]
    strangers.append(tmp_path / ".notes.0123456789ab.pathnet-temporary")
    for stranger in strangers:
        stranger.write_text("precious")
    add(tmp_path, 1)
    assert all(stranger.read_text() == "precious" for stranger in strangers)


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"^run: expected a lock file at .*\.lock, got a link"):
        add(tmp_path / "run", 0)
    assert target.read_text() == "precious"


# What no measurement can come to


def written_by_hand(folder: Path, stem: str, table: pa.Table) -> Path:
    """A part that no digest speaks of."""
    file = folder / "measurements" / f"{stem}-000000.parquet"
    pq.write_table(table.replace_schema_metadata(None), file)
    return file


def changed(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    position = table.schema.get_field_index(column)
    return table.set_column(
        position, table.schema.field(position), pa.array(values, table.schema.field(position).type)
    )


FIRST = np.packbits(measured(0).path[0], bitorder="little").tobytes()
ODD_MEASUREMENTS = [
    ("batch", None, "batch: expected a value, got null"),
    ("length", None, "length: expected a value, got null"),
    ("path", None, "path: expected a value, got null"),
    ("norm", None, "norm: expected a value, got null"),
    ("engine", None, "engine: expected a value, got null"),
    ("batch", -1, "batch: expected a finite number of at least 0, got -1"),
    ("length", 0, "length: expected a finite number of at least 1, at most 11, got 0"),
    ("length", 12, "length: expected a finite number of at least 1, at most 11, got 12"),
    ("length", 2, r"path: expected 2 modules among 11 \(its length\), got others"),
    ("norm", math.nan, "norm: expected a finite number of at least 0, got nan"),
    ("norm", math.inf, "norm: expected a finite number of at least 0, got inf"),
    ("norm", -1e-300, "norm: expected a finite number of at least 0, got -1e-300"),
    ("path", b"", "path: expected 2 bytes for 11 blocks, got 0"),
    ("path", FIRST + b"x", "path: expected 2 bytes for 11 blocks, got 3"),
    ("path", b"\xff\xff", "path: expected 1 modules among 11"),
    ("path", bytes([0, 0x80]), "path: expected 1 modules among 11"),
]


@pytest.mark.parametrize(("column", "value", "message"), ODD_MEASUREMENTS)
def test_what_no_path_gradient_can_be_is_refused_by_file_and_row(
    tmp_path: Path, column: str, value: Any, message: str
) -> None:
    add(tmp_path, 0)
    (part,) = read(tmp_path).parts
    file = written_by_hand(tmp_path, "part", changed(pq.ParquetFile(part).read(), column, 0, value))
    with pytest.raises(ValueError, match=rf"^run: {file}: row 0: {message}.*; move it away to measure"):
        read(tmp_path).measurements()


def test_paths_that_are_whole_together_alone_are_refused(tmp_path: Path) -> None:
    """One is empty and the next has its bytes too."""
    add(tmp_path, 0)
    (part,) = read(tmp_path).parts
    table = pq.ParquetFile(part).read()
    both = b"".join(table["path"].to_pylist()[3:5])
    written_by_hand(tmp_path, "part", changed(changed(table, "path", 3, b""), "path", 4, both))
    with pytest.raises(ValueError, match="row 3: path: expected 2 bytes for 11 blocks, got 0"):
        read(tmp_path).measurements()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("name", None, "name: expected a value, got null"),
        ("count", None, "count: expected a value, got null"),
        ("blocks", None, "blocks: expected a value, got null"),
        ("blocks", [1, None], "blocks: expected integers, got null among them"),
        ("blocks", [2, -1], "blocks: expected a finite number of at least 0, got -1"),
        ("place", -1, "place: expected a finite number of at least 0, got -1"),
        ("share", math.nan, "share: expected a finite number of at least 0, got nan"),
        ("value", math.nan, "value: expected a number, got nan"),
        ("value", -math.inf, "value: expected a number, got -inf"),
    ],
)
def test_what_a_kind_of_row_excludes_is_refused_by_file_and_row(
    tmp_path: Path, column: str, value: Any, message: str
) -> None:
    add_readings(tmp_path, *READINGS)
    file = tmp_path / "measurements" / "readings-000000.parquet"
    written_by_hand(tmp_path, "readings", changed(pq.ParquetFile(file).read(), column, 2, value))
    with pytest.raises(ValueError, match=f"^run: {file}: row 2: {message}"):
        read(tmp_path).rows(Reading)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ExactSum(0, 0, math.nan, 0, 0, 0, 0, 1, "cpu"), "norm: expected a finite number of at least 0, got nan"),
        (ExactSum(0, 0, 1, 1.1, 0, 0, 0, 1, "cpu"), "next_cosine: expected .* or NaN, got 1.1"),
        (ExactSum(0, 0, 1, 0, 0, 0, -0.1, 1, "cpu"), "left: expected a number of at least 0 or NaN, got -0.1"),
        (SignedDraw(0, 0, 0, math.inf, "cpu"), "squared_norm: expected a finite number of at least 0, got inf"),
        (ErrorCount("vgg", 0, 0, 0, (), (), 1.0, "running", 9, 10), "wrong: expected .* at most images, got 10"),
        (ErrorCount("vgg", 0, 0, 0, (), (), 1.0, "running", 0, 0), "images: expected .* of at least 1, got 0"),
        (Value("", -1, 0, "x", 0, 1.0), "seed: expected a finite number of at least 0, got -1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_that_could_not_be_read_again_are_not_written(tmp_path: Path, row: Any, message: str) -> None:
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run, pytest.raises(ValueError, match=f"row 0: {message}"):
        run.add_rows([row])
    assert not list((tmp_path / "measurements").iterdir())


def test_what_could_not_be_measured_is_nan_and_comes_back(tmp_path: Path) -> None:
    nan = math.nan
    sums = [ExactSum(0, 0, 0.0, nan, nan, nan, math.inf, 0.0, "cpu")]
    values = [Value("", 0, 0, "x", index, value) for index, value in enumerate((nan, math.inf, -math.inf, -1.0))]
    with writing(tmp_path, IDENTITY, {}, ATTEMPT) as run:
        run.add_rows(sums)
        run.add_rows(values)
    run = read(tmp_path)
    assert str(run.rows(ExactSum)) == str(sums) and str(run.rows(Value)) == str(values)


# run.json


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
        (facts_with(networks={"vgg": [{**NETWORK, "survival": [1.0]}]}), "survival, how many: expected an integer"),
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


# A full disk


def test_a_full_disk_is_told_with_what_is_lost_and_the_run_goes_on_later(tmp_path: Path) -> None:
    add(tmp_path, 0)
    with writing(tmp_path, IDENTITY, {"batches": 10}, ATTEMPT) as run:
        with largest_file(500), pytest.raises(OSError) as failure:
            run.add([measured(1)])
        part = tmp_path / "measurements" / "part-000001.parquet"
        assert str(failure.value) == (
            f"run: {part} cannot be written (File too large); its 11 measurements are lost, the parts on the disk "
            "stay good, and the same command goes on from them"
        )
        with largest_file(10), pytest.raises(OSError) as failure:
            run.conclude({"mean": 1.0})
        assert str(failure.value).startswith(f"run: {tmp_path / 'run.json'} cannot be written (File too large); the ")
    assert [path.name for path in (tmp_path / "measurements").iterdir()] == ["part-000000.parquet"]
    add(tmp_path, 1)
    assert read(tmp_path).measurements().batch.tolist() == [0] * 11 + [1] * 11


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^run: .*file/run/measurements cannot be written \(Not a directory\)$"):
        add(tmp_path / "file" / "run", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identity": {}}, "identity.experiment: expected a string, got none"),
        ({"identity": [1]}, "identity: expected an object, got a list"),
        ({"identity": {**IDENTITY, "some": {1, 2}}}, "identity: expected an object that JSON can hold"),
        ({"identity": {**IDENTITY, "some": float("nan")}}, "identity: expected an object that JSON can hold"),
        ({"asked": {"batches": -1}}, "asked.batches: expected an integer of at least 0, got -1"),
        ({"attempt": None}, "attempt: expected an object, got None"),
        ({"folder": 3}, "folder: expected the path of a file or folder, got 3"),
    ],
)
def test_no_run_is_begun_that_could_not_be_read(tmp_path: Path, arguments: Any, message: str) -> None:
    valid = {"folder": tmp_path / "run", "identity": IDENTITY, "asked": {"batches": 2}, "attempt": ATTEMPT}
    with pytest.raises(ValueError, match=f"^{message}"), results.writing(**{**valid, **arguments}):
        pass
    assert not (tmp_path / "run").exists()
