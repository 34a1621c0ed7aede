"""Every path of small networks of every kind by the autograd engine, against the plain loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.any_blocks import (
    IMAGE_NETS,
    TOKEN_NETS,
    Counts,
    Masked,
    MaskedNet,
    image_net,
    loop,
    of_blocks,
    sequences,
    some_paths,
    squares,
)
from helpers.oracles import relative_error
from helpers.routed_networks import batch
from helpers.tolerances import EXACT_WALK
from torch import Tensor

import pathnet
from pathnet.engines.autograd import AutogradPrepared


def programs(recorder: pathnet.Recorder) -> list[bool]:
    """Return for each block whether a program was captured from it."""
    service: Any = recorder._service
    prepared: AutogradPrepared = service.prepared
    return [any(block.programs.values()) for block in prepared.blocks]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", IMAGE_NETS)
def test_every_path_of_convolutional_networks(kind: str, bn: Any, form: str) -> None:
    net, (images, labels) = image_net(kind, bn), batch()
    recorder = pathnet.Recorder(net, bn, "autograd", "float64")
    codes = pathnet.paths.enumerate_all(net.n)
    # A program is captured on the first batch, and takes the forward pass of the second.
    first = recorder(images.flip(0), labels.flip(0))
    before = first.path_gradients(codes)
    tape = recorder(images, labels)
    for code, gradient, reversed_gradient in zip(codes, tape.path_gradients(codes), before, strict=True):
        expected = loop(net, images, code, lambda output: F.cross_entropy(output, labels))
        assert relative_error(gradient, expected) < EXACT_WALK
        assert relative_error(reversed_gradient.flip(0), expected) < EXACT_WALK
    assert all(programs(recorder)) == (form == "captured")


@pytest.mark.parametrize("kind", TOKEN_NETS)
def test_every_path_of_networks_of_sequences(kind: str, form: str) -> None:
    net = TOKEN_NETS[kind]()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    codes = some_paths(net)
    for seed in range(2):
        inputs = sequences(seed)
        for code, gradient in zip(codes, recorder(inputs, inputs).path_gradients(codes), strict=True):
            assert relative_error(gradient, loop(net, inputs, code, lambda y: squares(y, y))) < EXACT_WALK
    plain = {"chooses": [True, False, True], "changes": [True, True, True]}.get(kind, [False] * net.n)
    assert programs(recorder) == [form == "captured" and not stays for stays in plain]


@pytest.mark.parametrize("kind", ["attention", "gated"])
def test_in_float32_too(kind: str, form: str) -> None:
    net, inputs = TOKEN_NETS[kind](), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", loss=squares)
    codes = pathnet.paths.enumerate_all(net.n)
    for _ in range(2):
        for code, gradient in zip(codes, recorder(inputs, inputs).path_gradients(codes), strict=True):
            assert relative_error(gradient, loop(net, inputs, code, lambda y: squares(y, y))) < 1e-5


def test_the_highway_gates_own_part_is_counted_where_a_routing_names_it(form: str) -> None:
    net, (images, labels) = image_net("highway", "running"), batch()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64")
    y0 = net.stem(images).detach().requires_grad_()
    y = y0
    for block in net:
        y = block(y)
    expected = torch.autograd.grad(F.cross_entropy(net.head(y), labels), y0)[0]
    for _ in range(2):
        assert relative_error(recorder(images, labels).gradient(), expected) < EXACT_WALK


def test_a_block_that_hides_a_value_from_the_trace_is_seen_on_the_second_batch(form: str) -> None:
    net = of_blocks([Counts(), Counts()])
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    codes = pathnet.paths.enumerate_all(net.n)
    for seed in range(3):
        inputs = sequences(seed)
        for code, gradient in zip(codes, recorder(inputs, inputs).path_gradients(codes), strict=True):
            assert relative_error(gradient, loop(net, inputs, code, lambda y: squares(y, y))) < EXACT_WALK


def test_a_batchs_context_is_none_of_the_next_batchs(form: str) -> None:
    """Masks are inputs of a captured block. Numbers are constants: another one is captured anew."""
    net = of_blocks([Masked(), Masked(), Masked()])
    net = MaskedNet(net.stem, list(net), net.head)  # type: ignore[arg-type]
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    codes = pathnet.paths.enumerate_all(net.n)
    for seed, length in ((0, 7), (1, 7), (2, 5), (3, 7)):
        inputs = sequences(seed)[:, :length]
        batch = {"x": inputs, "mask": sequences(seed + 9)[:, :length, 0].abs()}
        bound = net.bound(net.split(batch)[1])
        for code, gradient in zip(codes, recorder(batch, inputs).path_gradients(codes), strict=True):
            assert relative_error(gradient, loop(bound, inputs, code, lambda y: squares(y, y))) < EXACT_WALK
    assert all(programs(recorder)) == (form == "captured")


def test_the_result_is_none_of_the_records_memory(form: str) -> None:
    """Results of paths through identity skips alone are the loss's gradient, which later walks start from."""
    net, inputs = TOKEN_NETS["gated"](), sequences()
    tape = pathnet.record(net, inputs, inputs, engine="autograd", precision="float64", loss=squares)
    code = torch.zeros(1, net.n, dtype=torch.uint8)
    before = tape.path_gradients(code, scaled=True)
    truth: Tensor = tape.path_gradients(code)
    before.mantissa.fill_(7.0)
    assert torch.equal(tape.path_gradients(code), truth)
