"""CIFAR-10 files with unexpected or hostile content."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.image_folders import encoded, write_parquet, write_pickles

from pathnet import data

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
ROWS = [{"bytes": encoded(image), "path": None} for image in IMAGES]
LABELS = [3, 1, 4, 1, 5, 9]


def write_table(folder: Path, images: Any = ROWS, labels: Any = LABELS, name: str = "train-1.parquet") -> None:
    write_parquet(folder, IMAGES, LABELS)
    pyarrow.parquet.write_table(pyarrow.table({"img": images, "label": labels}), folder / name)


def raised_line(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        data.cifar10(folder, **options)
    assert str(raised.value).startswith("data: ") and "\n" not in str(raised.value)
    return str(raised.value)


# Parquet


@pytest.mark.parametrize("label", [99, -1, 10, None])
def test_a_label_outside_the_classes_is_named_by_file_and_row(tmp_path: Path, label: int | None) -> None:
    write_table(tmp_path, labels=[3, 1, label, 1, 5, 9])
    line = raised_line(tmp_path)
    assert "train-1.parquet row 2: label: expected an integer from 0 to 9" in line and line.endswith(f"got {label}")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (ROWS, [1.7] * 6, "train-1.parquet: label: expected integers, got double"),
        (ROWS, ["cat"] * 6, "train-1.parquet: label: expected integers, got string"),
        (ROWS, [[1]] * 6, "train-1.parquet: label: expected integers, got list"),
        (["a.png"] * 6, LABELS, "train-1.parquet: img: expected a struct with binary bytes, got string"),
        ([row["bytes"] for row in ROWS], LABELS, "train-1.parquet: img: expected a struct with binary bytes"),
        ([{"bytes": "text"}] * 6, LABELS, "img: expected a struct with binary bytes, got struct<bytes: string>"),
        ([{"path": "a"}] * 6, LABELS, "img: expected a struct with binary bytes, got struct<path: string>"),
        ([[{"bytes": b""}]] * 6, LABELS, "img: expected a struct with binary bytes, got list"),
        ([*ROWS[:5], None], LABELS, "train-1.parquet row 5 is null"),
        ([*ROWS[:5], {"bytes": None, "path": "a"}], LABELS, "train-1.parquet row 5 is null"),
        ([*ROWS[:5], {"bytes": b"", "path": None}], LABELS, "train-1.parquet row 5 is not a readable image"),
        (
            [*ROWS[:5], {"bytes": encoded(IMAGES[0, :9]), "path": None}],
            LABELS,
            "differ in size: .*train-1.parquet row 5 has 32 x 9 pixels, .*train-00000-of-00001.parquet row 0 has 32",
        ),
    ],
)
def test_rows_with_other_columns_or_types_are_named(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    write_table(tmp_path, images, labels)
    line = raised_line(tmp_path)
    assert re.search(message, line), line


def test_broken_rows_are_left_out_with_their_labels(tmp_path: Path) -> None:
    write_table(tmp_path, [None, {"bytes": b"no", "path": None}, *ROWS[2:]])
    whole = data.synthetic().fingerprint()
    with pytest.warns(RuntimeWarning, match="data: left out 2 of 18 images, .*train-1.parquet row 0 is null"):
        loaded = data.cifar10(tmp_path, skip_broken=True)
    assert loaded.skipped == ("train-1.parquet row 0", "train-1.parquet row 1") and loaded.fingerprint() != whole
    assert loaded.train.labels.tolist() == [*LABELS, *LABELS[2:]]
    assert torch.equal(loaded.train.take(torch.tensor([6])), torch.from_numpy(IMAGES[2:3]).permute(0, 3, 1, 2))


def test_the_first_row_may_be_the_broken_one(tmp_path: Path) -> None:
    write_table(tmp_path, [None, *ROWS[1:]], name="train-0.parquet")
    with pytest.warns(RuntimeWarning, match="left out 1 of 18 images"):
        assert data.cifar10(tmp_path, skip_broken=True).skipped == ("train-0.parquet row 0",)


def test_a_bad_label_is_rejected_even_if_broken_images_are_left_out(tmp_path: Path) -> None:
    write_table(tmp_path, labels=[3, 1, 99, 1, 5, 9])
    assert "row 2: label" in raised_line(tmp_path, skip_broken=True)
    write_table(tmp_path, [None] * 6)
    for file in tmp_path.glob("train-0*"):
        file.unlink()
    assert "expected a struct with binary bytes, got null" in raised_line(tmp_path, skip_broken=True)


def test_a_parquet_file_that_is_a_pipe_or_claims_too_much_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path)
    monkeypatch.setattr("pathnet.data.cifar.MOST_ROWS", 5)
    assert "expected at most 5 rows, got 6" in raised_line(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("pathnet.data.cifar.MOST_BYTES", 35_000)
    assert "expected images of at most 35,000 bytes in the split train, got 12 of 3,072 each" in raised_line(tmp_path)
    monkeypatch.undo()
    os.mkfifo(tmp_path / "train-2.parquet")
    assert "train-2.parquet is not a regular file but a named pipe" in raised_line(tmp_path)


def test_no_column_comes_from_the_name_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "label=7").mkdir()
    write_parquet(tmp_path / "label=7", IMAGES, LABELS)
    assert data.cifar10(tmp_path / "label=7").train.labels.tolist() == LABELS


# Pickles


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    write_pickles(tmp_path, IMAGES, LABELS)
    return tmp_path


@pytest.mark.parametrize("label", [99, -1, 1.7, None, "cat", True])
def test_a_bad_label_of_a_batch_is_named_by_file_and_row(batches: Path, label: object) -> None:
    batch = {b"data": IMAGES.reshape(6, -1).copy(), b"labels": [0, 0, 0, label, 0, 0]}
    (batches / "data_batch_3").write_bytes(pickle.dumps(batch, 2))
    assert "data_batch_3 row 3: label: expected an integer from 0 to 9, got" in raised_line(batches)


BATCHES = {
    "fewer labels": ({b"data": IMAGES.reshape(6, -1).copy(), b"labels": [0] * 4}, "got 4 labels and 6 images"),
    "no images": ({b"data": IMAGES[:0].reshape(0, 3072).copy(), b"labels": []}, "got 0 labels and 0 images"),
    "no labels": ({b"data": IMAGES.reshape(6, -1).copy()}, "expected a dictionary with b'data' and b'labels'"),
    "a list": ([1, 2], "expected a dictionary with b'data' and b'labels', got a list"),
    "labels of text": ({b"data": IMAGES.reshape(6, -1).copy(), b"labels": "abc"}, "expected an array and a list"),
    "images of bytes": ({b"data": b"abc", b"labels": [1]}, "expected an array and a list of labels"),
    "channels last": ({b"data": IMAGES.copy(), b"labels": LABELS}, r"shape \(N, 3072\), got \(6, 32, 32, 3\)"),
    "floats": (
        {b"data": np.zeros((6, 3072), np.float32), b"labels": LABELS},
        "expected a C-ordered uint8 array, got f4",
    ),
}


@pytest.mark.parametrize("what", BATCHES)
def test_a_batch_with_another_structure_is_named(batches: Path, what: str) -> None:
    batch, message = BATCHES[what]
    (batches / "data_batch_2").write_bytes(pickle.dumps(batch, 4))
    line = raised_line(batches)
    assert "data_batch_2" in line and re.search(message, line), line


def nested_tuples() -> bytes:
    """Return a dictionary key whose hash would overflow the stack."""
    return b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"K\x01s."


def encoded_again_and_again() -> bytes:
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
    arguments = text + b"X\x06\x00\x00\x00latin1\x86q\x00"
    return b"\x80\x02" + arguments + b"c_codecs\nencode\nq\x01(" + b"h\x01h\x00R" * 10_000 + b"l."


BOMBS = {
    "bytes of terabytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 42) + b"x.",
    "text of terabytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 42) + b"x.",
    "a bytearray of terabytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 42) + b"x.",
    "a negative length": b"\x80\x04\x8e" + struct.pack("<q", -1) + b"x.",
    "a frame of terabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 42) + b"N.",
    "a large memo": b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFF0) + b".",
    "a large memo in text": b"Np99999999999\n.",
    "a memo that is missing": b"\x80\x02h\x05.",
    "an empty stack": b"\x80\x020.",
    "many opcodes": b"\x80\x02" + b"N0" * 600_000 + b"N.",
    "nested tuples": nested_tuples(),
    "an unhashable key": b"\x80\x02}]Ns.",
    "text that is not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "an integer without end": b"I" + b"9" * 6000 + b"\n.",
    "nothing": b"",
    "no pickle": b"hello",
    "a protocol of the future": b"\x80\xffN.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent identity": b"Pa\n.",
    "an array of nothing": b"\x80\x02cnumpy\nndarray\n)\x81Nb.",
    "a module that is not there": b"cnowhere\nthing\n.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_hostile_batch_is_reported_in_one_line(batches: Path, what: str) -> None:
    (batches / "data_batch_4").write_bytes(BOMBS[what])
    assert "data_batch_4 is not a readable CIFAR-10 batch (" in raised_line(batches)


def test_the_texts_that_a_pickle_encodes_fit_into_the_file_size(batches: Path) -> None:
    (batches / "data_batch_4").write_bytes(encoded_again_and_again())
    assert "data_batch_4 is not a readable CIFAR-10 batch (requests more bytes than the" in raised_line(batches)


def test_the_limits_admit_the_original_batches() -> None:
    """Check a batch as Python 2 wrote it: 10,000 images, labels and file names, each in the memo."""
    images = np.zeros((10_000, 3072), np.uint8)
    batch = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [i % 10 for i in range(10_000)],
        b"data": images,
        b"filenames": [f"leptodactylus_pentadactylus_s_{i:06d}.png".encode() for i in range(10_000)],
    }
    for protocol in (2, 4):
        content = pickle.dumps(batch, protocol)
        assert len(content) < 1 << 28
        assert sum(1 for _ in pickletools.genops(io.BytesIO(content))) < 200_000


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch"])
def test_a_batch_that_is_a_pipe_is_named(batches: Path, name: str) -> None:
    (batches / name).unlink()
    os.mkfifo(batches / name)
    assert f"{name} is not a regular file but a named pipe" in raised_line(batches)


def test_a_batch_that_is_missing_is_named(batches: Path) -> None:
    (batches / "data_batch_4").unlink()
    assert raised_line(batches).endswith("data_batch_4 does not exist")


def test_a_batch_of_terabytes_is_not_read(batches: Path) -> None:
    with (batches / "test_batch").open("wb") as handle:
        handle.truncate(1 << 42)
    assert "test_batch: expected a file of at most 268,435,456 bytes, got 4,398,046,511,104" in raised_line(batches)
