"""The cuda engine without a GPU: its kernels' own bodies, run on the host by their twin, against the reference.

The twin also fails on a race, on a read of what was never written or is still being copied, and out of bounds.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.cases import Case, faint, shaken
from helpers.judging import TOLERANCES, check, check_sums, random_basic_net, random_routings, reference_outputs
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD
from torch import Tensor, nn

import pathnet
from pathnet import engines, native, scaling
from pathnet.engines import cuda
from pathnet.engines.cuda import CudaEngine, CudaWalk
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_form
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.tables import UnitColumn, tables
from pathnet.models import PreactBlock, ResidualNet, resnet
from pathnet.scaling import ScaledGradient

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


class Twin(CudaEngine):
    """The engine with its kernels on the host, for networks on the CPU."""

    name = "twin"
    device_type = "cpu"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, job: Job) -> str | None:
        return unsupported_form(job.net, job.bn) or cuda.refusal(job, self.shared_bytes(job.device))


def job_of(net: ResidualNet, y0_shape: Sequence[int], precision: Any) -> Job:
    return Job(net, "running", precision, y0_shape, torch.device("cpu"))


GPUS = {"99 KB": 101376, "163 KB": 166912, "227 KB": 232448}
"""Shared memory of a thread block, in bytes: of RTX 30, 40 and 50, L4, L40S; of an A100; of H100, H200, B200."""

GPU = os.environ.get("PATHNET_GPU")
"""A key of `GPUS`: then every test here runs at that size, and not at the one that it is for."""

README = (ROOT / "README.md").read_text()

FEW = 57344
"""Bytes that every network here gets along with: less than any GPU has, so that small images take windows too."""


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Twin(), *engines.ENGINES))
    monkeypatch.setattr(Twin, "twin_shared_bytes", GPUS[GPU or "227 KB"])


@pytest.fixture
def shared_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the twin imitates; by parameter."""
    size = GPUS[GPU] if GPU else int(request.param)
    monkeypatch.setattr(Twin, "twin_shared_bytes", size)
    return size


def taking_turns(seeds: int, all_seeds: int) -> pytest.MarkDecorator:
    """The first seeds with few bytes, and with those of one GPU after the other; on one GPU all of them."""
    if GPU:
        cases = [(seed, GPUS[GPU]) for seed in range(all_seeds)]
    else:
        cases = [(seed, size) for seed in range(seeds) for size in (FEW, list(GPUS.values())[seed % 3])]
    return pytest.mark.parametrize(("seed", "shared_bytes"), cases, indirect=["shared_bytes"])


@pytest.mark.parametrize("precision", TOLERANCES)
@taking_turns(15, 28)
def test_walks_of_random_networks(seed: int, shared_bytes: int, precision: Any) -> None:
    # The norm of a handful of pixels averages no bfloat16 roundings.
    net, images, labels = random_basic_net(seed, smallest=1 if precision == "float32" else 6)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check(tape, random_routings(net.n, seed), precision)


