"""What a recorder promises: one copy of the network for all batches, routed forward passes, few looks at a GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.cases import SMALL, random_net
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import EXACT_WALK, FLOAT32_SAMPLE_NORM
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pathnet
from pathnet import engines, native
from pathnet.engines.cpu import CpuEngine, CpuWalk
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine, ReferencePrepared, ReferenceWalk
from pathnet.engines.tables import BlockColumn
from pathnet.models import Block, ResidualNet
from pathnet.recording import Look, cross_entropy
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record

CASE = SMALL[1]
CODES = pathnet.paths.enumerate_all(6)[::5]

needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
ENGINES = ["reference", pytest.param("cpu", marks=needs_native)]


class PostActivation(Block):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.bn(self.conv(x)))

    def join(self, z: Tensor) -> Tensor:
        return z.relu_()


def post_activation() -> ResidualNet:
    torch.manual_seed(0)
    head = nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return ResidualNet(nn.Conv2d(3, 4, 3), [PostActivation(4) for _ in range(4)], head).eval()


# One copy for all batches


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
    with pytest.warns(RuntimeWarning, match="engine reference serves, since counting: no side of 4"):
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


# Routed forward passes


def routed_loop(net: ResidualNet, images: Tensor, routing: Tensor, bn: str) -> Tensor:
    """float64 [P, B, classes]"""
    net, outputs = in_float64(net, bn), []
    with torch.no_grad():
        for coefficients in routing.double():
            y = net.stem(images.double())
            for block, (a, c) in zip(net.blocks, coefficients, strict=True):
                y = block.join(a * block.skip(y) + c * block.residual(y))
            outputs.append(net.head(y))
    return torch.stack(outputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_ones_are_the_network_itself(engine: str) -> None:
    net, (images, _) = CASE.net(), CASE.images()
    outputs = pathnet.Recorder(net, engine=engine).routed_outputs(images, torch.ones(2, 6, 2))
    for own in outputs:
        torch.testing.assert_close(own, net(images).detach(), rtol=1e-6, atol=1e-6)
    double = pathnet.Recorder(net, precision="float64").routed_outputs(images, torch.ones(1, 6, 2))
    assert (
        double.dtype == torch.float64
        and relative_error(double[0], net.double()(images.double()).detach()) < EXACT_WALK
    )


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_a_deleted_block_is_as_if_it_had_never_been(bn: Any) -> None:
    """And its residual module is not looked at, whatever it would give."""
    net, (images, labels) = CASE.net(), CASE.images()
    same_shape = [i for i, block in enumerate(net.blocks) if block.projection is None]
    assert len(same_shape) == 4
    routing = torch.ones(4, 6, 2, dtype=torch.float64)
    routing[range(4), same_shape, 1] = 0
    outputs = pathnet.Recorder(net, bn, precision="float64").routed_outputs(images, routing)
    for i, own in zip(same_shape, outputs, strict=True):
        rest = [block for j, block in enumerate(net.blocks) if j != i]
        without = pathnet.record(ResidualNet(net.stem, rest, net.head), images, labels, bn, precision="float64")
        assert relative_error(own, without.output) < EXACT_WALK
    net.blocks[same_shape[2]].convs[0].weight.data.fill_(torch.nan)
    spoiled = pathnet.Recorder(net, bn, precision="float64").routed_outputs(images, routing[2:3])
    assert relative_error(spoiled[0], outputs[2]) < EXACT_WALK


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("make", [*(case.net for case in SMALL), post_activation])
def test_routings_equal_the_plain_loop(make: Callable[[], ResidualNet], bn: Any) -> None:
    net, (images, _) = make(), CASE.images()
    routing = torch.randn(4, net.n, 2, generator=torch.Generator().manual_seed(1))
    routing[1, ::2, 0] = 0
    routing[2, :, 1] = 0
    routing[3, 0] = 0
    outputs = pathnet.Recorder(net, bn, precision="float64").routed_outputs(images, routing)
    assert relative_error(outputs, routed_loop(net, images, routing, bn)) < EXACT_WALK


@needs_native
@pytest.mark.parametrize("seed", range(10))
def test_the_cpu_engines_routings_equal_the_plain_loop(seed: int) -> None:
    net, images, _ = random_net(seed)
    routing = torch.rand(3, net.n, 2, generator=torch.Generator().manual_seed(seed))
    outputs = pathnet.Recorder(net, engine="cpu").routed_outputs(images, routing)
    assert relative_error(outputs, routed_loop(net, images, routing, "running")) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_outputs_do_not_depend_on_how_routings_are_grouped(bn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, (images, _) = pathnet.Recorder(CASE.net(), bn, "reference"), CASE.images()
    routing = pathnet.paths.routing(CODES)
    whole = recorder.routed_outputs(images, routing)
    monkeypatch.setattr("pathnet.chunks.CHUNK_BYTES", 3 * 4 * 3 * 4 * 64)
    torch.testing.assert_close(recorder.routed_outputs(images, routing), whole, rtol=1e-5, atol=1e-6)
    assert recorder.routed_outputs(images, routing[:0]).shape == (0, 3, 5)


def test_bad_arguments_of_routed_outputs_are_named() -> None:
    recorder, (images, _) = pathnet.Recorder(CASE.net()), CASE.images()
    ones = torch.ones(1, 6, 2)
    for arguments, message in (
        ((images, ones[:, :5]), r"routing: expected shape \[P, 6, 2\]"),
        ((images, ones / 0), "routing: expected coefficients that are finite in float32"),
        ((images * torch.nan, ones), "images: expected finite values"),
        ((images[0], ones), "images: expected shape"),
        ((images[:, :1], ones), "images: the network refuses the shape"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            recorder.routed_outputs(*arguments)


# A GPU's memory


class Scarce(ReferenceEngine):
    """Has room for so many routings at a time."""

    name = "scarce"
    walk: type[ScarceWalk]

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, list[int]()

    def take(self, routing: Tensor) -> None:
        self.tried.append(len(routing))
        if len(routing) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def prepare(self, job: Job) -> ReferencePrepared:
        return ScarcePrepared(super().prepare(job).blocks, self)


@dataclass(frozen=True)
class ScarcePrepared(ReferencePrepared):
    engine: Scarce

    def record(self, y0: Tensor) -> tuple[Tensor, ReferenceWalk]:
        y, walk = super().record(y0)
        return y, self.engine.walk(walk.blocks, walk.tensors, walk.output_bytes, self.engine)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        self.engine.take(routing)
        return super().routed_forward(y0, routing)


@dataclass(frozen=True)
class ScarceWalk(ReferenceWalk):
    engine: Scarce

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        self.engine.take(routing)
        return super().routed_backward(start, routing)


class ScarceNormsWalk(ScarceWalk):
    """With a fused form of the norms, which allocates as it likes."""

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        self.engine.take(routing)
        return ReferenceWalk(self.blocks, self.tensors, self.output_bytes).norms(start, routing)


Scarce.walk = ScarceWalk


class ScarceNorms(Scarce):
    walk = ScarceNormsWalk


QUESTIONS: list[Callable[[pathnet.Recorder, pathnet.Tape], Tensor]] = [
    lambda _, tape: tape.path_gradients(CODES),
    lambda _, tape: tape.path_gradient_norms(CODES),
    lambda _, tape: tape.path_gradient_norms(CODES, per_sample=True),
    lambda recorder, _: recorder.routed_outputs(CASE.images()[0], pathnet.paths.routing(CODES)),
]


@pytest.mark.parametrize("kind", [Scarce, ScarceNorms])
@pytest.mark.parametrize("ask", QUESTIONS)
def test_where_memory_runs_out_the_work_is_split(
    ask: Callable[[pathnet.Recorder, pathnet.Tape], Tensor], kind: type[Scarce], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, engine = [], kind(100)
    monkeypatch.setattr(engines, "ENGINES", (engine,))
    recorder = pathnet.Recorder(CASE.net(), "batch")
    tape = recorder(*CASE.images())
    for room, expected in ((100, [13]), (3, [13, 6, 3, 3, 3, 3, 1]), (1, [13, 6, 3] + 13 * [1])):
        engine.room, engine.tried = room, []
        results.append(ask(recorder, tape))
        assert engine.tried == expected
    assert all(torch.equal(result, results[0]) for result in results)
    engine.room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        ask(recorder, tape)


def test_a_stem_without_room_is_no_wrong_shape() -> None:
    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    net = CASE.net()
    net.stem = Full()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pathnet.record(net, *CASE.images())


# A GPU's time: every look at a value would wait for all that was asked of it before


class Looks(TorchFunctionMode):
    """Counts the ways in which Python sees the values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "nonzero", "__array__"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts single values that are read: ``item``, ``bool``, ``float`` and the like; and shapes that are values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def looks(call: Callable[[], Any]) -> dict[str, int]:
    with Looks() as values, Scalars() as scalars:
        call()
    return dict(values.seen + scalars.seen)


