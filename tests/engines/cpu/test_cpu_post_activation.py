"""Post-activation blocks through the cpu engine."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import post_activation_net, shaken
from helpers.cpu_networks import SEEDS, each_seed, random_paths, recorded
from helpers.judging import TOLERANCES, check, check_sums
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD
from helpers.walk_cases import MODES
from torch import nn

import pathnet
from pathnet import native
from pathnet.models import resnet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(("isa", "seed"), each_seed(SEEDS // 2))
def test_post_activation_blocks(
    isa: str, seed: int, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walks, sums by length, forward passes and records, in every instruction set."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = post_activation_net(seed, bn)
    exact = in_float64(net, bn)
    recorder = pathnet.Recorder(net, bn, "cpu", precision)  # type: ignore[arg-type]
    tape = recorder(images, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    check(tape, random_paths(net.n, seed), precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    for output, path in zip(recorder.routed_outputs(images, ROUTINGS[net.n]), ROUTINGS[net.n].tolist(), strict=True):
        y = exact.stem(images.double())
        for block, (a, c) in zip(exact.blocks, path, strict=True):
            y = block.join(a * block.skip(y) + c * block.residual(y))
        assert relative_error(output, exact.head(y).detach()) < FORWARD


ROUTINGS = {n: torch.rand(4, n, 2, generator=torch.Generator().manual_seed(n)) for n in range(2, 7)}


for routing in ROUTINGS.values():
    routing[0], routing[1, :, 1], routing[2, 0, 0] = 1, 0, 0


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_every_path_of_post_activation_networks_against_the_detach_loop(seed: int, bn: str) -> None:
    net, images, labels = post_activation_net(seed, bn)
    tape = recorded(net, images, labels, bn, "float32")
    codes = pathnet.paths.enumerate_all(net.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code, bn).detach()) < FLOAT32_SAMPLE_NORM
    # At these points the polynomial of path lengths is a routing.
    sums = tape.gradient_by_length().double()
    for x in (-1.0, 0.5, 2.0):
        routing = torch.tensor([1.0, x]).expand(1, net.n, 2)
        whole = sum(x**k * grad for k, grad in enumerate(sums))
        assert relative_error(tape.routed_gradients(routing)[0], torch.as_tensor(whole)) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_deep_post_activation_networks_underflow_nowhere(shortcut: str, bn: str, precision: str) -> None:
    """Modules and projections whose last BN shrinks a gradient by 1e-9."""
    torch.manual_seed(0)
    # A handful of channels averages no bfloat16 roundings, of which minimal filtering has more than AMX tiles.
    width = 5 if precision == "float32" else 12
    net = shaken(resnet(56, width=width, shortcut=shortcut)).eval()  # type: ignore[arg-type]
    for block in net.blocks:
        for norm in (block.bns[-1], block.projection_bn):
            if norm is not None:
                norm.weight.data *= 2.0**-30
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    codes = torch.cat([pathnet.paths.sample(27, length, 1) for length in (0, 13, 27)])
    tape = recorded(net, images, labels, bn, precision)
    # In bfloat16 the direction of a gradient that all convolutions have rounded is not judged.
    norms, _ = check(tape, pathnet.paths.routing(codes), precision, gradients=precision == "float32")
    assert (norms > 0).all() and norms[-1].max() < 1e-160


@pytest.mark.parametrize("bn", MODES)
def test_biases_before_batch_normalisation(bn: str) -> None:
    net, images, labels = post_activation_net(2, bn)
    for block in net.blocks:
        for conv in (*block.convs, block.projection):
            if conv is not None:
                conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    tape = recorded(net, images, labels, bn, "float32")
    assert relative_error(tape.output, in_float64(net, bn)(images.double()).detach()) < FORWARD
    check(tape, random_paths(net.n, 0), "float32")