@taking_turns(12, 28)
def test_forward_passes_of_random_networks(seed: int, shared_bytes: int) -> None:
    """The recording one with its ReLU bits, and routed ones, against float64."""
    net, images, labels = random_basic_net(seed)
    recorder = pathnet.Recorder(net, engine="twin")
    exact = in_float64(net, "running")
    tape = recorder(images, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    assert isinstance(tape._record.walk, CudaWalk)
    y = exact.stem(images.double())
    for block, bits in zip(exact.blocks, tape._record.walk.bits(), strict=True):
        activations: list[Tensor] = []
        hooks = [unit.bn.register_forward_hook(keep(activations)) for unit in block.form().units]
        y = block(y)
        for hook in hooks:
            hook.remove()
        for own, z in zip(bits, activations, strict=True):
            sure = z.abs() > 1e-3 * z.abs().mean()
            assert torch.equal(own[sure], (z > 0)[sure])
    routing = torch.randn(3, net.n, 2)
    routing[0, :, 1] = 0
    routing[1, ::2, 1] = 0
    expected = reference_outputs(exact, images, routing)
    for own, other in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(own, other) < FORWARD


@pytest.mark.parametrize("precision", TOLERANCES)
@taking_turns(4, 8)
def test_sums_by_length_are_those_of_every_path(seed: int, shared_bytes: int, precision: Any) -> None:
    net, images, labels = random_basic_net(seed, smallest=6)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


def keep(values: list[Tensor]) -> Callable[..., None]:
    return lambda module, inputs, output: values.append(output.detach())


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("depth", "shared_bytes"),
    list(zip((20, 20, 110), GPUS.values(), strict=True)),
    ids=GPUS,
    indirect=["shared_bytes"],
)
def test_the_papers_networks(depth: int, shared_bytes: int, precision: Any) -> None:
    """With 227 KB in float32 a sample a thread block, in bfloat16 two, the last with one."""
    case = Case(f"resnet-{depth}", depth, width=16, side=32, batch=2 if precision == "float32" else 3)
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    assert relative_error(tape.output, in_float64(net, "running")(images.double()).detach()) < FORWARD
    codes = torch.cat([pathnet.paths.sample(tape.n, length, 1) for length in (0, tape.n // 3, tape.n)])
    norms, expected = map(scaling.combine, check(tape, pathnet.paths.routing(codes), precision))
    torch.testing.assert_close(norms, expected, rtol=TOLERANCES[precision][0], atol=0)


# Post-activation blocks


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("seed", range(20))
def test_walks_of_random_post_activation_networks(seed: int, precision: Any) -> None:
    net, images, labels = random_basic_net(seed, smallest=1 if precision == "float32" else 6, post=True)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check(tape, random_routings(net.n, seed), precision)


@pytest.mark.parametrize("seed", range(20))
def test_forward_passes_of_random_post_activation_networks(seed: int) -> None:
    """The recording one with its ReLU bits, and routed ones, against float64."""
    net, images, labels = random_basic_net(seed, post=True)
    recorder, exact = pathnet.Recorder(net, engine="twin"), in_float64(net, "running")
    tape = recorder(images, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    assert isinstance(tape._record.walk, CudaWalk)
    y = exact.stem(images.double())
    for block, bits in zip(exact.blocks, tape._record.walk.bits(), strict=True):
        before_relus = [block.bns[0](block.convs[0](y)), block.skip(y) + block.residual(y)]
        for recorded, z in zip(bits, before_relus, strict=True):
            sure = z.abs() > 1e-3 * z.abs().mean()
            assert torch.equal(recorded[sure], (z > 0)[sure])
        y = block(y)
    routing = torch.randn(4, net.n, 2)
    routing[0, :, 1] = 0
    routing[1, ::2, 1] = 0
    routing[2, 1::2, 0] = 0
    outputs = recorder.routed_outputs(images, routing)
    for routed, expected in zip(outputs, reference_outputs(exact, images, routing), strict=True):
        assert relative_error(routed, expected) < FORWARD


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("seed", range(6))
def test_sums_by_length_of_post_activation_networks_are_those_of_every_path(seed: int, precision: Any) -> None:
    net, images, labels = random_basic_net(seed, smallest=6, post=True)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


def cifar_resnet(depth: int, shortcut: str, width: int = 16) -> ResidualNet:
    torch.manual_seed(depth)
    return shaken(resnet(depth, width, 5, shortcut)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_every_path_of_a_post_activation_network_against_the_detach_loop(shortcut: str) -> None:
    net, images, labels = cifar_resnet(14, shortcut, width=8), torch.randn(2, 3, 9, 9), torch.tensor([0, 1])
    tape = pathnet.record(net, images, labels, engine="twin")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code)) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize(
    ("depth", "shortcut", "precision"),
    [(20, "pad", "float32"), (20, "projection", "bfloat16"), (110, "pad", "bfloat16")],
)
def test_the_original_cifar_networks(depth: int, shortcut: str, precision: Any) -> None:
    """Of a thread block's two samples in bfloat16 the last is alone."""
    net, images = cifar_resnet(depth, shortcut), torch.randn(3 if precision == "bfloat16" else 2, 3, 32, 32)
    tape = pathnet.record(net, images, torch.arange(len(images)), engine="twin", precision=precision)
    assert relative_error(tape.output, in_float64(net, "running")(images.double()).detach()) < FORWARD
    codes = torch.cat([pathnet.paths.sample(tape.n, length, 1) for length in (0, tape.n // 3, tape.n)])
    norms, expected = map(scaling.combine, check(tape, pathnet.paths.routing(codes), precision))
    torch.testing.assert_close(norms, expected, rtol=TOLERANCES[precision][0], atol=0)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_what_a_post_activation_module_shrinks_beyond_float32_is_kept(precision: Any) -> None:
    net, images, labels = random_basic_net(3, smallest=6, post=True)
    tape = pathnet.record(faint(net, 3, growth=20), images, labels, engine="twin", precision=precision)
    check(tape, random_routings(net.n, 3), precision)
    check_sums(tape, torch.ones(net.n, 2), precision)


@pytest.mark.parametrize("width", [16, 32, 48, 64])
@pytest.mark.parametrize("shared_bytes", [FEW, 101376], indirect=True)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_width(width: int, shared_bytes: int, precision: Any) -> None:
    """A stage of one width, at a side with whole and broken strips; many samples a thread block."""
    torch.manual_seed(width)
    blocks = [PreactBlock(width, (3, 3), (width, width), 1, "projection") for _ in range(2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, width, 3, padding=1), blocks, head)).eval()
    for side in (8, 13):
        images, labels = torch.randn(5, 3, side, side), torch.arange(5)
        tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
        check(tape, torch.randn(2, 2, 2), precision)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("height", "width", "batch"), [(37, 9, 1), (18, 21, 3)])
def test_every_number_of_windows(
    height: int, width: int, batch: int, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the least shared memory that serves to where images are resident: windows end within images, at both kinds
    of skip and both strides; thread blocks own one sample or several, the last of them fewer."""
    torch.manual_seed(height)
    sides = ((16, 16, 1, "pad"), (16, 24, 2, "projection"), (24, 24, 1, "pad"), (24, 40, 2, "pad"))
    blocks = [PreactBlock(i, (3, 3), (o, o), stride, skip) for i, o, stride, skip in sides]  # type: ignore[arg-type]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, 16, 3, padding=1), blocks, head)).eval()
    images, labels = torch.randn(batch, 3, height, width), torch.arange(batch)
    exact, routing = in_float64(net, "running"), random_routings(4, height)
    expected = exact(images.double()).detach()
    forms: list[set[native.CudaForm]] = [set(), set()]
    for shared_bytes in range(14 << 10, 160 << 10, 3 << 10):
        monkeypatch.setattr(Twin, "twin_shared_bytes", shared_bytes)
        job = job_of(net, (16, height, width), precision)
        if cuda.refusal(job, shared_bytes):
            continue
        network = Twin().prepare(job)
        programs = network.backward, network.forward
        new = False
        for seen, program in zip(forms, programs, strict=True):
            form = native.cuda_form(program.host)._replace(shared_bytes=0)
            new |= form not in seen
            seen.add(form)
        if not new:
            continue
        tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
        assert relative_error(tape.output, expected) < FORWARD
        check(tape, routing, precision)
    for seen in forms:
        assert {form.windows for form in seen} >= {0, 2, 3}
        assert {form.slices for form in seen} == ({1, 3, 9} if precision == "float32" or seen is forms[1] else {1, 3})
    assert any(form.samples > 1 and form.windows > 1 for form in forms[0])


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("shared_bytes", [FEW, 232448], indirect=True)
def test_every_path_against_the_detach_loop(shared_bytes: int, shortcut: str) -> None:
    """Judged on the float64 network's own bits: so few ReLUs that rounding flips none of them here."""
    case = Case("six", 14, width=8, side=8, batch=2, shortcut=shortcut)
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="twin")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code)) < FLOAT32_SAMPLE_NORM


SMALL = Case("small", 14, width=16, side=6, batch=3, shortcut="pad")


def small_tape(precision: Any = "float32") -> pathnet.Tape:
    net, (images, labels) = SMALL.net(), SMALL.images()
    return pathnet.record(net, images, labels, engine="twin", precision=precision)


def arguments(precision: Any = "float32", gradients: bool = True, routing: Tensor | None = None) -> dict[str, Any]:
    """Those of `native.cuda_routed_backward`, by name."""
    tape = small_tape(precision)
    record = tape._record
    assert isinstance(record.walk, CudaWalk)
    program = record.walk.network.backward
    routing = torch.randn(3, tape.n, 2) if routing is None else routing
    return {
        "grad": record.start.mantissa[None],
        "exponent": record.start.exponent[None],
        "starts": torch.zeros(len(routing), dtype=torch.int32),
        "routing": routing,
        "order": torch.arange(len(routing), dtype=torch.int32),
        "program": program.host,
        "device_program": program.host,
        "weights": program.weights,
        "relu_bits": record.walk.relu_bits,
        "gradients": gradients,
    }


def sample(given: dict[str, Any], part: slice) -> dict[str, Any]:
    """The arguments that have samples, of some of them."""
    chosen = {name: given[name][:, part].contiguous() for name in ("grad", "exponent")}
    return {**chosen, "relu_bits": given["relu_bits"][part]}


def forward_arguments(record: bool) -> dict[str, Any]:
    tape = small_tape()
    network = tape._record.walk.network  # type: ignore[attr-defined]
    program = network.forward
    routing = torch.ones(1, tape.n, 2) if record else torch.randn(2, tape.n, 2)
    return {
        "y0": tape._record.y0,
        "routing": routing,
        "order": torch.arange(len(routing), dtype=torch.int32),
        "program": program.host,
        "device_program": program.host,
        "weights": program.weights,
        "affine": network.affine,
        "record": record,
    }


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_path_through_identity_skips_alone_changes_no_bit(precision: Any) -> None:
    torch.manual_seed(0)
    blocks = [PreactBlock(16, (3, 3), (16, 16), 1, "pad") for _ in range(3)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, 16, 3, padding=1), blocks, head)).eval()
    tape = pathnet.record(net, torch.randn(2, 3, 5, 7), torch.tensor([0, 1]), engine="twin", precision=precision)
    record = tape._record
    skips = pathnet.paths.routing(torch.zeros(1, 3, dtype=torch.uint8), torch.float32)
    grad, exponent = record.walk.routed_backward(record.start, skips)
    assert torch.equal(grad[0], record.start.mantissa) and torch.equal(exponent[0], record.start.exponent)
    norms = tape.path_gradient_norms(torch.zeros(1, 3, dtype=torch.uint8), per_sample=True)
    torch.testing.assert_close(norms, scaling.norms(grad, exponent), rtol=1e-6, atol=0)
    for power in (-100, 100):
        start = record.start._replace(mantissa=record.start.mantissa * 2.0**power)
        scaled = record.walk.norms(start, skips)
        torch.testing.assert_close(scaled, norms * 2.0**power, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_results_do_not_depend_on_order_grouping_or_neighbours(precision: Any) -> None:
    given = arguments(precision)
    whole = native.cuda_routed_backward(**given)
    backwards = native.cuda_routed_backward(**{**given, "order": given["order"].flip(0)})
    assert all(map(torch.equal, whole, backwards))
    for path in range(3):
        one = {**given, **{name: given[name][path : path + 1] for name in ("routing", "starts")}}
        one["order"] = given["order"][:1]
        assert all(torch.equal(a[path], b[0]) for a, b in zip(whole, native.cuda_routed_backward(**one), strict=True))
    alone = {**given, **sample(given, slice(1, 2))}
    assert all(torch.equal(a[:, 1:2], b) for a, b in zip(whole, native.cuda_routed_backward(**alone), strict=True))
    norms_alone = native.cuda_routed_backward(**{**given, "gradients": False})
    assert torch.equal(norms_alone[0], whole[0]) and norms_alone[1].shape[0] == norms_alone[2].shape[0] == 0


@pytest.mark.parametrize("precision", TOLERANCES)
def test_small_values_keep_their_relative_precision(precision: Any) -> None:
    """Weights of 2^-8 the size: along 40 modules every bit of the mantissas stays, at 1e-193 the size."""
    torch.manual_seed(0)
    blocks = [PreactBlock(16, (3, 3), (16, 16), 1, "pad") for _ in range(40)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, 16, 3, padding=1), blocks, head)).eval()
    tape = pathnet.record(net, torch.randn(1, 3, 4, 4), torch.tensor([0]), engine="twin", precision=precision)
    record = tape._record
    assert isinstance(record.walk, CudaWalk)
    routing = pathnet.paths.routing(torch.ones(1, 40, dtype=torch.uint8), torch.float32)
    for block in blocks:
        for conv in block.convs:
            conv.weight.data *= 2.0**-8
    small = CudaWalk(CudaEngine().prepare(job_of(net, (16, 4, 4), precision)), record.walk.relu_bits)
    norms = record.walk.norms(record.start, routing)
    small_norms = small.norms(record.start, routing)
    assert 0 < small_norms.item() == norms.item() * 2.0**-640
    small_grads, grads = (walk.routed_backward(record.start, routing) for walk in (small, record.walk))
    assert torch.equal(small_grads.mantissa, grads.mantissa)
    assert torch.equal(small_grads.exponent, grads.exponent - 640)


