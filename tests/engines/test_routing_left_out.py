"""Branches that a routing leaves out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.routed_networks import EXACT, batch, forward, gradients, random_net_of

import pathnet


@pytest.mark.parametrize("kind", ["preact", "padded", "bottleneck"])
def test_a_module_left_out_is_not_computed_and_its_weights_get_none(kind: str) -> None:
    net, (images, labels) = random_net_of(kind, "training"), batch()
    other, ran = copy.deepcopy(net), set[int]()
    for i, block in enumerate(net.blocks):
        block.convs[-1].register_forward_hook(lambda *_, i=i: ran.add(i))  # type: ignore[misc]
    drawn = [True, False, True]
    routing = [[1.0, float(kept)] for kept in drawn]
    output = pathnet.routed(net, images, routing)
    assert ran == {0, 2}
    expected = gradients(other, other(images, drawn), labels)
    for name, grad in gradients(net, output, labels).items():
        assert (grad is None) == (expected[name] is None), name
        assert grad is None or torch.equal(grad, expected[name])
    assert sum(grad is None for grad in expected.values()) >= 3
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_a_skip_left_out_is_not_computed_either() -> None:
    net, (images, labels) = random_net_of("join"), batch()
    net.blocks[1].skip_conv.register_forward_hook(lambda *_: pytest.fail("computed"))
    output = pathnet.routed(net, images, [[1, 1], [0, 2], [1, 1]])
    assert gradients(net, output, labels)["blocks.1.skip_conv.weight"] is None


def test_all_of_a_block_left_out_leaves_zeros() -> None:
    net, (images, labels) = random_net_of("join"), batch()
    output = pathnet.routed(net, images, [[1, 1], [0, 0], [1, 1]])
    expected, _ = forward(net, images, lambda i, s, f, _: (i != 1) * (s + f))
    torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
    assert gradients(net, output, labels)["blocks.0.conv.weight"] is None


def test_a_coefficient_of_zero_that_is_learned_keeps_its_branch() -> None:
    net, (images, labels) = random_net_of("preact"), batch()
    routing = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    F.cross_entropy(pathnet.routed(net, images, routing), labels).backward()
    step = 1e-6
    for i, j in itertools.product(range(3), range(2)):
        both = []
        for sign in (1, -1):
            moved = routing.detach().clone()
            moved[i, j] += sign * step
            both.append(F.cross_entropy(pathnet.routed(net, images, moved), labels).item())
        assert routing.grad[i, j] == pytest.approx((both[0] - both[1]) / (2 * step), rel=1e-6, abs=1e-9)
