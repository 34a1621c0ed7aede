"""The cuda engine without a GPU: the bodies of its kernels, run on the host by their twin, against the reference.

The twin also fails on a race, on a read of what was never written or is still being copied, and out of bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import Case, faint, shaken
from helpers.judging import TOLERANCES, check, check_sums, random_basic_net, random_routings, reference_outputs
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD
from helpers.twin import (
    FEW,
    GPUS,
    SMALL,
    job_of,
    taking_turns,
)
from torch import Tensor, nn

import pathnet
from pathnet import native, scaling
from pathnet.engines.cuda import CudaEngine, CudaWalk
from pathnet.models import PreactBlock, ResidualNet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


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
        for recorded, z in zip(bits, activations, strict=True):
            sure = z.abs() > 1e-3 * z.abs().mean()
            assert torch.equal(recorded[sure], (z > 0)[sure])
    routing = torch.randn(3, net.n, 2)
    routing[0, :, 1] = 0
    routing[1, ::2, 1] = 0
    expected = reference_outputs(exact, images, routing)
    for routed, other in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(routed, other) < FORWARD


def keep(values: list[Tensor]) -> Callable[..., None]:
    return lambda module, inputs, output: values.append(output.detach())


@pytest.mark.parametrize("precision", TOLERANCES)
@taking_turns(4, 8)
def test_sums_by_length_are_those_of_every_path(seed: int, shared_bytes: int, precision: Any) -> None:
    net, images, labels = random_basic_net(seed, smallest=6)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("depth", "shared_bytes"),
    list(zip((20, 20, 110), GPUS.values(), strict=True)),
    ids=GPUS,
    indirect=["shared_bytes"],
)
def test_the_papers_networks(depth: int, shared_bytes: int, precision: Any) -> None:
    """Use 227 KB: a thread block has one sample in float32, in bfloat16 two, and the last one."""
    case = Case(f"resnet-{depth}", depth, width=16, side=32, batch=2 if precision == "float32" else 3)
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    assert relative_error(tape.output, in_float64(net, "running")(images.double()).detach()) < FORWARD
    codes = torch.cat([pathnet.paths.sample(tape.n, length, 1) for length in (0, tape.n // 3, tape.n)])
    norms, expected = map(scaling.combine, check(tape, pathnet.paths.routing(codes), precision))
    torch.testing.assert_close(norms, expected, rtol=TOLERANCES[precision][0], atol=0)


@pytest.mark.parametrize("shortcut", ["projection", "pad", "pad_around"])
@pytest.mark.parametrize("shared_bytes", [FEW, 232448], indirect=True)
def test_every_path_against_the_detach_loop(shared_bytes: int, shortcut: str) -> None:
    """Judge by the float64 network's bits: rounding flips none of these few ReLUs."""
    case = Case("six", 14, width=10, side=8, batch=2, shortcut=shortcut)
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="twin")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code)) < FLOAT32_SAMPLE_NORM


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


def test_other_places_and_the_whole_gradient() -> None:
    net, (images, labels) = SMALL.net(), SMALL.images()
    for at in ("image", "stem_weight"):
        tape = pathnet.record(net, images, labels, engine="twin", at=at)  # type: ignore[arg-type]
        code = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.uint8)
        expected = detach_loop(net, images, labels, code, at=at)
        assert relative_error(tape.path_gradients(code[None])[0], expected) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_module_shrinks_beyond_float32_is_kept(seed: int, precision: Any) -> None:
    net, images, labels = random_basic_net(seed, smallest=1 if precision == "float32" else 6)
    net = faint(net, seed, growth=20)
    tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
    check(tape, random_routings(net.n, seed), precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
