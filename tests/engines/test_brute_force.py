"""Networks of at most six blocks, every path: the definitions themselves, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import SMALL, Case
from helpers.oracles import autograd, detach_loop, forward_gradient, relative_error
from helpers.tolerances import EXACT_WALK

import pathnet

PLACES = ("y0", "image", "stem_weight")


def recorded(case: Case, bn: str, at: str = "y0", seed: int = 0, engine: str = "autograd") -> pathnet.Tape:
    net, (images, labels) = case.net(seed), case.images(seed)
    return pathnet.record(net, images, labels, bn, engine, "float64", at)  # type: ignore[arg-type]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
@pytest.mark.parametrize("engine", ["autograd", "reference"])
def test_every_path_equals_the_detach_loop_and_their_sum_autograd(case: Case, bn: str, engine: str) -> None:
    tape = recorded(case, bn, engine=engine)
    net, (images, labels) = case.net(), case.images()
    codes = pathnet.paths.enumerate_all(tape.n)
    walked = tape.path_gradients(codes)
    for code, gradient in zip(codes, walked, strict=True):
        assert relative_error(gradient, detach_loop(net, images, labels, code, bn)) < EXACT_WALK
    ordinary = autograd(net, images, labels, bn)
    assert relative_error(walked.sum(0), ordinary) < EXACT_WALK
    assert relative_error(tape.gradient(), ordinary) < EXACT_WALK


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[4]], ids=lambda case: case.id)
def test_every_place(case: Case, bn: str, at: str) -> None:
    tape = recorded(case, bn, at, seed=1)
    net, (images, labels) = case.net(1), case.images(1)
    codes = pathnet.paths.enumerate_all(tape.n)[::3]
    norms = tape.path_gradient_norms(codes)
    for code, gradient, norm in zip(codes, tape.path_gradients(codes), norms, strict=True):
        expected = detach_loop(net, images, labels, code, bn, at)
        assert relative_error(gradient, expected) < EXACT_WALK
        assert abs(norm - expected.norm()) < EXACT_WALK * expected.norm()
    assert relative_error(tape.gradient(), autograd(net, images, labels, bn, at)) < EXACT_WALK


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[3], SMALL[4]], ids=lambda case: case.id)
def test_a_routing_equals_branches_scaled_in_the_backward_pass_only(case: Case, bn: str) -> None:
    tape = recorded(case, bn, seed=2)
    net, (images, labels) = case.net(2), case.images(2)
    routing = torch.randn(4, tape.n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    routing[1, ::2, 0] = 0
    routing[2, :, 1] = 0
    for coefficients, gradient in zip(routing, tape.routed_gradients(routing), strict=True):

        def route(
            i: int, skip: torch.Tensor, residual: torch.Tensor, coefficients: torch.Tensor = coefficients
        ) -> torch.Tensor:
            y = coefficients[i, 0] * skip + coefficients[i, 1] * residual
            return y + (skip + residual - y).detach()

        assert relative_error(gradient, forward_gradient(net, images, labels, bn, "y0", route)) < EXACT_WALK


@pytest.mark.parametrize("x", [-1.0, 0.5, 2.0])
def test_the_polynomial_of_path_lengths_equals_the_routing_one_x(x: float) -> None:
    tape = recorded(SMALL[1], "running", seed=3)
    codes = pathnet.paths.enumerate_all(tape.n)
    powers = torch.full((len(codes),), x, dtype=torch.float64) ** codes.sum(1)
    polynomial = (powers[:, None, None, None, None] * tape.path_gradients(codes)).sum(0)
    routing = torch.tensor([1.0, x], dtype=torch.float64).expand(1, tape.n, 2)
    assert relative_error(tape.routed_gradients(routing)[0], polynomial) < EXACT_WALK


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_norms_per_sample_are_those_of_the_slices(bn: str) -> None:
    case = SMALL[0]
    net, (images, labels) = case.net(4), case.images(4)
    codes = pathnet.paths.enumerate_all(3)
    for at in ("y0", "image"):
        norms = recorded(case, bn, at, seed=4).path_gradient_norms(codes, per_sample=True)
        for code, measured in zip(codes, norms, strict=True):
            expected = detach_loop(net, images, labels, code, bn, at).flatten(1).norm(dim=1)
            torch.testing.assert_close(measured, expected, rtol=EXACT_WALK, atol=0)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_a_samples_share_of_the_stem_weights_gradient(bn: str) -> None:
    case = SMALL[0]
    net, (images, labels) = case.net(5), case.images(5)
    codes = pathnet.paths.enumerate_all(3)[1::2]
    norms = recorded(case, bn, "stem_weight", seed=5).path_gradient_norms(codes, per_sample=True)
    stem = net.double().stem
    for code, measured in zip(codes, norms, strict=True):
        at_y0 = detach_loop(net, images, labels, code, bn)
        for sample in range(case.batch):
            y0 = stem(images[sample : sample + 1].double())
            expected = torch.autograd.grad(y0, stem.weight, at_y0[sample : sample + 1])[0].norm()
            assert abs(measured[sample] - expected) < EXACT_WALK * expected