def test_the_count_sees_them() -> None:
    x = torch.ones(2)
    assert looks(lambda: x.sum().item()) == looks(lambda: bool(x.sum())) == {"_local_scalar_dense": 1}
    assert looks(lambda: float(x.sum()) if (x > 0).all() else 0) == {"_local_scalar_dense": 2}
    assert looks(lambda: x.tolist()) == {"tolist": 1}
    assert looks(lambda: x.argmax() + 1) == {}


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("at", ["y0", "image", "stem_weight"])
@pytest.mark.parametrize("loss", [cross_entropy, lambda output, target: output.square().mean()])
def test_a_recording_looks_once(bn: Any, at: Any, loss: Any) -> None:
    recorder, (images, labels) = pathnet.Recorder(CASE.net(), bn, "reference", at=at, loss=loss), CASE.images()
    recorder(images, labels)
    assert looks(lambda: recorder(images, labels)) == {"tolist": 1}


@needs_native
def test_a_recording_by_the_cpu_engine_looks_once() -> None:
    recorder, (images, labels) = pathnet.Recorder(CASE.net(), engine="cpu"), CASE.images()
    recorder(images, labels)
    assert looks(lambda: recorder(images, labels)) == {"tolist": 1}


class Unsettled:
    """A tape whose values nobody has looked at yet, as on a GPU; ``asked`` says what was asked for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settle: Callable[[Record], Record]) -> None:
        whole = pathnet.record(CASE.net(), *CASE.images(), engine="reference")
        self.asked: list[str] = []
        walk, sums = ReferenceWalk.routed_backward, ReferenceWalk.sums_by_length

        def noting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*given: Any) -> Any:
                self.asked.append(name)
                return work(*given)

            return noted

        monkeypatch.setattr(ReferenceWalk, "routed_backward", noting("walk", walk))
        monkeypatch.setattr(ReferenceWalk, "sums_by_length", noting("walk", sums))
        looking = noting("look", lambda: settle(whole._record))
        self.whole, self.tape = whole, pathnet.Tape(whole._record, "y0", looking)


ASKING: list[Callable[[pathnet.Tape], Any]] = [
    lambda tape: tape.path_gradient_norms(CODES),
    lambda tape: tape.path_gradients(CODES),
    lambda tape: tape.gradient(),
    lambda tape: tape.gradient_by_length(),
    lambda tape: tape.squared_norms_by_length(1),
]


@pytest.mark.parametrize("ask", ASKING)
def test_walks_are_asked_for_before_the_values_are_looked_at(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unsettled = Unsettled(monkeypatch, lambda record: record)
    assert unsettled.tape.n == 6 and unsettled.tape.nbytes > 0 and not unsettled.asked
    result = ask(unsettled.tape)
    assert unsettled.asked.index("look") >= 1 and unsettled.asked.count("look") == 1
    assert torch.equal(result, ask(unsettled.whole))
    assert unsettled.tape.loss == unsettled.whole.loss and unsettled.asked.count("look") == 1


def doubled(start: ScaledGradient) -> ScaledGradient:
    return start._replace(mantissa=start.mantissa * 2)


@pytest.mark.parametrize("ask", ASKING)
def test_a_gradient_that_is_taken_anew_is_walked_anew(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unsettled = Unsettled(monkeypatch, lambda record: replace(record, start=doubled(record.start)))
    first, second = ask(unsettled.tape), ask(unsettled.tape)
    assert torch.equal(first, second) and not torch.equal(first, ask(unsettled.whole))


@pytest.mark.parametrize("ask", [*ASKING, lambda tape: tape.loss, lambda tape: tape.output])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_wrong_with_the_values_is_told_instead_of_a_result(
    fails: bool, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every time, and instead of an error that came of it."""

    def refuse(record: Record) -> Record:
        raise ValueError("images: expected finite values, got NaN or infinity")

    unsettled = Unsettled(monkeypatch, refuse)
    if fails:
        for name in ("routed_backward", "sums_by_length"):
            monkeypatch.setattr(ReferenceWalk, name, lambda *_: torch.zeros(1)[5])
    for _ in range(2):
        with pytest.raises(ValueError, match="images: expected finite values"):
            ask(unsettled.tape)


