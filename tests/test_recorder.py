"""A recorder: one copy of the network for all batches, one choice of the engine, errors that name the argument."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.cases import SMALL
from torch import nn

import pathnet
from pathnet import engines, native
from pathnet.engines.cpu import CpuEngine, CpuWalk
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine, ReferencePrepared
from pathnet.engines.tables import BlockColumn
from pathnet.recording import cross_entropy

CASE = SMALL[1]
CODES = pathnet.paths.enumerate_all(6)[::5]
needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
ENGINES = ["reference", pytest.param("cpu", marks=needs_native)]


@pytest.mark.parametrize("at", ["y0", "image", "stem_weight"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_batch_is_recorded_as_by_record(engine: str, at: Any) -> None:
    net = CASE.net()
    recorder = pathnet.Recorder(net, engine=engine, at=at)
    for seed in (0, 1, 0):
        images, labels = CASE.images(seed)
        tape, expected = recorder(images, labels), pathnet.record(net, images, labels, engine=engine, at=at)
        assert torch.equal(tape.path_gradient_norms(CODES), expected.path_gradient_norms(CODES))
        assert torch.equal(tape.gradient(), expected.gradient()) and torch.equal(tape.output, expected.output)
        assert tape.loss == expected.loss and tape.nbytes == expected.nbytes


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_changes_of_the_network_do_not_reach_it_and_recording_does_not_change_it(bn: Any) -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    recorder = pathnet.Recorder(net, bn, "reference")
    before = {name: tensor.clone() for name, tensor in recorder._net.state_dict().items()}
    first = recorder(images, labels)
    norms = first.path_gradient_norms(CODES)
    for tensor in net.state_dict().values():
        tensor.zero_()
    assert torch.equal(recorder(images, labels).path_gradient_norms(CODES), norms)
    recorder(*CASE.images(1))
    assert torch.equal(first.path_gradient_norms(CODES), norms)
    after = recorder._net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Counting(ReferenceEngine):
    """Refuses inputs of blocks of side 4, and knows how often it prepared a network."""

    name = "counting"

    def __init__(self) -> None:
        self.shapes: list[Sequence[int]] = []

    def unsupported(self, job: Job) -> str | None:
        return "no side of 4" if job.y0_shape[1] == 4 else None

    def prepare(self, job: Job) -> ReferencePrepared:
        self.shapes.append(tuple(job.y0_shape))
        return super().prepare(job)


def test_the_engine_is_chosen_once_for_images_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr(engines, "ENGINES", (counting, ReferenceEngine()))
    recorder, (images, labels) = pathnet.Recorder(CASE.net()), CASE.images()
    assert counting.shapes == []
    assert recorder.engine_for(images) == "counting"
    for batch in (3, 2, 3):
        assert recorder(images[:batch], labels[:batch]).engine == "counting"
    recorder.routed_outputs(images, torch.ones(1, 6, 2))
    assert counting.shapes == [(4, 8, 8)]
    with pytest.warns(RuntimeWarning, match=r"'reference' was chosen; .* \(counting: no side of 4"):
        assert recorder(images[..., :4, :4], labels).engine == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recorder(images[..., :4, :4] * 2, labels).engine == "reference"
        assert recorder(images, labels).engine == "counting"
    assert counting.shapes == [(4, 8, 8), (4, 8, 8)]


@needs_native
def test_tapes_share_the_packed_weights() -> None:
    recorder, (images, labels) = pathnet.Recorder(CASE.net(), engine="cpu"), CASE.images()
    one, other = (recorder(images, labels)._record.walk for _ in range(2))
    assert isinstance(one, CpuWalk)
    shared = {tensor.data_ptr() for tensor in one.tensors} & {tensor.data_ptr() for tensor in other.tensors}
    assert shared == {one.backward.data_ptr()}


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_may_share_one(engine: str) -> None:
    recorder = pathnet.Recorder(CASE.net(), engine=engine)
    batches = [CASE.images(seed) for seed in range(8)]
    expected = [recorder(*batch).path_gradient_norms(CODES) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        norms = list(pool.map(lambda batch: recorder(*batch).path_gradient_norms(CODES), batches))
    assert all(map(torch.equal, norms, expected))


def test_of_several_things_that_are_wrong_the_first_is_told() -> None:
    recorder, (images, labels) = pathnet.Recorder(CASE.net()), CASE.images()
    with pytest.raises(ValueError, match="images: expected finite values, got NaN or infinity"):
        recorder(images / 0, labels + 5)
    with pytest.raises(ValueError, match=r"target: expected labels 0 to 4, got -2 to \d"):
        recorder(images, labels.index_fill(0, torch.tensor([1]), -2))
    broken = CASE.net()
    broken.head.linear.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="target: expected labels 0 to 4"):
        pathnet.record(broken, images, labels + 5)
    with pytest.raises(ValueError, match="net: its loss on these images is nan"):
        pathnet.record(broken, images, labels)
    with pytest.raises(ValueError, match="net: its loss on these images is inf"):
        pathnet.record(CASE.net(), images, labels, loss=lambda output, _: output.sum() + torch.inf)


def test_the_cross_entropy_of_a_label_that_is_no_class_is_nan() -> None:
    output, labels = torch.randn(3, 5), torch.tensor([0, 4, 5])
    assert cross_entropy(output, labels).isnan()
    assert cross_entropy(output, torch.tensor([0, 4, -100])).isnan()
    expected = nn.functional.cross_entropy(output.double(), labels - 1 + (labels == 0).long())
    assert torch.equal(cross_entropy(output, labels - 1 + (labels == 0).long()), expected)


def test_bad_arguments_of_a_recorder_are_named_when_it_is_made() -> None:
    no_net = "net: expected a pathnet ResidualNet"
    for arguments, message in (
        ({"net": nn.Linear(2, 2)}, f"{no_net}, got a Linear; pathnet.adapt.model, images. makes one$"),
        ({"net": "net"}, f"{no_net}, got 'net'$"),
        ({"bn": "eval"}, "bn: expected"),
        ({"precision": "float16"}, "precision: expected"),
        ({"at": "y1"}, "at: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            pathnet.Recorder(**{"net": CASE.net(), **arguments})  # type: ignore[arg-type]


@needs_native
def test_the_cpu_engine_packs_what_a_case_of_every_kind_needs() -> None:
    """The tables follow from the shape of ``y_0`` alone."""
    for case in SMALL:
        net = case.net()
        y = net.stem(case.images()[0])
        packed = CpuEngine().prepare(Job(net, "running", "float32", y.shape[1:], y.device))
        for block, row in zip(net.blocks, packed.tables.blocks.tolist(), strict=True):
            assert row[BlockColumn.CHANNELS : BlockColumn.OUT_CHANNELS] == list(y.shape[1:])
            y = block(y)
            assert row[BlockColumn.OUT_CHANNELS : BlockColumn.PAD_BEFORE] == list(y.shape[1:])