def test_scaled_coefficients_zero_gradients_and_others_that_are_not_finite() -> None:
    given = arguments(routing=torch.randn(2, 6, 2))
    norms, grad, exponent = native.cuda_routed_backward(**given)
    scaled = {**given, "grad": given["grad"] * 2.0**-100, "exponent": given["exponent"] - 400}
    other = native.cuda_routed_backward(**scaled)
    torch.testing.assert_close(other[0] * 2.0**500, norms, rtol=1e-5, atol=0)
    largest = grad.abs().flatten(2).amax(2)
    assert ((largest >= 0.25) & (largest < 1)).all()
    zeros = native.cuda_routed_backward(**{**given, "grad": torch.zeros_like(given["grad"])})
    assert not zeros[0].any() and not zeros[1].any()
    spoiled = given["grad"].clone()
    spoiled[0, 1, 0, 0, 0] = torch.nan
    broken = native.cuda_routed_backward(**{**given, "grad": spoiled})
    assert broken[0][:, 1].isnan().all() and torch.equal(broken[0][:, [0, 2]], norms[:, [0, 2]])


def test_no_paths_and_no_samples() -> None:
    given = arguments(routing=torch.empty(0, 6, 2))
    assert native.cuda_routed_backward(**given)[0].shape == (0, 3)
    none = {**arguments(), **sample(given, slice(0))}
    assert native.cuda_routed_backward(**none)[0].shape == (3, 0)
    forward = forward_arguments(record=False)
    assert native.cuda_routed_forward(**{**forward, "y0": forward["y0"][:0]})[0].shape[:2] == (2, 0)


