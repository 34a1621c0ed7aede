"""Captured and replayed passes, on stubs of CUDA's streams, events and graphs; kernels are interpreted."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import stub_cuda
from helpers.cases import post_activation_net
from helpers.interpreted import Interpreted, small_net
from helpers.judging import check, check_sums, random_routings, reference_outputs
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import FORWARD
from torch import Tensor

import pathnet
from pathnet import engines
from pathnet.engines.triton import TritonWalk
from pathnet.engines.triton.graphs import Graphs, _Device, capacity_for
from pathnet.engines.triton.limits import room_of
from pathnet.engines.triton.recording import RecordingPass
from pathnet.models import ResidualNet

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU has graphs: tests/gpu/triton")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> stub_cuda.Cuda:
    from helpers import interpreter

    interpreter.correct()
    interpreter.big_tiles(monkeypatch)
    monkeypatch.setattr(engines, "ENGINES", (Interpreted(), *engines.ENGINES))
    return stub_cuda.install(monkeypatch)


def small(seed: int, kind: str, bn: Any) -> tuple[ResidualNet, Tensor, Tensor]:
    if kind == "post":
        return post_activation_net(seed, bn)
    return small_net(seed)


def graphs_of(tape: pathnet.Tape) -> Graphs:
    assert isinstance(tape._record.walk, TritonWalk)
    return tape._record.walk.graphs


@pytest.mark.parametrize(
    ("seed", "kind", "bn", "precision"),
    [
        (0, "pre", "running", "float32"),
        (1, "pre", "batch", "bfloat16"),
        (12, "post", "batch", "float32"),
        (16, "post", "running", "float32"),
    ],
)
def test_what_is_replayed_is_right(seed: int, kind: str, bn: Any, precision: Any, cuda: stub_cuda.Cuda) -> None:
    """Records, backward and forward passes: launched kernel by kernel, captured, and replayed with other routings
    than the captured ones, or with fewer; each over its own record."""
    net, images, labels = small(seed, kind, bn)
    recorder, exact = pathnet.Recorder(net, bn, "interpreted", precision), in_float64(net, bn)
    tapes = []
    for factor in (1.0, 0.7, -1.1):
        tapes.append(recorder(images * factor, labels))
        assert relative_error(tapes[-1].output, exact(images.double() * factor).detach()) < FORWARD
    assert cuda.graphs == 1 and len(cuda.of("replay")) == 2
    for tape, routings in zip(tapes, range(3), strict=True):
        check(tape, random_routings(net.n, seed + routings), precision, gradients=True)
    # Each tape runs norms, then gradients; five routings use a graph for six.
    assert cuda.graphs == 2 and len(cuda.of("replay")) == 2 + 5
    check(tapes[0], random_routings(net.n, seed)[:4].flip(0), precision, gradients=False)
    check(tapes[2], random_routings(net.n, seed)[1:], precision, gradients=False)
    check_sums(tapes[1], random_routings(net.n, seed)[3], precision)
    for routing in (random_routings(net.n, seed), random_routings(net.n, seed + 1).flip(0)):
        outputs = recorder.routed_outputs(images, routing)
        for output, expected in zip(outputs, reference_outputs(exact, images, routing), strict=True):
            assert relative_error(output, expected) < FORWARD
    # The forward passes have overwritten this record, the last in the arena.
    check(tapes[2], random_routings(net.n, seed), precision, gradients=False)


def test_a_tape_outlives_recorder_and_graphs_and_is_left_as_it_was(cuda: stub_cuda.Cuda) -> None:
    net, images, labels = small(1, "pre", "batch")
    recorder = pathnet.Recorder(net, "batch", "interpreted")
    tapes, saved = [], []
    for factor in (1.0, 0.5, 2.0, 0.3):
        tapes.append(recorder(images * factor, labels))
        saved.append([tensor.clone() for tensor in tapes[-1]._record.walk.tensors])
    codes = pathnet.paths.enumerate_all(net.n)[:3]
    first = [tape.path_gradient_norms(codes) for tape in tapes]
    graphs = graphs_of(tapes[0])
    graphs._graphs.clear()
    del recorder
    gc.collect()
    for tape, norms in zip(reversed(tapes), reversed(first), strict=True):
        assert torch.equal(tape.path_gradient_norms(codes), norms)
    for tape, tensors in zip(tapes, saved, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors, tape._record.walk.tensors, strict=True))


def test_a_network_keeps_a_few_graphs_in_the_memory_of_the_largest(
    cuda: stub_cuda.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 6
    monkeypatch.setattr("pathnet.engines.triton.graphs.MAX_GRAPHS", most)
    net, images, labels = small(0, "pre", "running")
    recorder = pathnet.Recorder(net, "running", "interpreted")
    images, labels = images[:1].repeat(12, 1, 1, 1), labels[:1].repeat(12)
    tape = [recorder(images, labels) for _ in range(2)][-1]
    graphs = graphs_of(tape)
    largest, memory = graphs._arena, weakref.ref(graphs._arena)
    assert largest is not None
    passes = []
    for batch in range(1, most + 1):
        for _ in range(2):
            recorder(images[:batch], labels[:batch])
        passes.append(weakref.ref(next(reversed(graphs._graphs.values())).body))
        assert graphs._arena is largest and len(graphs._graphs) <= most
    # The least recently used graph is dropped.
    assert ("record", 12) not in graphs._graphs and all(body() is not None for body in passes)
    recorder(images[:1], labels[:1])
    recorder(images, labels)
    gc.collect()
    assert passes[0]() is not None and passes[1]() is None and len(graphs._graphs) == most
    # A larger arena replaces this one, which is freed first.
    del largest, tape
    bigger = images.repeat(2, 1, 1, 1), labels.repeat(2)
    for _ in range(2):
        recorder(*bigger)
    gc.collect()
    assert memory() is None and list(graphs._graphs) == [("record", 24)]
    # Graphs are dropped only after the device is done.
    assert len(cuda.of("synchronize")) == 3
    del graphs, recorder
    gc.collect()
    assert len(cuda.of("synchronize")) == 4


def test_where_memory_is_short_passes_are_launched_one_by_one(
    cuda: stub_cuda.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller passes are replayed: one that was refused once drops no graphs."""
    from pathnet.engines.triton import graphs

    net, images, labels = small(1, "pre", "running")
    recorder = pathnet.Recorder(net, "running", "interpreted")
    tapes, limit = [recorder(images, labels) for _ in range(2)], 0

    def empty(*size: int, device: Any, **options: Any) -> Tensor:
        if torch.device(device).type != "meta" and size[0] > limit:
            raise torch.cuda.OutOfMemoryError
        return torch.empty(*size, device=device, **options)

    monkeypatch.setattr(graphs, "torch", SimpleNamespace(**{**vars(graphs.torch), "empty": empty}))
    codes = pathnet.paths.enumerate_all(net.n)
    norms = tapes[0].path_gradient_norms(codes)
    assert torch.equal(tapes[0].path_gradient_norms(codes), norms)
    network_graphs = graphs_of(tapes[0])
    assert cuda.graphs == 1 and network_graphs._arena is None and network_graphs._refused < math.inf
    limit = int(network_graphs._refused) - 1
    for _ in range(3):
        assert torch.equal(recorder(images, labels).path_gradient_norms(codes), norms)
    # The record is captured again, once; the backward pass is refused without an attempt.
    assert cuda.graphs == 2 and list(network_graphs._graphs) == [("record", len(images))]


