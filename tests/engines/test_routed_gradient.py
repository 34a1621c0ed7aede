"""Gradients along paths as differentiable values, for penalties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import shaken
from helpers.oracles import in_float64, relative_error
from helpers.routed_networks import NETS, batch, forward, in_place, random, random_net_of
from torch import Tensor, nn

import pathnet
from pathnet import paths


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", [*NETS, "in place"])
def test_a_routed_gradient_is_the_tapes(kind: str, bn: Any) -> None:
    torch.manual_seed(0)
    net, (images, labels) = shaken({**NETS, "in place": in_place}[kind]()), batch()
    tape = pathnet.record(net, images, labels, bn, "reference", "float64")
    backward = random(net.n, net.parts)
    measured = pathnet.routed_gradient(in_float64(net, bn), images, labels, backward)
    assert relative_error(measured.detach(), tape.routed_gradients(backward[None])[0]) < 1e-10
    output, y0 = forward(in_float64(net, bn), images, lambda i, s, f, _: s + f)
    ones = torch.ones(net.n, net.parts)
    full = pathnet.routed_gradient(in_float64(net, bn), images, labels, ones, lambda out, _: out.square().sum())
    if kind not in ("highway", "in place"):
        assert relative_error(full.detach(), torch.autograd.grad(output.square().sum(), y0)[0]) < 1e-10


@pytest.mark.parametrize("kind", ["preact", "highway", "join"])
@pytest.mark.parametrize("path", [(1, 0, 1), (0, 1, 0)])
def test_a_penalty_on_a_paths_gradient_has_its_whole_derivative(kind: str, path: tuple[int, ...]) -> None:
    """Compare with finite differences along a random direction in the space of all weights."""
    net, (images, labels) = random_net_of(kind), batch(2)
    backward = paths.routing(torch.tensor([path]))[0]
    for name, parameter in net.named_parameters():
        if name.endswith(".gate.weight"):  # constant gates, as paths have them
            nn.init.zeros_(parameter)

    def penalty() -> Tensor:
        return pathnet.routed_gradient(net, images, labels, backward).square().sum()

    penalty().backward()
    torch.manual_seed(1)
    slope, directions = 0.0, []
    moved = [parameter for name, parameter in net.named_parameters() if ".gate" not in name]
    for parameter in moved:
        directions.append(torch.randn_like(parameter))
        slope += 0.0 if parameter.grad is None else float((parameter.grad * directions[-1]).sum())
    values = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            for parameter, direction in zip(moved, directions, strict=True):
                parameter.add_(direction, alpha=step)
        values.append(penalty().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)


@pytest.mark.parametrize("label", [-1, 99])
def test_a_gradient_of_labels_that_no_class_has_is_refused(label: int) -> None:
    net, (images, labels) = random_net_of("preact"), batch()
    with pytest.raises(ValueError, match=r"target: expected labels 0 to \d+, got"):
        pathnet.routed_gradient(net, images, torch.full_like(labels, label), torch.ones(3, 2))


def test_a_gradient_of_a_loss_that_is_not_finite_is_refused() -> None:
    net, (images, labels) = random_net_of("preact"), batch()
    with pytest.raises(ValueError, match="net: its loss on these inputs is nan"):
        pathnet.routed_gradient(
            net, images, labels, torch.ones(3, 2), lambda out, _: (out.sum() - out.sum()).sqrt() / 0
        )
    with pytest.raises(ValueError, match="x: expected finite values, got NaN or infinity"):
        pathnet.routed_gradient(net, images * torch.nan, labels, torch.ones(3, 2))
    with pytest.raises(ValueError, match="loss: expected one real number per batch"):
        pathnet.routed_gradient(net, images, labels, torch.ones(3, 2), lambda out, _: out)
