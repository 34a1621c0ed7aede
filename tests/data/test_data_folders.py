"""Folders of classes with broken files, special files and unusual layouts."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.image_folders import encoded, write_folders

from pathnet import data

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folders(tmp_path / "set", IMAGES)
    return tmp_path / "set"


def break_some(folder: Path) -> list[str]:
    """Break some images, add others that cannot be read, and return the names of both."""
    names = ["train/class0/2.png", "train/class0/a.jpg", "train/class1/pipe.png", "val/class1/gone.png"]
    (folder / names[0]).write_bytes(encoded(IMAGES[0])[:-40])
    (folder / names[1]).write_bytes(b"")
    os.mkfifo(folder / names[2])
    (folder / names[3]).symlink_to("nowhere")
    return names


@pytest.mark.parametrize("in_memory_bytes", [1 << 30, 0])
def test_broken_images_are_left_out_reported_and_listed_by_name(
    folder: Path, in_memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathnet.data.folders.IN_MEMORY_BYTES", in_memory_bytes)
    whole = data.load(str(folder)).fingerprint()
    names = break_some(folder)
    with pytest.warns(RuntimeWarning, match=r"data: left out 4 of 15 images, .*train/class0/2.png") as warned:
        loaded = data.load(str(folder), skip_broken=True)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert set(loaded.skipped) == set(names) and loaded.fingerprint() != whole
    assert loaded.train.labels.tolist() == [0, 0, 1, 1, 1] and len(loaded.test) == 6
    expected = torch.from_numpy(IMAGES[[0, 4, 1, 3, 5]]).permute(0, 3, 1, 2)
    assert torch.equal(loaded.train.take(torch.arange(5)), expected)


def test_skip_broken_does_not_change_a_set_without_broken_images(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping = data.load(str(folder), skip_broken=True)
    assert skipping.skipped == () and skipping.fingerprint() == data.load(str(folder)).fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.png", encoded(IMAGES[0])[:-40], "train/class0/0.png is not a readable image"),
        ("4.png", encoded(IMAGES[0])[:-40], "train/class0/4.png is not a readable image"),
        ("5.jpg", encoded(IMAGES[0], "JPEG")[:-60], "train/class0/5.jpg is not a readable image"),
        ("5.png", b"", "train/class0/5.png is not a readable image .*got nothing"),
        ("5.png", b"%!PS-Adobe-3.0 EPSF-3.0", "train/class0/5.png is not a readable image .*got the bytes"),
        ("5.png", None, "train/class0/5.png is not a regular file but a named pipe"),
    ],
)
def test_without_skip_broken_the_first_broken_image_is_named(
    folder: Path, name: str, content: bytes | None, message: str
) -> None:
    file = folder / "train" / "class0" / name
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        data.load(str(folder))
    assert str(raised.value).endswith("skip_broken leaves such images out") and "\n" not in str(raised.value)


def test_a_class_without_a_readable_image_is_rejected(folder: Path) -> None:
    for file in (folder / "val" / "class1").iterdir():
        file.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="val/class1 contains no readable images"):
        data.load(str(folder), skip_broken=True)
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="readable images in the training split, got none among 6"):
        data.load(str(folder), skip_broken=True)


def test_no_image_is_left_out_for_a_bad_side_or_lack_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="side: expected an integer from 1 to 9459, got 100000"):
        data.class_folders(folder, side=100_000, skip_broken=True)

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("pathnet.data.decoding.to_rgb", exhausted)
    with pytest.raises(ValueError, match="not enough memory"):
        data.class_folders(folder, side=12, skip_broken=True)


def test_a_class_of_the_test_split_alone_is_rejected(folder: Path) -> None:
    shutil.copytree(folder / "val" / "class0", folder / "val" / "unicorn")
    with pytest.raises(ValueError, match="val contains folders that are no classes of .*train: unicorn$"):
        data.load(str(folder))


def test_entries_that_are_no_images_are_ignored_with_a_warning(folder: Path) -> None:
    (folder / "train" / "stray.png").write_bytes(encoded(IMAGES[0]))
    (folder / "train" / "class0" / "below").mkdir()
    (folder / "val" / "class1" / "film.gif").write_bytes(b"")
    (folder / "val" / "class1" / ".hidden").write_bytes(b"")
    with pytest.warns(
        RuntimeWarning, match="3 entries .* train/stray.png, train/class0/below and val/class1/film.gif"
    ):
        assert len(data.load(str(folder)).train) == 6


LAYOUTS = {
    "images alone": (["a.png", "b.PNG", "notes.txt"], r"expected train/<class>/ .* got 2 .png files, 1 .txt file$"),
    "no splits": (["cat/a.png", "dog/a.png"], r"expected train/<class>/ .* got the folders cat and dog$"),
    "train alone": (["train/cat/a.png"], r"needs the folders train/<class>/ and test/<class>/ .* the folder train$"),
    "test alone": (["test/cat/a.png"], r"expected train/<class>/ .* got the folder test$"),
    "no classes": (["train/a.png", "test/a.png"], r"train contains no class folders, got 1 .png file$"),
    "one level too deep": (
        ["train/cat/images/a.png", "test/cat/a.png"],
        r"cat contains no images: .* the folder images$",
    ),
    "another kind": (["train/cat/a.gif", "test/cat/a.gif"], r"cat contains no images: .* got 1 .gif file$"),
    "many": ([f"class{i}/a.png" for i in range(9)], r"class0, class1, class2, class3 and 5 more$"),
    "nothing": ([], r"got an empty folder$"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_for_other_layouts_name_the_accepted_and_the_actual_layout(tmp_path: Path, layout: str) -> None:
    names, message = LAYOUTS[layout]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(IMAGES[0]))
    with pytest.raises(ValueError, match=message) as raised:
        data.load(tmp_path)
    assert str(raised.value).startswith("data: ") and "\n" not in str(raised.value)
