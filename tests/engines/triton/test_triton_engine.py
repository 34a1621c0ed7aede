"""The triton engine's kernels in Triton's interpreter, on the CPU, against the reference in float64."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import SMALL, Case, faint, measured_net, post_activation_net, random_net
from helpers.judging import TOLERANCES, check, check_sums, random_routings, reference_outputs
from helpers.model_cases import MODEL_CASES
from helpers.oracles import autograd, detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM, FORWARD
from torch import Tensor, nn

import pathnet
from pathnet import engines, scaling
from pathnet.engines import self_check
from pathnet.engines import triton as triton_engine
from pathnet.engines.cuda import CudaEngine
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_form
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.triton import TritonEngine, TritonWalk, unsupported_side
from pathnet.models import PostactBlock, PreactBlock, ResidualNet, resnet
from pathnet.recording import snapshot

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/triton")

MODES = ["running", "batch"]


class Interpreted(TritonEngine):
    """The engine for networks on the CPU."""

    name = "interpreted"
    device_type = "cpu"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, job: Job) -> str | None:
        return unsupported_form(job.net, job.bn) or unsupported_side(job.net)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.correct()
    monkeypatch.setattr(engines, "ENGINES", (Interpreted(), *engines.ENGINES))


@pytest.fixture
def big_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.big_tiles(monkeypatch)


def recorded(net: ResidualNet, images: Tensor, labels: Tensor, bn: Any, precision: Any = "float32") -> pathnet.Tape:
    return pathnet.record(net, images, labels, bn=bn, engine="interpreted", precision=precision)


def own_record(tape: pathnet.Tape) -> TritonWalk:
    assert isinstance(tape._record.walk, TritonWalk)
    return tape._record.walk


def small_net(seed: int, blocks: int = 3) -> tuple[ResidualNet, Tensor, Tensor]:
    """One of the kinds that are measured, of at most so many blocks: the first such from a seed on."""
    for own in range(100 * seed, 100 * seed + 100):
        net, images, labels = measured_net(own, small=True)
        if net.n <= blocks:
            return net, images, labels
    raise AssertionError("no such network")


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("seed", range(18))
def test_walks_of_random_networks(seed: int) -> None:
    """Kernels of 1, 3 and 5, one to three units, strides, odd sides, widths from 1 on, single samples."""
    net, images, labels = random_net(seed)
    check(recorded(net, images, labels, "running"), random_routings(net.n, seed), "float32", gradients=seed % 3 == 0)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_walks_of_networks_that_are_measured(seed: int, bn: str, precision: str) -> None:
    net, images, labels = small_net(seed)
    tape = recorded(net, images, labels, bn, precision)
    norms, expected = check(tape, random_routings(net.n, seed), precision, gradients=seed % 3 == 0)
    if precision == "float32":
        norms, expected = scaling.combine(norms), scaling.combine(expected)
        torch.testing.assert_close(norms, expected, rtol=FLOAT32_BATCH_NORM, atol=0)


@pytest.mark.parametrize(("bn", "precision"), [("running", "float32"), ("batch", "float32"), ("batch", "bfloat16")])
def test_walks_in_the_tiles_of_a_gpu(bn: str, precision: str) -> None:
    """Tiles that hold parts of samples, and several; more rows than a tile, tiles filled up."""
    case = Case("tiles", 8, width=8, side=13, batch=3)
    tape = recorded(case.net(), *case.images(), bn, precision)
    check(tape, random_routings(tape.n, 2), precision, gradients=False)


def test_batch_normalisation_behind_convolutions_in_the_tiles_of_a_gpu() -> None:
    """Tiles that hold parts of images, and more channels than one."""
    torch.manual_seed(0)
    block = PostactBlock(5, (3,), (70,), 1, "projection")
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(70, 5))
    net = ResidualNet(nn.Conv2d(3, 5, 3, padding=1), [block], head).eval()
    images, labels = torch.randn(4, 3, 5, 3), torch.tensor([0, 1, 2, 3])
    check(recorded(net, images, labels, "batch"), random_routings(1, 0), "float32", gradients=False)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(("bn", "precision"), [("running", "float32"), ("batch", "float32"), ("running", "bfloat16")])
@pytest.mark.parametrize("seed", range(3))
def test_sums_by_length_are_those_of_every_path(seed: int, bn: str, precision: str) -> None:
    net, images, labels = small_net(seed)
    tape = recorded(net, images, labels, bn, precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_forward_passes(case: Case, bn: str) -> None:
    """Outputs, ReLU bits and normalised activations of a record; outputs of lesioned and of other routings."""
    net, (images, labels) = case.net(), case.images()
    recorder = pathnet.Recorder(net, bn=bn, engine="interpreted")  # type: ignore[arg-type]
    exact = in_float64(net, bn)
    tape = recorder(images, labels)
    record = own_record(tape)
    y, unit = exact.stem(images.double()).detach(), 0
    expected_output = exact(images.double()).detach()
    assert relative_error(tape.output, expected_output) < FORWARD
    for block, bits in zip(exact.blocks, record.bits(), strict=True):
        affine: list[Tensor] = []
        given: list[Tensor] = []
        hooks = [own.bn.register_forward_hook(keep(given, affine)) for own in block.form().units]
        y = block(y).detach()
        for hook in hooks:
            hook.remove()
        for own, x, z in zip(bits, given, affine, strict=True):
            sure = z.abs() > 1e-4
            assert torch.equal(own[sure], (z > 0)[sure])
            if bn == "batch":
                deviation = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
                x_hat = (x - x.mean((0, 2, 3), keepdim=True)) / deviation
                begin = record.kept.normalized_begin[unit]
                stored = record.kept.normalized[begin : begin + x.numel()]
                stored = stored.reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
                torch.testing.assert_close(stored.double(), x_hat, rtol=1e-4, atol=1e-4)
            unit += 1
    routing = random_routings(net.n, 1)
    y0 = exact.stem(images.double())
    prepared = ReferenceEngine().prepare(Job(exact, "running", "float64", y0.shape[1:], y0.device))
    expected = prepared.routed_forward(y0, routing)
    for own, other in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(own, exact.head(other).detach()) < FORWARD


def keep(given: list[Tensor], made: list[Tensor]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        given.append(inputs[0].detach())
        made.append(output.detach())

    return hook


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[2], SMALL[4]], ids=lambda case: case.id)
def test_every_path_equals_the_detach_loop(case: Case, bn: str) -> None:
    """Of three blocks, and their sum the ordinary gradient."""
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, bn)
    every = pathnet.paths.enumerate_all(net.n)
    walked = tape.path_gradients(every)
    for path, own in zip(every, walked, strict=True):
        expected = detach_loop(net, images, labels, path, bn)
        assert relative_error(own, expected) < FLOAT32_SAMPLE_NORM
    assert relative_error(walked.sum(0), tape.gradient()) < FLOAT32_SAMPLE_NORM


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_the_polynomial_of_path_lengths(bn: str) -> None:
    case = Case("polynomial", 8, width=3, side=6, batch=3)
    tape = recorded(case.net(), *case.images(), bn)
    every = pathnet.paths.enumerate_all(tape.n)
    gradients, lengths = tape.path_gradients(every), every.sum(1).double()
    points = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    routing = torch.stack([torch.ones(3, tape.n, dtype=torch.float64), points[:, None].expand(3, tape.n)], 2)
    for x, own in zip(points, tape.routed_gradients(routing), strict=True):
        total = (gradients * (x**lengths)[:, None, None, None, None]).sum(0)
        assert relative_error(own, total) < FLOAT32_SAMPLE_NORM


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(
    ("seed", "bn", "precision"),
    [
        (18, "running", "float32"),
        (16, "running", "bfloat16"),
        (12, "batch", "float32"),
        (3, "batch", "bfloat16"),
    ],
)
def test_post_activation_blocks(seed: int, bn: str, precision: str) -> None:
    """Walks, sums by length, forward passes and records: both skips, strides, bottlenecks, one sample."""
    net, images, labels = post_activation_net(seed)
    exact = in_float64(net, bn)
    recorder = pathnet.Recorder(net, bn, "interpreted", precision)  # type: ignore[arg-type]
    tape = recorder(images, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    routing = random_routings(net.n, seed)
    check(tape, routing, precision)
    check_sums(tape, routing[3], precision)
    for own, expected in zip(
        recorder.routed_outputs(images, routing), reference_outputs(exact, images, routing), strict=True
    ):
        assert relative_error(own, expected) < FORWARD


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(
    ("seed", "bn", "open_stem"),
    [(7, "running", False), (16, "running", True), (7, "batch", True)],
)
def test_every_path_of_post_activation_networks(
    seed: int, bn: str, open_stem: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equals the detach loop's, alone as among others; their sum is the ordinary gradient, their polynomial that of
    lengths. A stem may end without a ReLU: what comes out of it is not cut off."""
    from helpers import interpreter

    net, images, labels = post_activation_net(seed)
    if open_stem:
        net.stem = nn.Sequential(*list(net.stem)[:2])  # type: ignore[arg-type, call-overload]
        assert (net.stem(images) < 0).any()
    tape = recorded(net, images, labels, bn)
    every = pathnet.paths.enumerate_all(net.n)
    walked, lengths = tape.path_gradients(every), every.sum(1).double()
    for path, own in zip(every, walked, strict=True):
        assert relative_error(own, detach_loop(net, images, labels, path, bn)) < FLOAT32_SAMPLE_NORM
    assert relative_error(walked.sum(0), autograd(net, images, labels, bn)) < FLOAT32_SAMPLE_NORM
    points = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    routing = torch.stack([torch.ones(3, net.n, dtype=torch.float64), points[:, None].expand(3, net.n)], 2)
    for x, own in zip(points, tape.routed_gradients(routing), strict=True):
        total = (walked * (x**lengths)[:, None, None, None, None]).sum(0)
        assert relative_error(own, total) < FLOAT32_SAMPLE_NORM
    interpreter.sum_in_order(monkeypatch)
    assert torch.equal(tape.path_gradients(every[1:3].flip(0)), tape.path_gradients(every)[1:3].flip(0))


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_a_strangers_post_activation_blocks(bn: str) -> None:
    """Modules of other people's making, traced: convolutions with biases, blocks of a single one."""
    stranger = next(own for own in MODEL_CASES if own.name == "control flow")
    model, (images, labels) = stranger.model(3).float(), stranger.batch()
    images = images.float()
    net = pathnet.adapt(model, images)
    tape = recorded(net, images, labels, bn)
    every = pathnet.paths.enumerate_all(net.n)
    for path, own in zip(every, tape.path_gradients(every), strict=True):
        assert relative_error(own, detach_loop(net, images, labels, path, bn)) < FLOAT32_SAMPLE_NORM


