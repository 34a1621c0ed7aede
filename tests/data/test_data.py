from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.image_folders import encoded, write_folders, write_parquet, write_pickles

from pathnet import data
from pathnet.streams import stream

RNG = np.random.default_rng(0)


@pytest.fixture
def images() -> np.ndarray:
    return RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def test_digits_are_the_real_ones_with_other_writers_held_out() -> None:
    digits = data.digits()
    assert (len(digits.train), len(digits.test), digits.image_shape) == (1437, 360, (1, 8, 8))
    assert digits.train.labels.bincount().min() > 130 and digits.test.labels.max() == 9
    normalised = digits.normalise(digits.train.take(torch.arange(1437)))
    assert abs(normalised.mean()) < 1e-4 and abs(normalised.std() - 1) < 1e-3
    assert not digits.flip


def test_parquet(tmp_path: Path, images: np.ndarray) -> None:
    write_parquet(tmp_path, images, [3, 1, 4, 1, 5, 9])
    loaded = data.load(str(tmp_path))
    assert loaded.name == "CIFAR-10" and loaded.train.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert torch.equal(loaded.test.take(torch.tensor([4])), torch.from_numpy(images[4:5]).permute(0, 3, 1, 2))


def test_jpeg_images_are_named_in_the_data_set(tmp_path: Path, images: np.ndarray) -> None:
    write_parquet(tmp_path, images, [0] * 6, "JPEG")
    assert data.cifar10(tmp_path).name == "CIFAR-10 (JPEG)"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_original_pickles(tmp_path: Path, images: np.ndarray, protocol: int, below: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    write_pickles(tmp_path / below, images, list(range(6)), protocol)
    loaded = data.load(str(tmp_path))
    assert len(loaded.train) == 30 and loaded.test.labels.tolist() == list(range(6))
    assert torch.equal(loaded.test.take(torch.tensor([2])), torch.from_numpy(images[2:3]).permute(0, 3, 1, 2))


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, ("open('executed', 'w')",)


def test_a_pickle_is_never_executed(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path, images, [0] * 6)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Malicious(), b"labels": []}))
    with pytest.raises(ValueError, match="data_batch_3 is not a readable CIFAR-10 batch .*refused to run"):
        data.cifar10(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("in_memory_bytes", [1 << 30, 0])
def test_class_folders_in_memory_and_on_disk(
    tmp_path: Path, images: np.ndarray, in_memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathnet.data.folders.IN_MEMORY_BYTES", in_memory_bytes)
    write_folders(tmp_path, images)
    loaded = data.load(str(tmp_path))
    assert isinstance(loaded.train, data.OnDisk if in_memory_bytes == 0 else data.InMemory)
    assert loaded.classes == ("class0", "class1") and loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(loaded.train.take(torch.tensor([4])), torch.from_numpy(images[3:4]).permute(0, 3, 1, 2))
    smaller = data.class_folders(tmp_path, side=20)
    assert smaller.image_shape == (3, 20, 20)


def test_images_of_another_size_are_scaled_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    write_folders(tmp_path, np.stack([wide, wide]))
    scaled = data.class_folders(tmp_path, side=10).train.take(torch.arange(2))
    assert scaled.shape == (2, 3, 10, 10) and (scaled == 255).all()


def test_augmentation_crops_and_mirrors_whole_images() -> None:
    synthetic = data.synthetic(images=64, shape=(3, 9, 7))
    normalised = synthetic.normalise(synthetic.train.take(torch.arange(64)))
    augmented = synthetic.augment(normalised, stream(0, "test"))
    assert augmented.shape == normalised.shape and not torch.equal(augmented, normalised)
    padded = torch.nn.functional.pad(normalised, (4,) * 4)
    for before, after in zip(padded, augmented, strict=True):
        crops = [crop for image in (before, before.flip(2)) for crop in _crops(image, 9, 7)]
        assert any(torch.equal(after, crop) for crop in crops)
    flipped = sum(
        any(torch.equal(after, crop) for crop in _crops(before.flip(2), 9, 7))
        for before, after in zip(padded, augmented, strict=True)
    )
    assert 16 < flipped < 48


@pytest.mark.parametrize("padding", [0, 4])
def test_augmentation_mirrors_the_images_that_are_named(padding: int) -> None:
    synthetic = dataclasses.replace(data.synthetic(images=16, shape=(3, 9, 7)), crop_padding=padding)
    normalised = synthetic.normalise(synthetic.train.take(torch.arange(16)))
    mirrored = torch.arange(16) % 3 == 0
    augmented = synthetic.augment(normalised, stream(0, "test"), mirrored)
    padded = torch.nn.functional.pad(normalised, (padding,) * 4)
    for before, after, flipped in zip(padded, augmented, mirrored, strict=True):
        for form, wanted in ((before, not flipped), (before.flip(2), flipped)):
            crops = [crop for crop in _crops(form, 9, 7) if crop.shape == after.shape]
            assert any(torch.equal(after, crop) for crop in crops) == wanted
    # The random half is the generator's next draw after those of the crops.
    rng = stream(0, "test")
    rng.integers(0, 2 * padding + 1, 16), rng.integers(0, 2 * padding + 1, 16)
    half = torch.from_numpy(rng.random(16) < 0.5)
    assert torch.equal(
        synthetic.augment(normalised, stream(0, "test")), synthetic.augment(normalised, stream(0, "test"), half)
    )


def test_data_that_allow_no_flips_mirror_none_of_the_images_that_are_named() -> None:
    synthetic = dataclasses.replace(data.synthetic(images=16, shape=(3, 9, 7)), crop_padding=0, flip=False)
    normalised = synthetic.normalise(synthetic.train.take(torch.arange(16)))
    everything = torch.ones(16, dtype=torch.bool)
    assert torch.equal(synthetic.augment(normalised, stream(0, "test"), everything), normalised)
    allowed = dataclasses.replace(synthetic, flip=True)
    assert torch.equal(allowed.augment(normalised, stream(0, "test"), everything), normalised.flip(3))
    assert torch.equal(allowed.augment(normalised, stream(0, "test"), ~everything), normalised)


def _crops(image: torch.Tensor, height: int, width: int) -> list[torch.Tensor]:
    return [image[:, top : top + height, left : left + width] for top in range(9) for left in range(9)]


def test_a_random_batch_is_a_function_of_seed_and_number() -> None:
    synthetic = data.synthetic()
    images, labels = synthetic.random_batch(100, seed=1, batch=5)
    again, _ = synthetic.random_batch(100, seed=1, batch=5)
    assert torch.equal(images, again) and images.shape == (100, 3, 32, 32) and labels.shape == (100,)
    assert len(images.flatten(1).unique(dim=0)) == 100
    assert not torch.equal(images, synthetic.random_batch(100, seed=1, batch=6)[0])
    with pytest.raises(ValueError, match="batch_size: expected 1 to 512"):
        synthetic.random_batch(513, seed=0, batch=0)


def test_fingerprints_distinguish_data_sets() -> None:
    assert data.synthetic(seed=1).fingerprint() != data.synthetic(seed=2).fingerprint()
    assert data.digits().fingerprint() == data.digits().fingerprint()


def unreadable(tmp_path: Path, what: str) -> Path:
    images = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    if what == "truncated":
        write_parquet(tmp_path, images, [0] * 4)
        file = tmp_path / "train-00000-of-00001.parquet"
        file.write_bytes(file.read_bytes()[:-50])
    if what == "no test":
        write_parquet(tmp_path, images, [0] * 4)
        (tmp_path / "test-00000-of-00001.parquet").unlink()
    if what == "columns":
        pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "train-0.parquet")
    if what == "not an image":
        table = pyarrow.table({"img": [{"bytes": b"no", "path": ""}], "label": [0]})
        pyarrow.parquet.write_table(table, tmp_path / "train-0.parquet")
    if what == "cut pickle":
        write_pickles(tmp_path, images, [0] * 4)
        (tmp_path / "data_batch_2").write_bytes((tmp_path / "data_batch_2").read_bytes()[:-20])
    if what == "no val":
        (tmp_path / "train" / "a").mkdir(parents=True)
    if what == "no images":
        for split in ("train", "val"):
            (tmp_path / split / "a").mkdir(parents=True)
    if what == "missing class":
        write_folders(tmp_path, images)
        (tmp_path / "train" / "another").mkdir()
        (tmp_path / "train" / "another" / "0.png").write_bytes(encoded(images[0]))
    if what == "missing folder":
        return tmp_path / "nowhere"
    return tmp_path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing folder", "expected digits, synthetic or an existing folder"),
        ("empty", "contains no data set: expected train"),
        ("truncated", "train-00000-of-00001.parquet is not a readable Parquet file"),
        ("no test", "has no test-"),
        ("columns", "needs the columns img .or image. and label, has a"),
        ("not an image", "row 0 is not a readable image"),
        ("cut pickle", "data_batch_2 is not a readable CIFAR-10 batch"),
        ("no val", "needs the folders train"),
        ("no images", "contains no images: expected files that end in one of .* got an empty folder"),
        ("missing class", "has no folder for class 'another'"),
    ],
)
def test_unreadable_folders_are_reported_in_one_line(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        data.load(str(unreadable(tmp_path, what)))
    assert str(raised.value).startswith("data: ") and "\n" not in str(raised.value)


def test_a_representation_names_sizes_shape_classes_and_origin(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = data.digits()
    assert repr(digits) == ("Data('digits': 1,437 training and 360 test images of 1x8x8, 10 classes, in memory)")
    assert repr(digits.train) == "InMemory(1,437 images of 1x8x8)"
    monkeypatch.setattr("pathnet.data.folders.IN_MEMORY_BYTES", 0)
    write_folders(tmp_path, images)
    loaded = data.load(tmp_path)
    assert repr(loaded) == (
        f"Data({tmp_path.name!r}: 6 training and 6 test images of 3x32x32, 2 classes, "
        f"in {tmp_path / 'train'} and in {tmp_path / 'val'})"
    )
    assert repr(loaded.test) == f"OnDisk(6 images of 3x32x32, in {tmp_path / 'val'})"


WITHOUT_READERS = """
import sys

for package in ("PIL", "pyarrow", "sklearn"):
    sys.modules[package] = None

import pathnet.data

assert len(pathnet.data.synthetic(16).train) == 16
for name in sys.argv[1:]:
    try:
        pathnet.data.load(name)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_reading_data_without_its_packages_names_them(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "folders").mkdir()
    (tmp_path / "parquet").mkdir()
    write_folders(tmp_path / "folders", images)
    write_parquet(tmp_path / "parquet", images, [0] * 6)
    names = ["digits", str(tmp_path / "folders"), str(tmp_path / "parquet")]
    command = [sys.executable, "-c", WITHOUT_READERS, *names]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    purposes = {
        "scikit-learn": "pathnet.data.digits takes the digits from scikit-learn",
        "pillow": "pathnet.data decodes images with pillow",
        "pyarrow": "pathnet.data.cifar10 reads Parquet files with pyarrow",
    }
    assert lines == [
        f"{purpose}, which is not installed: pip install {package}, or the extra 'paper' of pathnet"
        for package, purpose in purposes.items()
    ]
