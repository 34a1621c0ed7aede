"""Differentiable outputs under a routing: the same coefficients in both directions, bad arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.routed_networks import EXACT, NETS, batch, forward, gradients, random, random_net_of
from torch import Tensor, nn

import pathnet


@pytest.mark.parametrize("bn", ["running", "batch", "training"])
@pytest.mark.parametrize("kind", NETS)
def test_ones_are_the_network_bit_for_bit(kind: str, bn: str) -> None:
    net, (images, labels) = random_net_of(kind, bn), batch()
    other = copy.deepcopy(net)
    expected = gradients(other, whole := other(images), labels)
    for routing, backward in ((torch.ones(net.n, net.parts), None), (None, [[1.0] * net.parts] * net.n)):
        copied = copy.deepcopy(net)
        output = pathnet.routed(copied, images, routing, backward)
        assert torch.equal(output, whole)
        for name, grad in gradients(copied, output, labels).items():
            assert grad is not None and torch.equal(grad, expected[name]), name
        for name, buffer in copied.named_buffers():
            assert torch.equal(buffer, other.get_buffer(name)), name
    # Two columns leave the gate out, which has no value.
    torch.testing.assert_close(
        pathnet.routed(copy.deepcopy(net), images, torch.ones(net.n, 2)), whole, rtol=0, atol=0
    )


@pytest.mark.parametrize("bn", ["running", "batch", "training"])
@pytest.mark.parametrize("kind", NETS)
def test_random_coefficients_give_autograds_gradients(kind: str, bn: str) -> None:
    net, (images, labels) = random_net_of(kind, bn), batch()
    routing, other = random(net.n), copy.deepcopy(net)
    output = pathnet.routed(net, images, routing)
    expected, _ = forward(other, images, lambda i, s, f, _: routing[i, 0] * s + routing[i, 1] * f)
    torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
    measured, theirs = gradients(net, output, labels), gradients(other, expected, labels)
    for name, grad in measured.items():
        if kind == "highway" and ".gate." in name:
            assert grad is None
        else:
            torch.testing.assert_close(grad, theirs[name], rtol=1e-10, atol=1e-13)
    for name, buffer in net.named_buffers():
        if bn == "running":
            assert torch.equal(buffer, other.get_buffer(name)), name
        elif name.endswith("num_batches_tracked"):
            assert buffer == 1, name


@pytest.mark.parametrize("kind", ["preact", "highway", "join"])
def test_first_and_second_derivatives_of_inputs_and_coefficients(kind: str) -> None:
    net, (images, _) = random_net_of(kind), batch(1)
    net.requires_grad_(False)
    routing = random(net.n)

    def output(x: Tensor, coefficients: Tensor) -> Tensor:
        return pathnet.routed(net, x, coefficients)

    inputs = images[:, :, :4, :4].clone().requires_grad_(), routing.requires_grad_()
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


def test_ones_in_two_columns_leave_out_what_flows_through_gates() -> None:
    net, (images, labels) = random_net_of("highway"), batch()
    other = copy.deepcopy(net)
    expected = gradients(other, forward(other, images, lambda i, s, f, _: s + f)[0], labels)
    for name, grad in gradients(net, pathnet.routed(net, images, torch.ones(3, 2)), labels).items():
        assert (grad is None) == (".gate." in name)
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)


def test_the_parts_of_a_gated_block_share_one_pass_of_its_statistics() -> None:
    net, (images, _) = random_net_of("highway", "training"), batch()
    other = copy.deepcopy(net)
    pathnet.routed(net, images, None, random(3, 3))
    other(images)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (torch.ones(3, 4), r"expected shape \[3, 2\] for 3 blocks, got \[3, 4\]"),
        (torch.ones(2, 2), r"expected shape \[3, 2\] for 3 blocks, got \[2, 2\]"),
        (torch.ones(1, 3, 2), r"expected shape \[3, 2\] for 3 blocks, got \[1, 3, 2\]"),
        (torch.ones(3, 3), r"expected shape \[3, 2\] for 3 blocks, got \[3, 3\]"),
        (torch.ones(3, 2, dtype=torch.int64), r"expected a floating-point tensor, got torch\.int64"),
        (torch.full((3, 2), torch.nan), "expected coefficients that are finite in float32"),
        ([[1, 1], [1, 1], [1, 1e300]], "expected coefficients that are finite in float32"),
        ("ones", "expected a tensor or nested numbers, got 'ones'"),
        ([[1, 1], [1]], r"expected a tensor or nested numbers, got a list"),
    ],
)
def test_bad_coefficients_are_named(coefficients: Any, message: str) -> None:
    net, (images, _) = random_net_of("preact"), batch()
    with pytest.raises(ValueError, match=f"routing: {message}"):
        pathnet.routed(net, images, coefficients)
    with pytest.raises(ValueError, match=f"backward: {message}"):
        pathnet.routed(net, images, None, coefficients)
    with pytest.raises(ValueError, match=f"backward: {message}"):
        pathnet.routed_gradient(net, images, torch.zeros(3, dtype=torch.int64), coefficients)
    with pytest.raises(ValueError, match=f"routing: {message}"):
        net(images, routing=coefficients)


def test_other_bad_arguments_are_named() -> None:
    net, (images, labels) = random_net_of("highway"), batch()
    with pytest.raises(ValueError, match=r"routing: expected shape \[3, 2\] or \[3, 3\] for 3 blocks"):
        pathnet.routed(net, images, torch.ones(3, 1))
    with pytest.raises(ValueError, match="drawn: expected None with a routing"):
        net(images, [True] * 3, torch.ones(3, 2))
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, or one wrapped, got a Sequential"):
        pathnet.routed(nn.Sequential(net), images, torch.ones(3, 2))
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, got a Sequential"):
        pathnet.routed_gradient(nn.Sequential(net), images, labels, torch.ones(3, 2))  # type: ignore[arg-type]