def test_a_tape_of_a_post_activation_network_owns_the_last_joins_bits() -> None:
    net, images, labels = post_activation_net(23)
    record = own_record(recorded(net, images, labels, "running"))
    assert record.last is not None and any(own is record.last for own in record.tensors)
    added = [conv.added for block in record.network.blocks for conv in block.convolutions[-1:]]
    assert all(any(own is tensor for tensor in record.tensors) for own in added)


def wide_net(
    blocks: int, seed: int = 0, kind: type[PreactBlock | PostactBlock] = PreactBlock
) -> tuple[ResidualNet, Tensor, Tensor]:
    """Blocks of one shape, so that all skips are identities."""
    torch.manual_seed(seed)
    own = [kind(4, (3, 3), (4, 4), 1, "projection") for _ in range(blocks)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net = ResidualNet(nn.Conv2d(3, 4, 3, padding=1), own, head).eval()
    return net, torch.randn(3, 3, 6, 6), torch.tensor([0, 1, 2])


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(("bn", "kind"), [(bn, kind) for bn in MODES for kind in (PreactBlock, PostactBlock)])
def test_range(bn: str, kind: type[PreactBlock | PostactBlock]) -> None:
    """Norms of 1e-190 come out with full relative precision, and one sample beside much larger ones."""
    net, images, labels = wide_net(8, kind=kind)
    # A single module may shrink a gradient to 1e-19: two lie between one scaling and the next.
    for block in net.blocks:
        block.convs[1].weight.data *= 1e-15
    tape = recorded(net, images, labels, bn)
    routing = pathnet.paths.routing(torch.ones(1, 8, dtype=torch.uint8)).double() * 1e-12
    routing = torch.cat([routing, routing * 1e40])
    norms, expected = check(tape, routing, "float32", gradients=False)
    assert float(expected[0].max()) < 1e-190 and float(expected[1].max()) > 1e30 * float(expected[0].max())
    if bn == "batch":
        tape._record.start.mantissa[1] *= 1e-12
        check(tape, routing[:1], "float32", gradients=False)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_paths_without_modules_and_without_anything(bn: str) -> None:
    net, images, labels = wide_net(3)
    tape = recorded(net, images, labels, bn)
    skips = torch.zeros(1, 3, dtype=torch.uint8)
    start = scaling.value(tape._record.start.mantissa[None], tape._record.start.exponent[None])
    assert torch.equal(tape.path_gradients(skips), start)
    dead = torch.zeros(1, 3, 2)
    assert torch.equal(tape.routed_gradients(dead), torch.zeros_like(start))
    weighted = torch.tensor([[[3.0, 0], [-0.5, 0], [2.0**-100, 0]]])
    expected = start * (-1.5 * 2.0**-100)
    torch.testing.assert_close(tape.routed_gradients(weighted), expected, rtol=1e-6, atol=0)
    assert tape.path_gradient_norms(torch.zeros(0, 3, dtype=torch.uint8)).shape == (0,)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_results_are_bit_equal_for_any_grouping(precision: Any, bn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.sum_in_order(monkeypatch)
    case = Case("grouping", 8, width=4, side=6, batch=3)
    tape = recorded(case.net(), *case.images(), bn, precision)
    some = pathnet.paths.enumerate_all(tape.n)[[0, 3, 5, 6, 7]]
    whole = tape.path_gradient_norms(some, per_sample=True)
    parts = [tape.path_gradient_norms(part, per_sample=True) for part in some.flip(0).split(3)]
    assert torch.equal(whole.flip(0), torch.cat(parts))
    monkeypatch.setattr(triton_engine, "ROOM", 1)
    assert torch.equal(whole[:3], tape.path_gradient_norms(some[:3], per_sample=True))


@pytest.mark.usefixtures("big_tiles")
def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images, labels = small_net(1)
    tape = recorded(net, images, labels, "batch")
    routing = random_routings(net.n, 1)
    kept = own_record(tape).kept
    kept.normalized[::7] *= 1.01
    with pytest.raises(AssertionError):
        check(tape, routing, "float32", gradients=False)
    kept.normalized[::7] /= 1.01
    kept.scales[0, 0] *= 1.001
    with pytest.raises(AssertionError):
        check(tape, routing, "float32", gradients=False)


def test_a_tape_keeps_bits_alone_and_snapshots_them() -> None:
    case = Case("snapshot", 8, width=4, side=6, batch=3)
    net, (images, labels) = case.net(), case.images()
    recorder = pathnet.Recorder(net, engine="interpreted")
    tape = recorder(images, labels)
    b = pathnet.paths.sample(net.n, 2, 2)
    norms = tape.path_gradient_norms(b)
    recorder(images.flip(0), labels.flip(0))
    net.blocks[0].convs[0].weight.data.zero_()
    assert torch.equal(tape.path_gradient_norms(b), norms)
    record = own_record(tape)
    assert record.kept.normalized.numel() == 0
    assert record.kept.bits.numel() < 1.1 * sum(bits.numel() / 8 for own in record.bits() for bits in own) + 400


def test_the_engine_refuses_by_name() -> None:
    torch.manual_seed(0)

    def net(block: PreactBlock | PostactBlock) -> ResidualNet:
        return ResidualNet(nn.Conv2d(3, 4, 3, padding=1), [block], nn.Flatten()).eval()

    block = PreactBlock(4, (3, 3), (4, 4), 1, "projection")
    block.convs[0] = nn.Conv2d(4, 4, 3, padding=0, bias=False)
    reason = "block 1: it has a convolution that changes the side by more than its stride"
    assert unsupported_side(net(block)) == reason
    post = PostactBlock(4, (3, 3), (4, 4), 1, "projection")
    assert unsupported_side(net(post)) is None
    with pytest.raises(ValueError, match="images: expected more than one value a channel for batch statistics"):
        recorded(net(post), torch.randn(1, 3, 1, 1), torch.tensor([0]), "batch")
    bare = PostactBlock(4, (3, 3), (4, 6), 1, "projection")
    bare.projection_bn = None
    assert unsupported_form(net(bare), "running") is None
    assert unsupported_form(net(bare), "batch") == "block 1 has a projection without batch normalisation"
    post.convs[1] = nn.Conv2d(4, 4, 3, padding=0)
    assert unsupported_side(net(post)) == reason
    for kind in (PreactBlock, PostactBlock):
        strided = kind(4, (3, 3), (6, 6), 3, "projection")
        assert unsupported_side(net(strided)) is None
        # On a side of 4 both give 2, from other pixels.
        strided.projection = nn.Conv2d(4, 6, 1, 2, bias=False)
        assert unsupported_side(net(strided)) == "block 1: it has a projection of another stride than its module"
    engine = TritonEngine()
    whole = net(PreactBlock(4, (3, 3), (4, 4), 1, "projection"))
    on_cpu = Job(whole, "batch", "float32", (4, 6, 6), torch.device("cpu"))
    assert engine.unsupported(on_cpu) == "the network is on cpu"
    on_cuda = Job(whole, "batch", "float64", (4, 6, 6), torch.device("cuda"))
    assert engine.unsupported(on_cuda) == 'no precision="float64"'
    assert engine.unavailable() == "this process sees no GPU"
    with pytest.raises(ValueError, match="images: expected more than one value a channel for batch statistics"):
        recorded(whole, torch.randn(1, 3, 1, 1), torch.tensor([0]), "batch")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    """As if this process had a GPU; nothing is run on it."""
    monkeypatch.setattr(engines, "ENGINES", (CudaEngine(), TritonEngine(), ReferenceEngine()))
    for kind in (CudaEngine, TritonEngine):
        monkeypatch.setattr(kind, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for module in ("cuda", "triton"):
        monkeypatch.setattr(f"pathnet.engines.{module}.disagreement", check)


def choose(net: ResidualNet, bn: Any = "running", precision: Any = "float32") -> str:
    shape = (net.stem_weight().shape[0], 6, 6)
    return engines.choose("auto", Job(net, bn, precision, shape, torch.device("cuda"))).name


def test_auto_takes_cuda_then_triton_then_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: set[str] = set()
    tried: list[ResidualNet] = []

    def disagreement(engine: Any, job: Job, *rest: Any, **options: Any) -> str | None:
        tried.append(job.net)
        return "it disagrees" if engine.name in wrong else None

    on_a_gpu(monkeypatch, disagreement)
    net = Case("auto", 8, width=16, side=6).net()
    bottleneck = Case("auto", 11, block="bottleneck", width=16, side=6).net()
    post = resnet(11, block="bottleneck")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(net) == choose(resnet(8)) == "cuda"
    tried[1:] = []
    with pytest.warns(RuntimeWarning, match='engine triton serves, since cuda: no bn="batch"'):
        assert choose(net, "batch", "bfloat16") == "triton"
    with pytest.warns(RuntimeWarning, match="engine triton serves, since cuda: "):
        assert choose(bottleneck) == "triton"
    with pytest.warns(RuntimeWarning, match="triton serves, since cuda: block 1 is not a basic block"):
        assert choose(post) == "triton"
    # Each has checked itself on the network that it serves.
    assert tried == [net, net, bottleneck, post]
    wrong.add("cuda")
    with pytest.warns(RuntimeWarning, match="engine triton serves, since cuda: it disagrees"):
        assert choose(net) == "triton"
    wrong.add("triton")
    with pytest.warns(
        RuntimeWarning, match="engine reference serves, since cuda: it disagrees; triton: it disagrees"
    ):
        assert choose(net) == "reference"


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(("bn", "post"), [("running", False), ("batch", False), ("running", True)])
def test_the_engines_check_of_itself(bn: Any, post: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = snapshot((pathnet.models.resnet if post else pathnet.models.preact_resnet)(8, 4), bn, torch.float32)

    def check_itself() -> str | None:
        monkeypatch.setattr(self_check, "_reasons", {})
        return self_check.disagreement(Interpreted(), Job(net, bn, "float32", (4, 8, 8), torch.device("cpu")))

    if bn == "batch" or post:
        assert check_itself() is None
        return
    right = TritonWalk.norms
    monkeypatch.setattr(TritonWalk, "norms", lambda *given: right(*given) * 1.03)
    assert check_itself() == "it disagrees with the reference on a small input (relative error 0.03 in float32)"


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_what_a_module_shrinks_beyond_float32_is_kept(kind: str, bn: str) -> None:
    net, images, labels = small_net(1) if kind == "pre" else post_activation_net(23, bn)
    net = faint(net, 0)
    tape = recorded(net, images, labels, bn)
    assert own_record(tape).network.magnitudes is not None
    check(tape, random_routings(net.n, 0), "float32")
    check_sums(tape, torch.ones(net.n, 2), "float32")