def test_opcheck() -> None:
    ops = torch.ops.pathnet
    net = SMALL.net()
    own = tables(net, "running", (16, 6, 6))
    plan = (own.blocks, own.units, own.weights, own.scales, True, 1, GPUS["227 KB"])
    torch.library.opcheck(ops.cuda_plan.default, plan)
    for given in (arguments(), arguments("bfloat16", gradients=False)):
        torch.library.opcheck(ops.cuda_routed_backward.default, tuple(given.values()))
    for record in (True, False):
        torch.library.opcheck(ops.cuda_routed_forward.default, tuple(forward_arguments(record).values()))
    given = arguments()
    torch.library.opcheck(ops.cuda_unpack_bits.default, (given["relu_bits"], given["program"], 1, 0))


def test_other_places_and_the_whole_gradient() -> None:
    net, (images, labels) = SMALL.net(), SMALL.images()
    for at in ("image", "stem_weight"):
        tape = pathnet.record(net, images, labels, engine="twin", at=at)  # type: ignore[arg-type]
        code = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.uint8)
        expected = detach_loop(net, images, labels, code, at=at)
        assert relative_error(tape.path_gradients(code[None])[0], expected) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": lambda g: g.double()}, "grad: expected Float, got Double"),
        (
            {"grad": lambda g: g[:, :, :5].contiguous()},
            r"grad: expected shape \[\*, \*, 64, 2, 2\], got \[1, 3, 5, 2",
        ),
        ({"exponent": lambda e: e[:, :2].contiguous()}, r"exponent: expected shape \[1, 3\], got \[1, 2\]"),
        ({"starts": lambda s: s[:2]}, r"starts: expected shape \[3\], got \[2\]"),
        ({"starts": lambda s: s.long()}, "starts: expected Int, got Long"),
        ({"routing": lambda r: r[:, :2].contiguous()}, r"routing: expected shape \[\*, 6, 2\]"),
        ({"order": lambda o: o[:1]}, r"order: expected shape \[3\]"),
        ({"program": lambda p: p + 1}, "program: expected what cuda_plan made"),
        ({"program": lambda p: p[:-1]}, "program: expected what cuda_plan made"),
        ({"device_program": lambda p: p[:-1]}, "device_program: expected shape"),
        ({"device_program": lambda p: p + 1}, "device_program: expected a copy of program"),
        ({"weights": lambda w: w[:-16]}, "weights: expected shape"),
        ({"relu_bits": lambda b: b[:, :-1].contiguous()}, "relu_bits: expected shape"),
        (
            {"relu_bits": lambda b: b.t().contiguous().t()},
            "relu_bits: expected contiguous rows a multiple of 4 bytes",
        ),
        ({"relu_bits": lambda b: F.pad(b, (0, 2))[:, :-2]}, "relu_bits: expected contiguous rows a multiple of 4"),
    ],
)
def test_malformed_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        native.cuda_routed_backward(**{**given, **{name: change(given[name]) for name, change in changes.items()}})


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """The same values as a slice that begins so many elements into its memory."""
    memory = tensor.new_zeros(tensor.numel() + offset)
    memory[offset:] = tensor.flatten()
    return memory[offset:].view(tensor.shape)


