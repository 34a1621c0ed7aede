"""Outputs under a routing whose backward pass has other coefficients; single paths."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, Case
from helpers.oracles import autograd, detach_loop, in_float64, relative_error
from helpers.routed_networks import EXACT, NETS, as_if, batch, forward, gradients, random, random_net_of
from torch import Tensor

import pathnet
from pathnet import paths


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("bn", ["running", "batch"])
def test_coefficients_apart_against_values_and_gradients_written_out(kind: str, bn: str) -> None:
    net, (images, labels) = random_net_of(kind, bn), batch()
    there, back = random(net.n), random(net.n, net.parts, 1)
    other, x = copy.deepcopy(net), images.requires_grad_()

    def join(i: int, skip: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
        gradient = back[i, 0] * skip + back[i, 1] * residual
        if gate is not None:
            gradient = gradient + back[i, 2] * gate
        return as_if(there[i, 0] * skip + there[i, 1] * residual, gradient)

    expected, _ = forward(other, x, join)
    theirs = gradients(other, expected, labels)
    of_input, x.grad = x.grad, None
    output = pathnet.routed(net, x, there, back)
    torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
    for name, grad in gradients(net, output, labels).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, of_input, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", [*SMALL[:3], SMALL[4]], ids=lambda case: case.id)
def test_every_path_against_the_detach_loop_and_the_tape(case: Case, bn: Any) -> None:
    net, (images, labels) = case.net(), case.images()
    exact = in_float64(net, bn)
    every = paths.enumerate_all(net.n)
    for at in ("y0", "image", "stem_weight") if net.n < 6 else ("y0",):
        tape = pathnet.record(net, images, labels, bn, "reference", "float64", at=at)  # type: ignore[arg-type]
        taped = tape.path_gradients(every)
        total = 0.0
        for path, of_tape in zip(every, taped, strict=True):
            x = images.double().requires_grad_()
            kept: list[Tensor] = []
            handle = exact.stem.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
            output = pathnet.routed(exact, x, None, paths.routing(path[None])[0])
            handle.remove()
            place = {"y0": kept[0], "image": x, "stem_weight": exact.stem_weight()}[at]
            (measured,) = torch.autograd.grad(F.cross_entropy(output, labels), place)
            assert relative_error(measured, detach_loop(net, images, labels, path, bn, at)) < 1e-11
            assert relative_error(measured, of_tape) < 1e-9
            total = total + measured
        assert relative_error(total, autograd(net, images, labels, bn, at)) < 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["preact", "padded", "join", "highway"])
def test_weight_gradients_along_a_path_are_the_detach_loops(kind: str) -> None:
    for path in itertools.product((0, 1), repeat=3):
        net, (images, labels) = random_net_of(kind, "training"), batch()
        other = copy.deepcopy(net)

        def join(i: int, skip: Tensor, residual: Tensor, _: Any, path: Sequence[int] = path) -> Tensor:
            return skip.detach() + residual if path[i] else skip + residual.detach()

        expected, _ = forward(other, images, join)
        theirs = gradients(other, expected, labels)
        output = pathnet.routed(net, images, None, paths.routing(torch.tensor([path]))[0])
        torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
        for name, grad in gradients(net, output, labels).items():
            assert (grad is None) == (theirs[name] is None), name
            if grad is not None:
                torch.testing.assert_close(grad, theirs[name], rtol=1e-10, atol=1e-13)


def test_learned_coefficients_with_others_in_the_backward_pass() -> None:
    """Check that the coefficients' gradients are <g, branch>, with the routed gradient g at the block's output."""
    net, (images, labels) = random_net_of("preact"), batch()
    routing, back = random(3).requires_grad_(), random(3, seed=1)
    copied = routing.detach().clone().requires_grad_()

    def join(i: int, skip: Tensor, residual: Tensor, _: Any) -> Tensor:
        value = copied[i, 0] * skip.detach() + copied[i, 1] * residual.detach()
        gradient = back[i, 0] * skip + back[i, 1] * residual
        return value + gradient - gradient.detach()

    F.cross_entropy(forward(net, images, join)[0], labels).backward()
    for backward in (back, back.tolist()):
        routing.grad = None
        F.cross_entropy(pathnet.routed(net, images, routing, backward), labels).backward()
        torch.testing.assert_close(routing.grad, copied.grad, rtol=1e-10, atol=1e-13)


def test_second_derivatives_with_coefficients_apart_take_what_is_kept_back_for_a_constant() -> None:
    net, (images, labels) = random_net_of("preact"), batch(2)
    path = (1, 0, 1)
    other = copy.deepcopy(net)
    _, y0 = forward(net, images, lambda i, s, f, _: s + f)
    held: list[tuple[Tensor, Tensor]] = []
    y = y0
    for block in net.blocks:
        held.append((block.skip(y).detach(), block.residual(y).detach()))
        y = block(y)

    def join(i: int, skip: Tensor, residual: Tensor, _: Any) -> Tensor:
        return held[i][0] + residual if path[i] else skip + held[i][1]

    output, start = forward(other, images, join)
    (expected,) = torch.autograd.grad(F.cross_entropy(output, labels), start, create_graph=True)
    expected.square().sum().backward()
    kept: list[Tensor] = []
    net.stem.register_forward_hook(lambda module, inputs, output: kept.append(output))
    output = pathnet.routed(net, images, None, paths.routing(torch.tensor([path]))[0])
    (grad,) = torch.autograd.grad(F.cross_entropy(output, labels), kept[0], create_graph=True)
    grad.square().sum().backward()
    for name, parameter in net.named_parameters():
        theirs = other.get_parameter(name).grad
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-9, atol=1e-12)
