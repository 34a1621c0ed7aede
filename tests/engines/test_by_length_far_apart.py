"""Sums by length along 54 blocks, as a polynomial, and of coefficients that are far apart."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.judging import reference_walk
from helpers.length_sums import (
    ENGINES,
    JOBS,
    PLACES,
    PRECISION,
    recorded,
    scalars,
    tolerance,
    total,
)
from helpers.tolerances import FLOAT32_SAMPLE_NORM
from torch import Tensor, nn

import pathnet
from pathnet import scaling
from pathnet.models import ResidualNet


@pytest.fixture(scope="module", params=ENGINES)
def deep(request: pytest.FixtureRequest) -> tuple[pathnet.Tape, Tensor, ResidualNet]:
    """A tape of 54 blocks in float32, and its sums."""
    case = Case("deep", 110, width=4, side=8, batch=2)
    net = case.net()
    tape = pathnet.record(net, *case.images(), engine=request.param, precision="float32")
    return tape, tape.gradient_by_length(), net


@pytest.mark.parametrize("x", [-1.0, 0.5, 1.0, 2.0])
def test_54_blocks_polynomial_is_the_routing_one_x(deep: tuple[pathnet.Tape, Tensor, ResidualNet], x: float) -> None:
    """Compare in float32, to 1e-5 of the sum of the terms' norms.

    At x = -1 the terms cancel; where all have one sign, that sum is within a small factor of the gradient's norm.
    """
    tape, sums, _ = deep
    powers = torch.tensor(x, dtype=torch.float64) ** torch.arange(55)
    terms = powers[:, None, None, None, None] * sums
    routing = torch.tensor([1.0, x], dtype=torch.float64).expand(1, 54, 2)
    expected = tape.routed_gradients(routing)[0]
    size = terms.flatten(1).norm(dim=1).sum()
    assert (terms.sum(0) - expected).norm() < 1e-5 * size
    # A term left out, or replaced by the next one, is noticed.
    largest = int(terms.flatten(1).norm(dim=1).argmax())
    assert (terms.sum(0) - terms[largest] - expected).norm() > 1e-3 * size
    assert x == 1.0 or (powers.roll(1)[:, None, None, None, None] * sums).sum(0).sub(expected).norm() > 1e-3 * size


def test_the_order_of_the_blocks_is_seen(deep: tuple[pathnet.Tape, Tensor, ResidualNet]) -> None:
    """Reorder the blocks within a stage: they are another polynomial."""
    tape, sums, net = deep
    swapped = [*list(net.blocks)[:1], *reversed(list(net.blocks)[1:18]), *list(net.blocks)[18:]]
    case = Case("deep", 110, width=4, side=8, batch=2)
    other = pathnet.record(
        ResidualNet(net.stem, swapped, net.head),  # type: ignore[arg-type]
        *case.images(),
        engine=tape.engine,
        precision="float32",
    )
    routing = torch.tensor([1.0, 0.5], dtype=torch.float64).expand(1, 54, 2)
    expected = other.routed_gradients(routing)[0]
    powers = 0.5 ** torch.arange(55, dtype=torch.float64)
    terms = powers[:, None, None, None, None] * sums
    assert (terms.sum(0) - expected).norm() > 1e-2 * terms.flatten(1).norm(dim=1).sum()


@pytest.mark.parametrize(("precision", "most"), [("float64", 1e-13), ("float32", 1e-5)])
def test_coefficients_of_1e_minus_60_beside_1e3_keep_their_digits(precision: Any, most: float) -> None:
    """The elementary symmetric polynomials of the modules' weights, which are powers of two, in exact fractions."""
    weights = [2.0**-8] * 40 + [4.0] * 6 + [2.0**-6] * 8
    exact = [Fraction(1)]
    for weight in weights:
        pairs = zip([*exact, Fraction(0)], [Fraction(0), *exact], strict=True)
        exact = [same + Fraction(weight) * shorter for same, shorter in pairs]
    assert exact[54] < 1e-60 and max(exact) > 1e3
    net, images, target = scalars(weights)
    tape = pathnet.record(net, images, target, engine="reference", precision=precision, loss=total)
    for measured, other in zip(tape.gradient_by_length(), exact, strict=True):
        assert measured.flatten().tolist() == [pytest.approx(float(other), rel=most, abs=0)] * 3


@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_weak_modules_keep_the_digits_of_every_length(engine: str, bn: str) -> None:
    """54 modules of about 1e-2 each: lengths from about 1 down to 1e-100, each with its own relative accuracy."""
    case = Case("deep", 110, width=4, side=8, batch=2)
    net, (images, labels) = case.net(), case.images()
    for block in net.blocks:
        block.convs[-1].weight.data *= 3e-3  # type: ignore[union-attr, index]
    tape = recorded(engine, net, images, labels, bn)
    sums = tape.gradient_by_length().flatten(1).norm(dim=1)
    assert sums[54] < 1e-60 * sums[0]
    ends = torch.stack([torch.zeros(54), torch.ones(54)])
    for k, expected in zip((0, 54), tape.path_gradient_norms(ends.long()), strict=True):
        assert sums[k] == pytest.approx(expected.item(), rel=tolerance(engine), abs=0)
    if engine not in PRECISION and bn == "running":
        walk, start = reference_walk(tape)
        walked = walk.sums_by_length(start, torch.ones(54, 2))
        torch.testing.assert_close(sums, scaling.combine(scaling.norms(*walked)), rtol=FLOAT32_SAMPLE_NORM, atol=0)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sample_without_a_gradient_has_no_say_in_the_others_scale(engine: str, at: Any) -> None:
    """At the first convolution's weight samples are added up, and a zero among them has some power of two as well."""
    case = Case("deep", 110, width=4, side=8, batch=2)
    net, (images, labels) = case.net(), case.images()
    for block in net.blocks:
        block.convs[-1].weight.data *= 3e-3  # type: ignore[union-attr, index]

    def of_the_last(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output[-1:].double(), target[-1:])

    tapes = [pathnet.record(net, images[i:], labels[i:], engine=engine, at=at, loss=of_the_last) for i in (0, 1)]
    both, alone = (tape.gradient_by_length().flatten(1).norm(dim=1) for tape in tapes)
    assert 0 < alone[54] < 1e-60
    torch.testing.assert_close(both, alone, rtol=FLOAT32_SAMPLE_NORM, atol=0)
    ends = torch.stack([torch.zeros(54), torch.ones(54)]).long()
    both, alone = (tape.path_gradient_norms(ends) for tape in tapes)
    torch.testing.assert_close(both, alone, rtol=FLOAT32_SAMPLE_NORM, atol=0)
