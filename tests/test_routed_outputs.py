"""Forward passes under routings: `Recorder.routed_outputs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import SMALL, random_net
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import EXACT_WALK, FLOAT32_SAMPLE_NORM
from torch import Tensor, nn

import pathnet
from pathnet import native
from pathnet.models import Block, ResidualNet

CASE = SMALL[1]
CODES = pathnet.paths.enumerate_all(6)[::5]
needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
ENGINES = ["reference", "autograd", pytest.param("cpu", marks=needs_native)]


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
    for output in outputs:
        torch.testing.assert_close(output, net(images).detach(), rtol=1e-6, atol=1e-6)
    double = pathnet.Recorder(net, precision="float64").routed_outputs(images, torch.ones(1, 6, 2))
    assert (
        double.dtype == torch.float64
        and relative_error(double[0], net.double()(images.double()).detach()) < EXACT_WALK
    )


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_a_deleted_block_is_as_if_it_had_never_been(bn: Any) -> None:
    """Check this also for a residual module that is not finite: it is not computed."""
    net, (images, labels) = CASE.net(), CASE.images()
    same_shape = [i for i, block in enumerate(net.blocks) if block.projection is None]
    assert len(same_shape) == 4
    routing = torch.ones(4, 6, 2, dtype=torch.float64)
    routing[range(4), same_shape, 1] = 0
    outputs = pathnet.Recorder(net, bn, precision="float64").routed_outputs(images, routing)
    for i, output in zip(same_shape, outputs, strict=True):
        rest = [block for j, block in enumerate(net.blocks) if j != i]
        without = pathnet.record(ResidualNet(net.stem, rest, net.head), images, labels, bn, precision="float64")
        assert relative_error(output, without.output) < EXACT_WALK
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
