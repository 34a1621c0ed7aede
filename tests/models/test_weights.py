from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import ROOT
from helpers.full_disk import largest_file
from torch import Tensor

from pathnet import models
from pathnet.models.weights import read_tensors, write_tensors

ASSETS = sorted((ROOT / "assets").glob("*.safetensors"))


def written(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a file without a digest, and return its path."""
    safetensors.torch.save_file(tensors, file, metadata)
    return file


def small() -> models.ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 2, in_channels=1)


def load_error(file: Path) -> str:
    with pytest.raises(ValueError) as failure:
        models.load(file)
    assert str(file) in str(failure.value) and "\n" not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize("file", ASSETS, ids=lambda file: file.stem)
def test_weights_from_before_digests_are_loaded(file: Path) -> None:
    net = models.load(file)
    assert net.config is not None and not net.training
    for name, tensor in read_tensors(file)[0].items():
        assert torch.equal(net.state_dict()[name], tensor.to(net.state_dict()[name].dtype))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model": "preact_resnet", "depth": 6_000_000_002},
            "config.depth: expected at most 1, as there are tensors",
        ),
        ({"model": "resnet", "depth": 6 * 10**30 + 2}, "config.depth: expected at most 1, as there are tensors"),
        ({"model": "highway", "depth": 6_000_000_002}, "config.depth: expected at most 1, as there are tensors"),
        ({"model": "vgg", "depth": 10**9}, "config.depth: expected at most 1, as there are tensors"),
        (
            {"model": "preact_resnet", "depth": 6e9 + 2},
            "depth: expected an integer from 1 to 100000, got 6000000002.0",
        ),
        ({"model": "vgg", "width": 10**4}, "'stem.conv.weight'"),
        ({"model": "vgg", "width": 10**30}, "width: expected an integer from 1 to 65536, got 10+"),
        ({"model": "vgg", "stages": 10**9}, "stages: expected an integer from 1 to 32, got 1000000000"),
        ({"model": "preact_resnet_imagenet", "width": 2000}, "no tensor 'stem.conv.weight' in it"),
        ([7], "config: expected an object with the name of a model, got a list"),
        ("vgg", "config: expected an object with the name of a model, got 'vgg'"),
        ({"model": ["vgg"]}, "config: expected a model among .*, got a list"),
        ({}, "config: expected a model among .*, got None"),
    ],
    ids=str,
)
def test_a_small_file_builds_no_large_network(tmp_path: Path, config: Any, message: str) -> None:
    file = written(tmp_path / "net", {"x": torch.zeros(1)}, {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"^weights: {file}.*{message}") as failure:
        models.load(file)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("model", ["preact_resnet", "resnet", "vgg", "highway", "preact_resnet_imagenet"])
@pytest.mark.parametrize("value", [7.5, "8", None, [8], -1, 0, math.nan, True], ids=repr)
@pytest.mark.parametrize("name", ["depth", "width", "num_classes"])
def test_sizes_that_are_no_positive_integers_are_named(model: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer (from 1 to \d+|of at least 1), got "):
        models.build({"model": model, **({} if model in ("vgg", "highway") else {"depth": 50}), name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "preact_resnet", "depth": 8, "survival": "x"}, "survival: expected a finite number above 0"),
        ({"model": "preact_resnet", "depth": 8, "survival": None}, "survival: expected a finite number above 0"),
        (
            {"model": "preact_resnet", "depth": 8, "block": ["basic"]},
            "block: expected 'basic' or 'bottleneck', got a list",
        ),
        (
            {"model": "preact_resnet", "depth": 8, "shortcut": None},
            "shortcut: expected 'projection' or 'pad' or 'pad_around', got None",
        ),
        ({"model": "highway", "gate_bias": "x"}, "gate_bias: expected a finite number from .*, got 'x'"),
        ({"model": "highway", "gate_bias": math.nan}, "gate_bias: expected a finite number from .*, got nan"),
        ({"model": "vgg", "stages": 0.5}, "stages: expected an integer from 1 to 32, got 0.5"),
        ({"model": "vgg", 7: 0.5}, "config: "),
    ],
)
def test_arguments_of_other_kinds_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as failure:
        models.build(arguments)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, "no JSON", "", "1" * 5000, '{"model":'], ids=lambda text: text[:10]
)
def test_metadata_that_is_no_json_is_reported_in_one_line(tmp_path: Path, text: str) -> None:
    message = load_error(written(tmp_path / "net", {"x": torch.zeros(1)}, {"config": text}))
    assert "is not a readable safetensors file of pathnet's" in message and len(message) < 1000


def test_a_header_of_nested_lists_is_reported_in_one_line(tmp_path: Path) -> None:
    header = ('{"x":' + "[" * 100_000 + "]" * 100_000 + "}").encode()
    (tmp_path / "net").write_bytes(struct.pack("<Q", len(header)) + header)
    load_error(tmp_path / "net")


def test_unknown_metadata_is_rejected(tmp_path: Path) -> None:
    """Check this since the name of the digest itself may be damaged."""
    net = small()
    texts = {"config": json.dumps(net.config), "rha256": json.dumps("0" * 64)}
    assert "is not a file of pathnet's, or damaged" in load_error(written(tmp_path / "net", net.state_dict(), texts))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stem.weight", lambda t: t > 0, "expected torch.float32, got torch.bool"),
        ("stem.weight", lambda t: t.int(), "expected torch.float32, got torch.int32"),
        ("stem.weight", lambda t: t.to(torch.complex64), "expected torch.float32, got torch.complex64"),
        ("stem.weight", lambda t: t.to(torch.float8_e5m2), "expected torch.float32, got torch.float8_e5m2"),
        ("stem.weight", lambda t: t.log(), "expected finite values, got NaN or infinity"),
        ("head.linear.bias", lambda t: t + math.inf, "expected finite values, got NaN or infinity"),
        ("blocks.0.bns.0.running_var", lambda t: t - 2, "expected values of at least 0, got -1"),
        ("blocks.0.bns.0.running_mean", lambda t: t / 0, "expected finite values, got NaN or infinity"),
        ("blocks.0.bns.0.num_batches_tracked", lambda t: t - 1, "expected values of at least 0, got -1"),
        ("blocks.0.bns.0.num_batches_tracked", lambda t: t.float(), "expected torch.int64, got torch.float32"),
        ("stem.weight", lambda t: t[1:], "expected shape"),
    ],
)
def test_tensors_that_a_network_cannot_have_are_named(tmp_path: Path, name: str, change: Any, message: str) -> None:
    net = small()
    tensors = {**net.state_dict(), name: change(net.state_dict()[name]).contiguous()}
    for file in (written(tmp_path / "old", tensors, {"config": json.dumps(net.config)}), tmp_path / "new"):
        if file.name == "new":
            write_tensors(file, tensors, {"config": net.config})
        words = load_error(file)
        assert repr(name) in words and message in words


def test_a_network_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    net, file = small(), tmp_path / "net"
    models.save(net, file)
    before = file.read_bytes()
    with torch.no_grad():
        net.stem.weight[0, 0, 0, 0] = 1e5  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"^net: stem.weight: expected finite values, .* in torch.float16$"):
        models.save(net, file, torch.float16)
    for dtype in (torch.int8, torch.complex64, torch.bool):
        with pytest.raises(ValueError, match=f"^dtype: expected one among .*, got {dtype}"):
            models.save(net, file, dtype)
    with torch.no_grad():
        net.stem.weight[0, 0, 0, 0] = math.nan  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"^net: stem.weight: expected finite values, got NaN or infinity$"):
        models.save(net, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_tensors_of_any_type_and_shape_come_back(tmp_path: Path) -> None:
    types = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).T.to(dtype) for dtype in types}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(7.0), "last": torch.randn(1, 2, 3, 4)}
    tensors["last"] = tensors["last"].contiguous(memory_format=torch.channels_last)
    write_tensors(tmp_path / "file", tensors, {"words": ["\N{GREEK SMALL LETTER PI}", 1 / 3]})
    back, metadata = read_tensors(tmp_path / "file")
    assert metadata == {"words": ["\N{GREEK SMALL LETTER PI}", 1 / 3]} and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in back)


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path) -> None:
    file = tmp_path / "net"
    models.save(small(), file)
    before = file.read_bytes()
    with largest_file(1000), pytest.raises(OSError) as failure:
        models.save(small(), file)
    assert str(failure.value) == f"weights: {file} cannot be written (File too large)"
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    models.save(small(), tmp_path / "net")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    models.load(tmp_path / "net")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.save(None, "net"), "net: expected a pathnet ResidualNet, got None"),  # type: ignore[arg-type]
        (lambda: models.fingerprint("net"), "net: expected a pathnet ResidualNet, got 'net'"),  # type: ignore[arg-type]
        (lambda: models.save(small(), 3), "path: expected the path of a file or folder, got 3"),  # type: ignore[arg-type]
        (lambda: models.load(["net"]), "path: expected the path of a file or folder, got a list"),  # type: ignore[arg-type]
        (lambda: models.load("a\0b"), "path: expected the path of a file or folder, got 'a.x00b'"),
        (
            lambda: models.fingerprint(small().to("meta")),
            "net: expected tensors with values, got .* on the meta device",
        ),
        (
            lambda: models.save(small().to("meta"), "net"),
            "net: expected tensors with values, got .* on the meta device",
        ),
    ],
)
def test_networks_and_paths_of_other_kinds_are_named(
    call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
    assert not list(tmp_path.iterdir())
