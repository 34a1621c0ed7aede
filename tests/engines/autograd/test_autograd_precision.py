"""The network's own types by ``precision="network"``, and weights in half precision in any other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.any_blocks import TOKEN_NETS, image_net, loop, of_blocks, sequences, squares
from helpers.oracles import relative_error
from helpers.routed_networks import batch
from helpers.token_nets import WIDTH
from torch import Tensor, nn

import pathnet
from pathnet.models import Block

HALVES = {torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Errors of a path's gradient through three blocks, forward and back, in a type of 8 or 11 bits."""


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["language model", "attention", "gated"])
def test_the_networks_own_types(kind: str, dtype: torch.dtype, form: str) -> None:
    net, inputs = TOKEN_NETS[kind]().to(dtype), sequences().to(dtype)
    exact = copy.deepcopy(net).double()
    recorder = pathnet.Recorder(net, precision="network", loss=squares)
    for _ in range(2):
        tape = recorder(inputs, inputs)
        assert tape.engine == "autograd" and tape.output.dtype == dtype
        for code in pathnet.paths.enumerate_all(net.n):
            expected = loop(exact, inputs.double(), code, lambda y: squares(y, y))
            assert relative_error(tape.path_gradients(code[None])[0], expected) < HALVES[dtype]
    recomputed = tape.gradient_by_length().sum(0)
    assert relative_error(recomputed, tape.gradient()) < HALVES[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kept", [True, False])
def test_autocast_where_the_recorder_is_called_holds_in_the_walks(
    dtype: torch.dtype, kept: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr("pathnet.engines.autograd.available", lambda device: 0)
    net, inputs = TOKEN_NETS["attention"]().float(), sequences().float()
    recorder = pathnet.Recorder(net, precision="network", loss=squares)
    with torch.autocast("cpu", dtype):
        tape = recorder(inputs, inputs)
    outside = recorder(inputs, inputs)
    assert (tape.output.dtype, outside.output.dtype) == (dtype, torch.float32)
    exact, codes = copy.deepcopy(net).double(), pathnet.paths.enumerate_all(net.n)
    for _ in range(2):
        for code, gradient, in_full in zip(
            codes, tape.path_gradients(codes), outside.path_gradients(codes), strict=True
        ):
            expected = loop(exact, inputs.double(), code, lambda y: squares(y, y))
            assert 1e-6 < relative_error(gradient, expected) < HALVES[dtype]
            assert relative_error(in_full, expected) < 1e-5


def test_float32_is_float32_under_autocast_too() -> None:
    net, inputs = TOKEN_NETS["gated"]().bfloat16(), sequences().bfloat16()
    expected = pathnet.record(net, inputs, inputs, loss=squares).gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pathnet.record(net, inputs, inputs, loss=squares).gradient(), expected)
    exact = pathnet.record(net, inputs, inputs, precision="float64", engine="reference", loss=squares).gradient()
    assert relative_error(expected, exact) < 1e-5


@pytest.mark.parametrize("at", ["image", "stem_weight"])
def test_other_places_in_half_precision(at: Any) -> None:
    net, (images, labels) = image_net("preact", "running").bfloat16(), batch()
    images = images.bfloat16()
    tape = pathnet.record(net, images, labels, precision="network", at=at)
    exact = pathnet.record(net, images, labels, precision="float64", engine="reference", at=at)
    assert relative_error(tape.gradient(), exact.gradient()) < 0.1
    outputs = pathnet.Recorder(net, precision="network").routed_outputs(images, torch.ones(1, net.n, 2))
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0], net(images))


class Faint(Block):
    """A module that scales by 1e-3, through a product whose result is smaller still."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(x) * 1e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_fifty_four_faint_modules_in_half_precision_lose_nothing(dtype: torch.dtype, form: str) -> None:
    net = of_blocks([Faint() for _ in range(54)])
    for block in net:
        with torch.no_grad():
            block.linear.weight.copy_(nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)))
    net, inputs = net.to(dtype), sequences().to(dtype)
    code = torch.ones(1, 54, dtype=torch.uint8)
    recorder = pathnet.Recorder(net, precision="network", loss=squares)
    exact = pathnet.record(net, inputs, inputs, precision="float64", engine="reference", loss=squares)
    expected = exact.path_gradient_norms(code)
    assert expected < 1e-160
    for _ in range(2):
        torch.testing.assert_close(recorder(inputs, inputs).path_gradient_norms(code), expected, rtol=0.1, atol=0)


def test_a_loss_too_faint_for_float16_keeps_its_gradient() -> None:
    net, inputs = TOKEN_NETS["gated"]().half(), sequences().half()
    codes = pathnet.paths.enumerate_all(net.n)
    norms = [
        pathnet.record(
            net, inputs, inputs, precision=precision, loss=lambda output, _: output.double().square().mean() * 1e-7
        ).path_gradient_norms(codes)
        for precision in ("network", "float64")
    ]
    torch.testing.assert_close(*norms, rtol=1e-2, atol=0)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_other_engines_refuse_it_by_name(engine: str) -> None:
    net, (images, labels) = image_net("preact", "running").float(), batch()
    with pytest.raises(ValueError, match='no precision="network"|not built'):
        pathnet.record(net, images.float(), labels, engine=engine, precision="network")