class Elsewhere(ReferenceEngine):
    """Serves a device without values, ``meta``: whoever looks at one, or mixes it with another device, fails."""

    name = "elsewhere"

    def prepare(self, job: Job) -> ReferencePrepared:
        return ElsewherePrepared(super().prepare(job).blocks)


class ElsewhereWalk(ReferenceWalk):
    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        grad, exponent = start
        assert routing.device.type == "cpu" and routing.dtype == grad.dtype
        routing = routing.to(grad.device)
        grads = grad.new_ones(len(routing), *self.tensors[0].shape) * routing.sum((1, 2))[:, None, None, None, None]
        return ScaledGradient(grads, exponent.expand(len(routing), *exponent.shape))


class ElsewherePrepared(ReferencePrepared):
    def record(self, y0: Tensor) -> tuple[Tensor, ReferenceWalk]:
        y, walk = super().record(y0)
        return y, ElsewhereWalk(walk.blocks, walk.tensors, walk.output_bytes)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        y = y0
        for block in self.blocks:
            y = block(y)
        return y * routing.to(y0.device).sum((1, 2))[:, None, None, None, None]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("at", ["y0", "image", "stem_weight"])
def test_walks_of_codes_in_the_hosts_memory_never_look(at: Any, bn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Elsewhere(),))
    net, (images, labels) = CASE.net().to("meta"), (own.to("meta") for own in CASE.images())
    recorder = pathnet.Recorder(net, bn, at=at)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta"):
        recorder(images, labels)
    monkeypatch.setattr(Look, "numbers", lambda _: (1.0, 1.0))
    tape = recorder(images, labels)
    for per_sample in (False, True):
        norms = tape.path_gradient_norms(CODES, per_sample)
        assert norms.device.type == "meta" and norms.dtype == torch.float64
        assert norms.shape == ((13, 3) if per_sample else (13,))
    assert tape.path_gradients(CODES).device.type == "meta"
    assert [own.device.type for own in tape.path_gradients(CODES, scaled=True)] == ["meta", "meta"]
    assert tape.gradient().device.type == "meta"


# What is wrong with a batch


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
    for arguments, message in (
        ({"net": nn.Linear(2, 2)}, "net: expected a pathnet ResidualNet, got a Linear"),
        ({"bn": "eval"}, "bn: expected"),
        ({"precision": "float16"}, "precision: expected"),
        ({"at": "y1"}, "at: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            pathnet.Recorder(**{"net": CASE.net(), **arguments})  # type: ignore[arg-type]


@needs_native
def test_the_cpu_engine_packs_what_a_case_of_every_kind_needs() -> None:
    """The tables are made from the shape of ``y_0`` alone."""
    for case in SMALL:
        net = case.net()
        y = net.stem(case.images()[0])
        packed = CpuEngine().prepare(Job(net, "running", "float32", y.shape[1:], y.device))
        for block, row in zip(net.blocks, packed.tables.blocks.tolist(), strict=True):
            assert row[BlockColumn.CHANNELS : BlockColumn.OUT_CHANNELS] == list(y.shape[1:])
            y = block(y)
            assert row[BlockColumn.OUT_CHANNELS :] == list(y.shape[1:])
