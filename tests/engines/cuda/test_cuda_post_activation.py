"""Post-activation networks through the cuda engine's kernels on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import faint, shaken
from helpers.judging import TOLERANCES, check, check_sums, random_basic_net, random_routings, reference_outputs
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD

import pathnet
from pathnet import native, scaling
from pathnet.engines.cuda import CudaWalk
from pathnet.models import ResidualNet, resnet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


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


@pytest.mark.parametrize("shortcut", ["projection", "pad", "pad_around"])
def test_every_path_of_a_post_activation_network_against_the_detach_loop(shortcut: str) -> None:
    net, images, labels = cifar_resnet(14, shortcut, width=6), torch.randn(2, 3, 9, 9), torch.tensor([0, 1])
    tape = pathnet.record(net, images, labels, engine="twin")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code)) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize(
    ("depth", "shortcut", "precision"),
    [(20, "pad_around", "float32"), (20, "projection", "bfloat16"), (110, "pad", "bfloat16")],
)
def test_the_original_cifar_networks(depth: int, shortcut: str, precision: Any) -> None:
    """Use three samples in bfloat16: the last thread block has one sample instead of two."""
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