def test_captures_are_on_a_stream_of_their_own_of_the_networks_device(cuda: stub_cuda.Cuda) -> None:
    class Nothing:
        def run(self) -> None:
            assert cuda.device == 1

    devices = [_Device.of(torch.device("cuda", 1)) for _ in range(2)]
    for device in devices:
        device.capture(Nothing(), None)
    streams = [note[2] for note in cuda.of("capture")]
    assert all(note[3] == 1 for note in cuda.of("capture")) and cuda.device == 0
    assert all(stream.device == torch.device("cuda", 1) for stream in streams)
    assert streams == [device.stream for device in devices] and streams[0] is not streams[1]
    assert all(stream is not cuda.stream for stream in streams)


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_during_a_capture(collects: bool, cuda: stub_cuda.Cuda) -> None:
    """The first run precedes the capture."""
    enabled: list[bool] = []

    class Looking:
        def run(self) -> None:
            enabled.append(gc.isenabled())

    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        _Device.of(torch.device("cuda", 1)).capture(Looking(), None)
        assert enabled == [collects, False] and gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize(("total", "room"), [(8 << 30, 2 << 30), (80 << 30, 4 << 30)])
def test_walks_take_no_more_than_a_quarter_of_a_gpus_memory(
    total: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    assert room_of(torch.device("cuda", 0)) == room


def test_captures_of_two_threads_come_one_after_the_other(cuda: stub_cuda.Cuda) -> None:
    failures: list[BaseException] = []

    class Slow:
        def run(self) -> None:
            time.sleep(0.02)

    def capture() -> None:
        try:
            _Device.of(torch.device("cuda", 0)).capture(Slow(), None)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and cuda.graphs == 4


def test_passes_on_several_streams_wait_for_each_other(cuda: stub_cuda.Cuda) -> None:
    net, images, labels = small(0, "pre", "running")
    recorder = pathnet.Recorder(net, "running", "interpreted")
    recorder(images, labels)
    tape = recorder(images, labels)
    device = graphs_of(tape)._device
    assert device is not None
    first, second = cuda.stream, type(cuda.stream)("cuda:0")
    cuda.notes.clear()
    cuda.stream = second
    recorder(images, labels)
    kinds = [note[0] for note in cuda.notes]
    assert kinds == ["wait_event", "lives", "replay", "record"]
    assert cuda.notes[0][1:] == (second, device.done) and cuda.notes[-1][1:] == (device.done, second)
    assert cuda.notes[1][1] is second and first is not second


def test_walks_of_several_threads_get_their_own_results(cuda: stub_cuda.Cuda) -> None:
    net, images, labels = small(1, "pre", "running")
    recorder = pathnet.Recorder(net, "running", "interpreted")
    tapes = [recorder(images * factor, labels) for factor in (1.0, 0.5)]
    codes = pathnet.paths.enumerate_all(net.n)[:4]
    expected = [tape.path_gradient_norms(codes) for tape in tapes]
    results: dict[int, list[Tensor]] = {0: [], 1: []}

    def walk(number: int) -> None:
        for _ in range(2):
            results[number].append(tapes[number].path_gradient_norms(codes))

    threads = [threading.Thread(target=walk, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, measured in results.items():
        assert len(measured) == 2 and all(torch.equal(norms, expected[number]) for norms in measured)


def test_an_interrupted_pass_leaves_nothing_that_counts_as_a_record(cuda: stub_cuda.Cuda) -> None:
    net, images, labels = small(1, "pre", "running")
    recorder = pathnet.Recorder(net, "running", "interpreted")
    tapes = [recorder(images * factor, labels) for factor in (1.0, 0.5)]
    codes = pathnet.paths.enumerate_all(net.n)[:2]
    expected = tapes[1].path_gradient_norms(codes)
    graphs, record = graphs_of(tapes[0]), tapes[1]._record.walk
    assert isinstance(record, TritonWalk) and graphs.holds(record.saved)

    def begin(recording: RecordingPass) -> None:
        recording.begin(torch.zeros_like(recording.forward._y0).permute(0, 3, 1, 2))

    key, device = ("record", len(images)), images.device
    with pytest.raises(KeyboardInterrupt), graphs.replayed(key, device, unneeded, begin):
        raise KeyboardInterrupt
    assert not graphs.holds(record.saved)
    assert torch.equal(tapes[1].path_gradient_norms(codes), expected)


def unneeded(allocate: Any) -> RecordingPass:
    raise AssertionError("the graph exists")


def test_capacities_leave_a_third_idle_at_most() -> None:
    capacities = [capacity_for(count) for count in range(1, 500)]
    assert all(count <= capacity < 1.5 * count + 1 for count, capacity in enumerate(capacities, 1))
    assert len(set(capacities)) == 18
    assert all(capacity_for(capacity) == capacity for capacity in capacities)
