"""Values that no measurement can have: refused by file and row, and never written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.run_folders import (
    ATTEMPT,
    IDENTITY,
    READINGS,
    Reading,
    add,
    add_readings,
    changed,
    measured,
    write_unsigned,
)

from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Value
from pathnet.results import read, writing

FIRST = "".join(map(str, measured(0).path[0]))
ODD_MEASUREMENTS = [
    ("batch", None, "batch: expected a value, got null"),
    ("length", None, "length: expected a value, got null"),
    ("path", None, "path: expected a value, got null"),
    ("norm", None, "norm: expected a value, got null"),
    ("engine", None, "engine: expected a value, got null"),
    ("batch", -1, "batch: expected a finite number of at least 0, got -1"),
    ("length", 0, "length: expected a finite number of at least 1, at most 11, got 0"),
    ("length", 12, "length: expected a finite number of at least 1, at most 11, got 12"),
    ("length", 2, r"path: expected 2 modules \(its length\), got 1"),
    ("norm", math.nan, "norm: expected a finite number of at least 0, got nan"),
    ("norm", math.inf, "norm: expected a finite number of at least 0, got inf"),
    ("norm", -1e-300, "norm: expected a finite number of at least 0, got -1e-300"),
    ("path", "", r"path: expected 11 characters \(one a block\), got ''"),
    ("path", FIRST + "0", rf"path: expected 11 characters \(one a block\), got '{FIRST}0'"),
    ("path", "1" * 11, r"path: expected 1 modules \(its length\), got 11"),
    ("path", "2" + "0" * 10, "path: expected zeros and ones, got '20000000000'"),
    ("path", " " * 11, "path: expected zeros and ones, got ' "),
    ("path", "0000000000\N{GREEK SMALL LETTER PI}", "path: expected 11 characters"),
    ("path", "000000000\N{GREEK SMALL LETTER PI}", "path: expected zeros and ones"),
]


@pytest.mark.parametrize(("column", "value", "message"), ODD_MEASUREMENTS)
def test_what_no_path_gradient_can_be_is_refused_by_file_and_row(
    tmp_path: Path, column: str, value: Any, message: str
) -> None:
    add(tmp_path, 0)
    (part,) = read(tmp_path).parts
    file = write_unsigned(tmp_path, "part", changed(pq.ParquetFile(part).read(), column, 0, value))
    with pytest.raises(ValueError, match=rf"^run: {file}: row 0: {message}.*; move it away to measure"):
        read(tmp_path).measurements()


def test_paths_that_are_whole_together_alone_are_refused(tmp_path: Path) -> None:
    """One path is empty, and the next holds the bytes of both."""
    add(tmp_path, 0)
    (part,) = read(tmp_path).parts
    table = pq.ParquetFile(part).read()
    both = "".join(table["path"].to_pylist()[3:5])
    write_unsigned(tmp_path, "part", changed(changed(table, "path", 3, ""), "path", 4, both))
    with pytest.raises(ValueError, match=r"row 3: path: expected 11 characters \(one a block\), got ''"):
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
    write_unsigned(tmp_path, "readings", changed(pq.ParquetFile(file).read(), column, 2, value))
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