@pytest.mark.parametrize(("name", "bytes_read"), [("weights", 16), ("relu_bits", 4)])
def test_slices_begin_where_the_kernels_can_read_them(name: str, bytes_read: int) -> None:
    given = arguments("bfloat16")
    whole = native.cuda_routed_backward(**given)
    sliced = {**given, name: shifted(given[name], bytes_read)}
    assert all(map(torch.equal, whole, native.cuda_routed_backward(**sliced)))
    for offset in (1, 2, bytes_read // 2):
        message = f"{name}: expected data aligned to {bytes_read} bytes, got it {offset} bytes off"
        with pytest.raises(RuntimeError, match=message):
            native.cuda_routed_backward(**{**given, name: shifted(given[name], offset)})


def test_bits_may_be_columns_of_longer_rows() -> None:
    given = arguments("bfloat16")
    longer = F.pad(given["relu_bits"], (64, 4), value=255)
    columns = {**given, "relu_bits": longer[:, 64:-4]}
    whole = native.cuda_routed_backward(**given)
    assert all(map(torch.equal, whole, native.cuda_routed_backward(**columns)))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_each_path_starts_from_its_gradient(precision: Any) -> None:
    given = arguments(precision)
    grad, exponent = torch.randn(4, *given["grad"].shape[1:]), torch.randint(-9, 9, (4, 3), dtype=torch.int32)
    starts = torch.tensor([2, 0, 2], dtype=torch.int32)
    given["routing"][2] = torch.tensor([1.0, 0.0])
    several = native.cuda_routed_backward(**{**given, "grad": grad, "exponent": exponent, "starts": starts})
    for path, start in enumerate(starts.tolist()):
        alone = {**given, "grad": grad[start : start + 1], "exponent": exponent[start : start + 1]}
        expected = native.cuda_routed_backward(**alone)
        assert all(torch.equal(a[path], b[path]) for a, b in zip(several, expected, strict=True))


def test_a_start_that_is_none_is_not_walked() -> None:
    given = arguments(gradients=False)
    for wrong in (-1, 1, 1 << 30):
        native.cuda_routed_backward(**{**given, "starts": torch.full_like(given["starts"], wrong)})


@pytest.mark.parametrize("seed", [0, 3])
def test_sums_by_length_launch_once_a_block_and_copy_no_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, images, labels = random_basic_net(seed, smallest=6, post=seed == 3)
    tape = pathnet.record(net, images, labels, engine="twin")
    record, launched, launch = tape._record, [], native.cuda_routed_backward
    assert isinstance(record.walk, CudaWalk)
    memory = record.walk.relu_bits.untyped_storage().data_ptr()

    def watched(*given: Any) -> Any:
        launched.append((len(given[3]), given[8].untyped_storage().data_ptr() == memory))
        return launch(*given)

    monkeypatch.setattr(native, "cuda_routed_backward", watched)
    record.walk.sums_by_length(record.start, torch.ones(net.n, 2))
    assert launched == [(2 * k, True) for k in range(1, net.n + 1)]


@pytest.mark.parametrize("sums", [False, True], ids=["paths", "sums"])
def test_what_a_walk_needs_of_the_host_is_sent_in_two_copies(sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a device that has no numbers to give back: the order is made on the host, and nobody waits."""
    recorded: Any = small_tape()._record.walk
    sent: list[tuple[str, list[int]]] = []
    network, device = recorded.network, torch.device("meta")
    assert len(network.steps) == 6

    def noted(values: Tensor, to: torch.device) -> Tensor:
        assert to == device
        sent.append((values.device.type, list(values.shape)))
        return values.to(to)

    def launched(*given: Any) -> tuple[Tensor, ...]:
        assert {tensor.device.type for tensor in given[:5]} == {"meta"}
        return given[0], given[0], given[1]

    monkeypatch.setattr(cuda, "to_device", noted)
    monkeypatch.setattr(native, "cuda_routed_backward", launched)
    grad, exponent = torch.empty(12, 3, 64, 2, 2, device=device), torch.empty(12, 3, device=device).int()
    walk = CudaWalk(network, recorded.relu_bits.to(device))
    if sums:
        walk._through_block(5, ScaledGradient(grad, exponent), [(1.0, 0.0)] * 6 + [(0.0, 1.0)] * 6)
    else:
        walk.routed_backward(ScaledGradient(grad[0], exponent[0]), torch.ones(12, 6, 2))
    assert sent == [("cpu", [2, 12]), ("cpu", [12, 1 if sums else 6, 2])]


def test_slices_of_float32_begin_anywhere() -> None:
    given, forward = arguments(), forward_arguments(record=False)
    whole, outputs = native.cuda_routed_backward(**given), native.cuda_routed_forward(**forward)
    for name in ("grad", "exponent", "starts", "routing", "order", "device_program"):
        sliced = {**given, name: shifted(given[name], 1)}
        assert all(map(torch.equal, whole, native.cuda_routed_backward(**sliced)))
    for name in ("y0", "routing", "order", "affine", "device_program"):
        sliced = {**forward, name: shifted(forward[name], 1)}
        assert all(map(torch.equal, outputs, native.cuda_routed_forward(**sliced)))
    with pytest.raises(RuntimeError, match="weights: expected data aligned to 16 bytes, got it 8 bytes off"):
        native.cuda_routed_forward(**{**forward, "weights": shifted(forward["weights"], 8)})


def test_a_program_serves_its_own_direction_only() -> None:
    given, forward = arguments(), forward_arguments(record=False)
    with pytest.raises(RuntimeError, match="program: expected one for the walk back, got the other"):
        native.cuda_routed_backward(**{**given, "program": forward["program"]})
    with pytest.raises(RuntimeError, match="program: expected one for the walk forward, got the other"):
        native.cuda_routed_forward(**{**forward, "program": given["program"]})
    with pytest.raises(RuntimeError, match="routing: expected one to record, got 2"):
        native.cuda_routed_forward(**{**forward, "record": True})


# What the kernels serve


def refused(net: ResidualNet, side: int, shared_bytes: int = 101376) -> str | None:
    channels = net.stem_weight().shape[0]
    return cuda.refusal(job_of(net, (channels, side, side), "bfloat16"), shared_bytes)


def test_what_the_kernels_have_no_form_for_is_named() -> None:
    models = pathnet.models
    assert refused(models.preact_resnet(20), 32) is None
    assert refused(models.preact_resnet(20, width=8), 32) is None
    assert refused(models.preact_resnet(20, width=12, shortcut="pad"), 21) is None
    assert refused(models.resnet(20), 32) is refused(models.resnet(110, shortcut="projection"), 32) is None
    assert refused(models.resnet(20, block="bottleneck"), 32) == "block 1 is not a basic block (two convolutions)"
    assert refused(models.preact_resnet(20, width=32), 32) == "block 7 has more than 64 channels"
    assert refused(models.preact_resnet(20, block="bottleneck"), 32) == (
        "block 1 is not a basic block (two convolutions)"
    )
    assert refused(models.preact_resnet(20), 96) is None
    message = refused(models.preact_resnet(20), 32, 20480)
    assert message and re.fullmatch(
        r"a window of the network's images needs \d+ bytes of shared memory, and a thread block has 20480", message
    )
    wide = ResidualNet(nn.Conv2d(3, 64, 3), [PreactBlock(64, (3, 3), (64, 64), 1, "pad")], nn.Flatten())
    assert refused(wide, 32) is None
    assert refused(wide, 16382) == "block 1 has images of more than 65536 pixels with their borders"
    # In strips of eight pixels a column is eight times itself, and the elements of many thread blocks are int32.
    tall = cuda.refusal(job_of(wide, (64, 8192, 1), "float32"), GPUS["99 KB"])
    assert tall is None
    tall = cuda.refusal(job_of(wide, (64, 8193, 1), "float32"), GPUS["99 KB"])
    assert tall == "block 1 has images of more than 4194304 numbers in strips of eight pixels"
    uneven = ResidualNet(nn.Conv2d(3, 16, 3), [PreactBlock(16, (3, 3), (40, 16), 1, "pad")], nn.Flatten())
    assert refused(uneven, 8) == "block 1 has convolutions of different widths"
    kernels = ResidualNet(nn.Conv2d(3, 16, 3), [PreactBlock(16, (5, 3), (16, 16), 1, "pad")], nn.Flatten())
    assert refused(kernels, 8) == "block 1 has a convolution that is not 3x3 with padding 1"


def test_more_shared_memory_than_any_gpu_has_is_refused() -> None:
    """It would hold more strips than divisions by multiplication count."""
    own = tables(pathnet.models.preact_resnet(8), "running", (16, 8, 8))
    given = own.blocks, own.units, own.weights, own.scales, True, 1
    native.cuda_plan(*given, 1 << 18)
    with pytest.raises(RuntimeError, match="shared_bytes: expected 1 to 262144, got 262145"):
        native.cuda_plan(*given, (1 << 18) + 1)


def test_the_walk_forward_takes_two_terms_a_number() -> None:
    own = tables(pathnet.models.preact_resnet(8), "running", (16, 8, 8))
    with pytest.raises(RuntimeError, match="parts: expected 2 for the walk forward, got 1"):
        native.cuda_plan(own.blocks, own.units, own.weights, own.scales, False, 1, GPUS["227 KB"])


def test_units_without_relu_but_the_networks_first_are_the_cpu_engines_alone() -> None:
    own = tables(pathnet.models.preact_resnet(8), "running", (16, 8, 8))
    given = own.weights, own.scales, True, 1, GPUS["227 KB"]
    native.cuda_plan(own.blocks, own.units, *given)
    for unit, block in ((1, 1), (2, 2)):
        units = own.units.clone()
        units[unit, UnitColumn.BITS] = -1
        with pytest.raises(RuntimeError, match=f"block {block} has a convolution without BN and ReLU"):
            native.cuda_plan(own.blocks, units, *given)


def described(form: native.CudaForm) -> str:
    samples = f"{form.samples} sample{'s' if form.samples > 1 else ''}"
    weights = {1: "", 3: ", weights by columns", 9: ", weights by taps"}[form.slices]
    return f"{samples} {'in windows' if form.windows else 'resident'}{weights}"


@pytest.mark.parametrize("depth", [20, 110])
@pytest.mark.parametrize("gpu", GPUS)
def test_the_papers_networks_fit_every_gpu_as_the_readme_says(
    gpu: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaEngine, "twin_shared_bytes", GPUS[gpu])
    net, forms = pathnet.models.preact_resnet(depth), {}
    for precision in TOLERANCES:
        network = CudaEngine().prepare(job_of(net, (16, 32, 32), precision))
        programs = network.backward, network.forward
        forms[precision], forward = (native.cuda_form(program.host) for program in programs)
        assert max(forms[precision].shared_bytes, forward.shared_bytes) <= GPUS[gpu]
    cells = gpu, described(forms["bfloat16"]), described(forms["float32"]), described(forward)
    assert f"| {' | '.join(cells)} |" in README


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """As if this process had a GPU; nothing is run on it."""
    monkeypatch.setattr(engines, "ENGINES", (CudaEngine(), ReferenceEngine()))
    monkeypatch.setattr(CudaEngine, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(shared_memory_per_block_optin=GPUS["227 KB"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_a_torch_that_tells_no_shared_memory_gets_what_every_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    device = torch.device("cuda")
    assert CudaEngine().shared_bytes(device) == GPUS["227 KB"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert CudaEngine().shared_bytes(device) == GPUS["99 KB"]


def choose(name: str = "auto", bn: Any = "running", precision: Any = "float32") -> str:
    return engines.choose(name, Job(SMALL.net(), bn, precision, (16, 6, 6), torch.device("cuda"))).name


def test_auto_takes_cuda_on_a_gpu_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "disagreement", lambda *job, small: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == choose(precision="bfloat16") == "cuda"
        assert choose(precision="float64") == "reference"
    with pytest.warns(RuntimeWarning, match=r'engine reference serves, since cuda: no bn="batch"'):
        assert choose(bn="batch") == "reference"


def test_an_engine_that_disagrees_with_the_reference_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "disagreement", lambda *job, small: "it disagrees with the reference on a small input")
    with pytest.warns(RuntimeWarning, match="engine reference serves, since cuda: it disagrees with the reference"):
        assert choose() == "reference"
    with pytest.raises(ValueError, match="engine: 'cuda' cannot serve this job"):
        choose("cuda")


def test_where_there_is_no_gpu_the_engine_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**native.build_facts(), "without_cuda": "no nvcc was found when the library was built"}
    with monkeypatch.context() as changed:
        changed.setattr(native, "build_facts", lambda: facts)
        assert CudaEngine().unavailable() == "no nvcc was found when the library was built"
    with monkeypatch.context() as changed:
        changed.setattr(native, "build_facts", lambda: {**facts, "without_cuda": ""})
        changed.setattr(torch.cuda, "is_available", lambda: False)
        assert CudaEngine().unavailable() == "this process sees no CUDA device"
    on_a_gpu(monkeypatch, capability=(7, 5))
    job = Job(SMALL.net(), "running", "float32", (16, 6, 6), torch.device("cuda"))
    reason = CudaEngine().unsupported(job)
    assert reason == "Some GPU is of compute capability 7.5, the kernels need 8.0"


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_module_shrinks_beyond_float32_is_kept(seed: int, precision: Any) -> None:
    net, images, labels = random_basic_net(seed, smallest=1 if precision == "float32" else 6)
    net = faint(net, seed, growth=20)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check(tape, random_routings(net.n, seed), precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
