"""A flipped bit in any file that is read back is an error that names the file, or does not change what is loaded.

``PATHNET_FLIPS`` is the number of bits flipped in each kind of file, one at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from helpers.run_folders import ATTEMPT, IDENTITY, add, measured

from pathnet import data, models, results
from pathnet.experiments.by_length import ExactSum
from pathnet.experiments.errors import ErrorCount
from pathnet.models.weights import read_tensors, write_tensors
from pathnet.streams import stream
from pathnet.training import Recipe, train

FLIPS = int(os.environ.get("PATHNET_FLIPS", "300"))


@dataclass(frozen=True)
class Kept:
    """A file, and a function that loads it and returns all of its content as text."""

    file: Path
    load: Callable[[], str]


def run_with(folder: Path, rows: Any) -> Path:
    with results.writing(folder, IDENTITY, {"batches": 3}, ATTEMPT) as run:
        run.add_rows(rows)
        run.conclude({"mean": 1 / 3, "words": "\N{GREEK SMALL LETTER PI}"})
    return folder


def kept_measurements(folder: Path) -> Kept:
    add(folder, 0, 1, 2)

    def load() -> str:
        back = results.read(folder).measurements()
        columns = (back.batch, back.length, back.path, back.norm)
        return repr([column.tolist() for column in columns]) + repr(back.engine)

    return Kept(folder / "measurements" / "part-000000.parquet", load)


def kept_sums(folder: Path) -> Kept:
    rows = [
        ExactSum(0, k, 0.1 * k, math.nan if k == 4 else 0.5, math.nan, -0.2, math.inf, 0.0, "cpu") for k in range(5)
    ]
    run_with(folder, rows)
    return Kept(folder / "measurements" / "exact-000000.parquet", lambda: repr(results.read(folder).rows(ExactSum)))


def kept_errors(folder: Path) -> Kept:
    rows = [
        ErrorCount("residual", 0, i, 3, tuple(range(i)), (1, 0), 0.5, "running", 100, i, "1" * i + "0" * (100 - i))
        for i in range(20)
    ]
    run_with(folder, rows)
    return Kept(
        folder / "measurements" / "errors-000000.parquet", lambda: repr(results.read(folder).rows(ErrorCount))
    )


def kept_facts(folder: Path) -> Kept:
    run_with(folder, [])
    return Kept(folder / "run.json", lambda: json.dumps(results.read(folder).facts, sort_keys=True))


def said(path: Path) -> str:
    tensors, metadata = read_tensors(path)
    content = {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in sorted(tensors.items())}
    return repr(content) + json.dumps(metadata, sort_keys=True)


def kept_weights(folder: Path) -> Kept:
    torch.manual_seed(0)
    file = folder / "net.safetensors"
    models.save(models.vgg(4, 2, 2, stages=1, in_channels=1), file, torch.float16)
    return Kept(file, lambda: said(file) + models.fingerprint(models.load(file)))


def kept_checkpoint(folder: Path) -> Kept:
    torch.manual_seed(0)
    file, images = folder / "net.checkpoint.safetensors", data.synthetic(images=16, shape=(1, 8, 8))
    train(models.preact_resnet(8, 1, in_channels=1), images, Recipe(epochs=1, batch_size=8), file)
    # Those from before there were digests named neither the engines of their steps nor what they began with.
    tensors, metadata = read_tensors(file)
    del metadata["engines"], metadata["start"]
    write_tensors(file, tensors, metadata, "checkpoint", "")
    return Kept(file, lambda: said(file))


KINDS = [kept_measurements, kept_sums, kept_errors, kept_facts, kept_weights, kept_checkpoint]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.removeprefix("kept_"))
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path, kind: Callable[[Path], Kept]) -> None:
    kept = kind(tmp_path)
    content, expected = kept.file.read_bytes(), kept.load()
    bits = 8 * len(content)
    refused = 0
    for bit in stream(0, "flips").choice(bits, min(FLIPS, bits), replace=False).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        kept.file.write_bytes(damaged)
        try:
            loaded = kept.load()
        except ValueError as error:
            assert str(kept.file) in str(error) and "\n" not in str(error), bit
            refused += 1
        else:
            assert loaded == expected, f"bit {bit} is loaded as something else"
    assert refused > 0.5 * min(FLIPS, bits)
    kept.file.write_bytes(content)
    assert kept.load() == expected


def without_digest(file: Path) -> None:
    """Write the file as it was written before there were digests."""
    if file.suffix == ".json":
        facts = json.loads(file.read_text())
        del facts["sha256"]
        file.write_text(json.dumps(facts, indent=2))
    elif file.suffix == ".parquet":
        table = pq.ParquetFile(file).read()
        pq.write_table(table.replace_schema_metadata(None), file, compression="zstd")
    else:
        tensors, metadata = read_tensors(file)
        safetensors.torch.save_file(tensors, file, {name: json.dumps(value) for name, value in metadata.items()})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.removeprefix("kept_"))
def test_files_from_before_there_were_digests_are_loaded(tmp_path: Path, kind: Callable[[Path], Kept]) -> None:
    kept = kind(tmp_path)
    expected = kept.load()
    without_digest(kept.file)
    assert b"sha256" not in kept.file.read_bytes() and kept.load() == expected


def test_an_edited_identity_is_refused_and_says_so(tmp_path: Path) -> None:
    kept = kept_facts(tmp_path)
    kept.file.write_text(kept.file.read_text().replace('"running"', '"batch"'))
    before = kept.file.read_bytes()
    message = r"^run: .*run.json was edited or damaged after it was written \(its sha256 does not match its content\)"
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path)
    with pytest.raises(ValueError, match=message):
        add(tmp_path, 0, identity={**IDENTITY, "bn": "batch"})
    assert kept.file.read_bytes() == before


def test_another_layout_of_the_same_facts_is_no_edit(tmp_path: Path) -> None:
    kept = kept_facts(tmp_path)
    expected = kept.load()
    facts = json.loads(kept.file.read_text())
    kept.file.write_text(json.dumps(dict(reversed(facts.items())), ensure_ascii=False))
    assert kept.load() == expected


def test_a_part_of_another_run_keeps_its_own_digest(tmp_path: Path) -> None:
    """The digest covers the content of a part, not its place."""
    add(tmp_path / "one", 0)
    add(tmp_path / "other", 1)
    part = tmp_path / "other" / "measurements" / "part-000000.parquet"
    part.rename(tmp_path / "one" / "measurements" / "part-000001.parquet")
    assert results.read(tmp_path / "one").measurements().norm.tolist() == [
        norm for batch in (0, 1) for norm in measured(batch).norm
    ]
