"""The engines of a training: which one runs, what a checkpoint keeps of it, and how a training changes it."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import SMALL, Interrupt, fresh
from helpers.triton_kernels import import_kernels

from pathnet import data, models, native, nn
from pathnet.models import ResidualNet
from pathnet.models.weights import read_tensors, write_tensors
from pathnet.training import train
from pathnet.training.engines import Engine, block_engine


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


def interrupted(images: data.Data, file: Path, engine: Engine) -> Path:
    """Write the checkpoint of a training that is interrupted in its second epoch, after five of eight steps."""

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == 5:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(fresh(), images, SMALL, file, interrupt, engine=engine)
    return file


def trained(images: data.Data, engine: Engine, checkpoint: Path | None = None) -> ResidualNet:
    net = fresh()
    train(net, images, SMALL, checkpoint, engine=engine)
    return net


def rewritten(file: Path, engines: Any) -> Path:
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, {**metadata, "engines": engines})
    return file


def close(net: ResidualNet, other: ResidualNet) -> bool:
    return all(
        torch.allclose(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-4)
        for name, tensor in net.state_dict().items()
    )


def test_blocks_train_fused_unless_told_otherwise(images: data.Data, tmp_path: Path) -> None:
    default, plain = trained(images, "auto", tmp_path / "default"), trained(images, "none", tmp_path / "plain")
    engines = {name: read_tensors(tmp_path / name)[1]["engines"] for name in ("default", "plain")}
    assert engines == {"default": ["cpu"], "plain": ["none"]}
    assert models.fingerprint(trained(images, "cpu")) == models.fingerprint(default) != models.fingerprint(plain)
    assert close(default, plain)


@pytest.mark.parametrize("engine", ["cpu", "none"])
def test_by_default_a_training_goes_on_by_the_engine_of_its_checkpoint(
    images: data.Data, tmp_path: Path, engine: Engine
) -> None:
    resumed = trained(images, "auto", interrupted(images, tmp_path / "net", engine))
    assert models.fingerprint(resumed) == models.fingerprint(trained(images, engine))
    assert read_tensors(tmp_path / "net")[1]["engines"] == [engine]


@pytest.mark.parametrize(("first", "second"), [("none", "cpu"), ("cpu", "none")])
def test_a_training_goes_on_by_another_engine_that_is_named(
    images: data.Data, tmp_path: Path, first: Engine, second: Engine
) -> None:
    resumed = trained(images, second, interrupted(images, tmp_path / "net", first))
    assert close(resumed, trained(images, first))
    assert read_tensors(tmp_path / "net")[1]["engines"] == [first, second]
    # The training has ended, so an engine takes no further step.
    assert models.fingerprint(trained(images, first, tmp_path / "net")) == models.fingerprint(resumed)
    assert read_tensors(tmp_path / "net")[1]["engines"] == [first, second]


def test_checkpoints_without_an_engine_are_those_of_pytorchs_operators(images: data.Data, tmp_path: Path) -> None:
    file = interrupted(images, tmp_path / "net", "none")
    tensors, metadata = read_tensors(file)
    del metadata["engines"]
    write_tensors(file, tensors, metadata)
    assert models.fingerprint(trained(images, "auto", file)) == models.fingerprint(trained(images, "none"))
    assert read_tensors(file)[1]["engines"] == ["none"]


def test_a_checkpoint_whose_engine_is_not_here_goes_on_with_a_warning(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_kernels()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = rewritten(interrupted(images, tmp_path / "net", "cpu"), ["triton"])
    with pytest.warns(
        RuntimeWarning, match=r"^checkpoint: .*net was trained by the engine triton, which cannot run h"
    ):
        resumed = trained(images, "auto", file)
    assert models.fingerprint(resumed) == models.fingerprint(trained(images, "cpu"))
    assert read_tensors(file)[1]["engines"] == ["triton", "cpu"]


@pytest.mark.parametrize("engines", ["cpu", ["cuda"], [3], None, {}], ids=str)
def test_a_checkpoint_of_unknown_engines_is_named(images: data.Data, tmp_path: Path, engines: Any) -> None:
    file = rewritten(interrupted(images, tmp_path / "net", "cpu"), engines)
    with pytest.raises(
        ValueError, match=r"^checkpoint: .*net: engines: expected a list of cpu, triton and none, got "
    ):
        trained(images, "auto", file)


@pytest.mark.parametrize("wrong", [None, "cuda", 1, ["cpu"]], ids=str)
def test_what_is_no_engine_is_named(images: data.Data, wrong: Any) -> None:
    with pytest.raises(ValueError, match="^engine: expected 'auto' or 'cpu' or 'triton' or 'none', got "):
        trained(images, wrong)


@pytest.mark.parametrize(
    "net",
    [models.vgg(6, 4, stages=2), models.highway(8, 4), models.resnet(8, 4)],
    ids=["vgg", "highway", "resnet"],
)
def test_blocks_that_no_engine_serves_train_as_they_are(images: data.Data, net: ResidualNet) -> None:
    engine = block_engine(net, "auto")
    assert engine.facts == {"engine": "none", "fused_blocks": 0, "blocks": net.n}
    assert engine.line.startswith(f"PyTorch's operators train all {net.n} blocks (block 0: ")
    with pytest.raises(
        ValueError, match=r"^engine: expected one that can run a block of .* on cpu, got 'cpu' \(block 0"
    ):
        train(net, images, SMALL, engine="cpu")
    assert len(train(net, images, dataclasses.replace(SMALL, epochs=1))) == 1


def test_blocks_with_hooks_train_as_they_are_among_fused_ones(images: data.Data) -> None:
    net, calls = fresh(), []
    net.blocks[1].convs[0].register_forward_hook(lambda *_: calls.append(net.training))
    engine = block_engine(net, "auto")
    assert engine.facts == {"engine": "cpu", "fused_blocks": 2, "blocks": 3}
    assert engine.line.startswith("fused kernels of the cpu engine train 2 of 3 blocks (block 1: ")
    train(net, images, SMALL)
    assert calls.count(True) == 8 and close(net, trained(images, "none"))


def test_an_engine_that_trains_every_block_needs_no_reason() -> None:
    assert block_engine(fresh(), "cpu").line == "fused kernels of the cpu engine train 3 of 3 blocks"
    assert block_engine(fresh(), "none").line == "PyTorch's operators train all 3 blocks"


def test_a_fused_network_trains_as_the_network_that_it_views(images: data.Data) -> None:
    net = fresh()
    train(nn.fuse(net, "none"), images, SMALL)
    assert models.fingerprint(net) == models.fingerprint(trained(images, "cpu")) and not net.training


def test_an_engine_that_is_missing_is_told(images: data.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LOADED", False)
    monkeypatch.setattr(native, "WHY_NOT", "the native library is not built")
    with pytest.warns(RuntimeWarning, match="^training runs PyTorch's operators: the native library is not built$"):
        net = trained(images, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert models.fingerprint(net) == models.fingerprint(trained(images, "none"))
        train(models.highway(8, 4), images, dataclasses.replace(SMALL, epochs=1))
