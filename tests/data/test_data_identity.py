"""The hash of a data set: what it distinguishes, and that runs with hashes of the older kind can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import pathnet_
from helpers.image_folders import encoded, write_folders
from PIL import Image

from pathnet import data, models, results
from pathnet.data import Data, InMemory, OnDisk
from pathnet.experiments import path_gradients
from pathnet.experiments.path_gradients import PathGradients
from pathnet.models.weights import read_tensors, write_tensors
from pathnet.training import Recipe, train

LEGACY = {
    "digits": "31dcedcb6e14491373b0b8542e96c9e1d8550166025cf3014c2bc02df5028e1a",
    "synthetic": "1796e9c17a70cd9b61abcb02fcd59747f8956876acce5ae10773a100a2a4d437",
}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def in_memory(
    shape: tuple[int, ...], labels: tuple[int, ...] = (0, 1), classes: tuple[str, ...] = ("a", "b")
) -> Data:
    split = InMemory(torch.arange(64, dtype=torch.uint8).reshape(shape), torch.tensor(labels))
    return Data("few", split, split, classes)


def on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, side: int | None = None) -> Data:
    monkeypatch.setattr("pathnet.data.folders.IN_MEMORY_BYTES", 0)
    loaded = data.class_folders(folder, side)
    assert isinstance(loaded.train, OnDisk)
    return loaded


def test_the_same_bytes_in_other_shapes_are_different_data() -> None:
    shapes = [(2, 1, 4, 8), (2, 1, 8, 4), (2, 2, 4, 4)]
    assert len({in_memory(shape).fingerprint() for shape in shapes}) == 3
    assert len({in_memory(shape).fingerprint(like=LEGACY["digits"]) for shape in shapes}) == 1
    one = in_memory((2, 1, 4, 8))
    variants = [
        in_memory((2, 1, 4, 8), labels=(1, 0)),
        in_memory((2, 1, 4, 8), classes=("a", "c")),
        in_memory((2, 1, 4, 8), classes=("a", "b", "c")),
        replace(one, flip=False),
        replace(one, crop_padding=3),
        replace(one, test=InMemory(one.train.take(torch.arange(1)), one.train.labels[:1])),
    ]
    assert len({loaded.fingerprint() for loaded in [one, *variants]}) == 7
    assert one.fingerprint() == in_memory((2, 1, 4, 8)).fingerprint()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a pixel": lambda file: file.write_bytes(encoded_in_as_many_bytes(file)),
    "the label": lambda file: file.rename(file.parent.parent / "class1" / "0.png"),
    "the class's name": lambda file: [
        os.rename(split / "class0", split / "cat") for split in file.parents[2].iterdir()
    ],
    "the number": lambda file: file.unlink(),
}


def encoded_in_as_many_bytes(file: Path) -> bytes:
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 255
    buffer = file.with_suffix(".bmp")
    Image.fromarray(pixels).save(buffer)
    content = buffer.read_bytes()
    buffer.unlink()
    return content


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_of_equal_size_is_different_data(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path, IMAGES)
    file = tmp_path / "train" / "class0" / "0.png"
    Image.fromarray(IMAGES[0]).save(file, "BMP")
    before, size = on_disk(tmp_path, monkeypatch), file.stat().st_size
    assert before.fingerprint() == on_disk(tmp_path, monkeypatch).fingerprint()
    hashed = before.fingerprint()
    CHANGES[what](file)
    after = on_disk(tmp_path, monkeypatch)
    assert after.fingerprint() != hashed
    if what == "a pixel":
        assert file.stat().st_size == size and after.fingerprint(like="0" * 64) == before.fingerprint(like="0" * 64)


def test_the_hash_depends_on_the_side_and_not_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path / "a", IMAGES)
    whole = on_disk(tmp_path / "a", monkeypatch).fingerprint()
    assert on_disk(tmp_path / "a", monkeypatch, side=7).fingerprint() != whole
    (tmp_path / "a").rename(tmp_path / "b")
    assert on_disk(tmp_path / "b", monkeypatch).fingerprint() == whole


def test_files_are_hashed_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path, IMAGES)
    loaded = on_disk(tmp_path, monkeypatch)
    first = loaded.fingerprint()
    monkeypatch.setattr("pathnet.data.splits._file_digest", None)
    assert loaded.fingerprint() == first


def test_a_file_name_that_is_not_unicode_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path, IMAGES)
    (tmp_path / "train" / "class0" / os.fsdecode(b"\xff.png")).write_bytes(encoded(IMAGES[0]))
    loaded = on_disk(tmp_path, monkeypatch)
    assert loaded.fingerprint().startswith("v2:") and len(loaded.fingerprint(like="0" * 64)) == 64


# Runs and checkpoints from before hashes had versions


@pytest.mark.parametrize("name", LEGACY)
def test_a_hash_without_a_version_is_compared_with_one_of_its_kind(name: str) -> None:
    loaded = data.load(name)
    assert loaded.fingerprint(like=LEGACY[name]) == LEGACY[name]
    assert loaded.fingerprint().startswith("v2:") and loaded.fingerprint(like=loaded.fingerprint()) == (
        loaded.fingerprint(like=None)
    )


def test_a_set_on_disk_recorded_by_names_and_sizes_is_accepted_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path, IMAGES)
    loaded = on_disk(tmp_path, monkeypatch)
    recorded = loaded.fingerprint(like="0" * 64)
    with pytest.warns(RuntimeWarning, match="recorded by the names and sizes of its files"):
        assert loaded.fingerprint(like=recorded) == recorded


def small_set(seed: int = 0) -> Data:
    return data.synthetic(images=32, shape=(3, 8, 8), seed=seed)


def test_a_run_with_a_hash_without_a_version_can_be_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, plan = models.preact_resnet(8, 4).eval(), PathGradients(batches=1, batch_size=4, engine="reference")
    path_gradients.measure(net, small_set(), plan, tmp_path)
    file = tmp_path / "run.json"
    facts = json.loads(file.read_text())
    del facts["sha256"]
    assert facts["identity"]["data"] == {"name": "synthetic", "hash": small_set().fingerprint()}
    facts["identity"]["data"]["hash"] = small_set().fingerprint(like="0" * 64)
    file.write_text(json.dumps(facts))
    again = path_gradients.measure(net, small_set(), replace(plan, batches=2), tmp_path)
    assert len(again.measurements()) == 6 and again.identity == facts["identity"]
    with pytest.raises(ValueError, match="holds another run .data.hash: expected '[0-9a-f]{64}', found"):
        path_gradients.measure(net, small_set(seed=1), plan, tmp_path)


def test_a_checkpoint_with_a_hash_without_a_version_can_be_resumed(tmp_path: Path) -> None:
    recipe, file = Recipe(epochs=1, batch_size=16, warmup_steps=1), tmp_path / "checkpoint.safetensors"
    torch.manual_seed(0)
    net = models.preact_resnet(8, 4)
    train(net, small_set(), recipe, file)
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, {**metadata, "data": small_set().fingerprint(like="0" * 64)})
    again = models.preact_resnet(8, 4)
    train(again, small_set(), recipe, file)
    assert models.fingerprint(again) == models.fingerprint(net)
    with pytest.raises(ValueError, match="is of another data"):
        train(models.preact_resnet(8, 4), small_set(seed=1), recipe, file)


# Images left out, in the records of runs


def test_runs_record_the_names_of_images_left_out(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    write_folders(tmp_path / "set", images)
    torch.manual_seed(0)
    models.save(models.preact_resnet(8, 4, 2), tmp_path / "net.safetensors")
    (tmp_path / "set" / "val" / "class0" / "9.png").write_bytes(b"")
    flags = ["--data", tmp_path / "set", "--skip-broken"]
    broken = pathnet_("gradients", *flags[:2], "--weights", tmp_path / "net.safetensors", "--out", tmp_path / "run")
    assert (
        broken.status == 1
        and "val/class0/9.png is not a readable image" in broken.err
        and broken.err.count("\n") == 1
    )
    few = ["--batches", 1, "--batch-size", 4]
    with pytest.warns(RuntimeWarning, match="data: left out 1 of 17 images"):
        ended = pathnet_(
            "gradients", *flags, "--weights", tmp_path / "net.safetensors", "--out", tmp_path / "run", *few
        )
    assert ended.status == 0, ended.err
    assert results.read(tmp_path / "run").identity["data"]["skipped"] == ["val/class0/9.png"]
    with pytest.warns(RuntimeWarning, match="data: left out 1 of 17 images"):
        ended = pathnet_(
            "lesion-many", *flags, "--weights", tmp_path / "net.safetensors", "--out", tmp_path / "study",
            "--draws", 1, "--deletions", 1,
        )  # fmt: skip
    assert ended.status == 0, ended.err
    assert results.read(tmp_path / "study" / "lesion-many").identity["data"]["skipped"] == ["val/class0/9.png"]
    with pytest.warns(RuntimeWarning, match="data: left out 1 of 17 images"):
        ended = pathnet_(
            "train", *flags, "--out", tmp_path / "trained.safetensors", "--depth", 8, "--width", 2, "--epochs", 1,
            "--batch-size", 8, "--warmup-steps", 1,
        )  # fmt: skip
    assert ended.status == 0, ended.err


# Arguments


def other_split(**changes: object) -> Data:
    loaded = small_set()
    return replace(loaded, **changes)  # type: ignore[arg-type]


IMAGE = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
LABELS = torch.tensor([0, 1])


class Unlabelled(InMemory):
    """A split defined by a user, with labels of another type."""

    def __init__(self) -> None:
        object.__setattr__(self, "images", IMAGE)
        object.__setattr__(self, "labels", LABELS.float())


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "labels too high": (
        lambda: Data("d", InMemory(IMAGE, torch.tensor([0, 2])), InMemory(IMAGE, LABELS), ("a", "b")),
        r"train: expected labels from 0 to 1 \(the classes\), got 2 in row 1",
    ),
    "labels below zero": (
        lambda: Data("d", InMemory(IMAGE, LABELS), InMemory(IMAGE, LABELS - 1), ("a", "b")),
        "test: expected labels from 0 to 1 .*, got -1 in row 0",
    ),
    "labels on disk": (
        lambda: other_split(train=OnDisk([Path("x.png")], torch.tensor([10]), 8)),
        r"train: expected labels from 0 to 9 .*, got 10 in row 0 \(x.png\)",
    ),
    "no images": (lambda: other_split(test=InMemory(IMAGE[:0], LABELS[:0])), "test: expected at least one image"),
    "other shapes": (
        lambda: other_split(test=InMemory(IMAGE, LABELS)),
        r"test: expected .*\[3, 8, 8\].*, got \[3, 4",
    ),
    "float images": (lambda: InMemory(IMAGE.float(), LABELS), "images: expected uint8"),
    "images of no tensor": (lambda: InMemory([1], LABELS), "images: expected a tensor, got a list"),  # type: ignore[arg-type]
    "float labels": (lambda: InMemory(IMAGE, LABELS.float()), "labels: expected int64"),
    "fewer labels": (lambda: InMemory(IMAGE, LABELS[:1]), r"labels: expected int64 \[2\]"),
    "labels of files": (lambda: OnDisk([Path("x")], LABELS, 8), r"labels: expected int64 \[1\]"),
    "files of text": (lambda: OnDisk(["x"], LABELS[:1], 8), "files: expected a sequence of paths"),  # type: ignore[list-item]
    "no side": (lambda: OnDisk([Path("x")], LABELS[:1], 0), "side: expected an integer from 1"),
    "files of none": (lambda: OnDisk(None, LABELS[:1], 8), "files: expected a sequence of paths, got None"),  # type: ignore[arg-type]
    "no split": (
        lambda: other_split(train=[IMAGE]),
        "train: expected a split, such as InMemory or OnDisk, got a list",
    ),
    "a split's labels": (lambda: other_split(test=Unlabelled()), r"test.labels: expected int64 \[2\], got a tensor"),
    "classes": (lambda: other_split(classes="abcdefghij"), "classes: expected a tuple of at least one name"),
    "padding": (lambda: other_split(crop_padding=-1), "crop_padding: expected an integer of at least 0"),
    "flip": (lambda: other_split(flip="no"), "flip: expected True or False"),
    "batch size": (lambda: small_set().random_batch(2.5, 0, 0), "batch_size: expected an integer"),  # type: ignore[arg-type]
    "batch of none": (lambda: small_set().random_batch(0, 0, 0), "batch_size: expected an integer of at least 1"),
    "seed": (lambda: small_set().random_batch(2, -1, 0), "seed: expected an integer of at least 0"),
    "batch": (lambda: small_set().random_batch(2, 0, None), "batch: expected an integer"),  # type: ignore[arg-type]
    "test batches": (lambda: small_set().test_batches(0), "size: expected an integer of at least 1, got 0"),
    "normalised twice": (lambda: small_set().normalise(IMAGE.float()), "images: expected uint8"),
    "one image": (lambda: small_set().normalise(IMAGE[0]), r"images: expected shape \[\*, 3, \*, \*\]"),
    "grey": (lambda: small_set().normalise(IMAGE[:, :1]), r"images: expected shape \[\*, 3, \*, \*\]"),
    "not normalised": (
        lambda: small_set().augment(IMAGE, np.random.default_rng(0)),
        "images: expected a floating-point tensor",
    ),
    "generator": (
        lambda: small_set().augment(IMAGE.float(), torch.Generator()),  # type: ignore[arg-type]
        "rng: expected a numpy.random.Generator, got a Generator",
    ),
    "mirrored numbers": (
        lambda: small_set().augment(IMAGE.float(), np.random.default_rng(0), torch.zeros(len(IMAGE))),
        r"mirrored: expected bool \[B\], got a tensor",
    ),
    "mirrored of another batch": (
        lambda: small_set().augment(IMAGE.float(), np.random.default_rng(0), torch.zeros(5, dtype=torch.bool)),
        r"mirrored: expected shape \[\d\], got ",
    ),
    "mirrored of no tensor": (
        lambda: small_set().augment(IMAGE.float(), np.random.default_rng(0), True),  # type: ignore[arg-type]
        "mirrored: expected a tensor, got True",
    ),
    "synthetic images": (lambda: data.synthetic(images=0), "images: expected an integer of at least 1, got 0"),
    "synthetic classes of little": (
        lambda: data.synthetic(classes=1 << 31, shape=(1, 1, 1)),
        "classes: expected an integer from 1 to 65536, got 2147483648",
    ),
    "many synthetic images": (
        lambda: data.synthetic(images=1 << 31),
        "images: expected an integer from 1 to 1398101, got 2147483648",
    ),
    "large synthetic images": (
        lambda: data.synthetic(shape=(3, 1 << 20, 1 << 20)),
        "shape: expected at most 536,870,912 values in all channels, got 3298534883328",
    ),
    "synthetic classes": (lambda: data.synthetic(classes=True), "classes: expected an integer"),
    "synthetic shape": (lambda: data.synthetic(shape=(8, 8)), r"shape: expected \(C, H, W\)"),  # type: ignore[arg-type]
    "synthetic side": (lambda: data.synthetic(shape=(3, 0, 8)), "shape: expected an integer of at least 1, got 0"),
    "name": (lambda: data.load(3), "data: expected digits, synthetic or an existing folder, got 3"),  # type: ignore[arg-type]
    "skip": (lambda: data.load("digits", "yes"), "skip_broken: expected True or False"),  # type: ignore[arg-type]
    "folder": (lambda: data.cifar10(None), "data: expected the path of a folder, got None"),  # type: ignore[arg-type]
    "folder's side": (lambda: data.class_folders(".", "8"), "side: expected an integer"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what: str) -> None:
    call, message = BAD[what]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_a_single_pixel_is_normalised_although_it_has_no_deviation() -> None:
    loaded = data.synthetic(images=1, shape=(1, 1, 1))
    assert torch.equal(loaded.normalise(loaded.train.take(torch.tensor([0]))), torch.zeros(1, 1, 1, 1))
