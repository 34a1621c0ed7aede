"""Sums by length against the plain loop over all paths."""

from __future__ import annotations

from math import comb

import pytest
import torch
from helpers.cases import SMALL, Case, random_net
from helpers.judging import reference_walk
from helpers.length_sums import (
    ENGINES,
    JOBS,
    PLACES,
    PRECISION,
    added_up,
    assert_close,
    codes,
    every_path,
    recorded,
    ten_blocks,
    tolerance,
    tree,
)
from helpers.oracles import detach_loop, forward_gradient, relative_error
from helpers.tolerances import EXACT_WALK, FLOAT32_SAMPLE_NORM
from torch import Tensor

import pathnet
from pathnet import scaling
from pathnet.engines import reference


def test_the_plain_loop_is_what_is_added_up() -> None:
    """The truth of this file against autograd through the network."""
    case = SMALL[4]
    net, (images, labels) = case.net(), case.images()
    ordinary = forward_gradient(net, images, labels, "batch", "y0", lambda i, skip, residual: skip + residual)
    assert relative_error(every_path(case, "batch", "y0")[0].sum(0), ordinary) < EXACT_WALK


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_they_are_the_paths_added_up(engine: str, case: Case, bn: str) -> None:
    tape = recorded(engine, case.net(), *case.images(), bn)
    assert tape.engine == engine
    sums = tape.gradient_by_length()
    assert sums.dtype == torch.float64
    assert_close(sums, every_path(case, bn, "y0")[0], tolerance(engine))
    assert relative_error(sums.sum(0), tape.gradient()) < tolerance(engine)
    mantissa, exponent = tape.gradient_by_length(scaled=True)
    assert torch.equal(mantissa.double() * 2.0**exponent, sums)


@pytest.mark.parametrize("at", PLACES[1:])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[4]], ids=lambda case: case.id)
@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_every_place(engine: str, case: Case, bn: str, at: str) -> None:
    tape = recorded(engine, case.net(), *case.images(), bn, at)
    assert_close(tape.gradient_by_length(), every_path(case, bn, at)[0], tolerance(engine))


@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_ten_blocks(engine: str, bn: str) -> None:
    """1,024 paths."""
    net, images, labels = ten_blocks()
    assert net.n == 10
    tape = recorded(engine, net, images, labels, bn)
    assert_close(tape.gradient_by_length(), added_up(10, tree(net, images, labels, bn))[0], tolerance(engine))


def test_the_tree_of_paths_is_the_plain_loop() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    for code, grad in zip(codes(3), tree(net, images, labels, "batch"), strict=True):
        assert relative_error(grad, detach_loop(net, images, labels, code, "batch")) < EXACT_WALK


@pytest.mark.parametrize("together", [1, 2, 3])
def test_few_coefficients_at_a_time_are_the_same(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the edge of a chunk take their module's share from the coefficient before it."""
    case = SMALL[3]
    tape = recorded("reference", case.net(), *case.images())
    whole, norms = tape.gradient_by_length(), tape.squared_norms_by_length(1)
    counts = []
    walked = reference._through
    monkeypatch.setattr(
        reference, "_through", lambda *arguments: counts.append(len(arguments[3])) or walked(*arguments)
    )
    # Of the largest gradient, that at the output of the last block; those before it are of other sizes.
    monkeypatch.setattr("pathnet.chunks.CHUNK_BYTES", together * 4 * tape._record.start.mantissa.nbytes)
    assert torch.equal(tape.gradient_by_length(), whole)
    assert max(counts) <= 2 * together and len(counts) > tape.n
    assert torch.equal(tape.squared_norms_by_length(1), norms)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("engine", ENGINES)
def test_random_networks(engine: str, seed: int) -> None:
    """Down to one channel, one pixel, one sample and one block; fused engines on their own ReLU bits, where
    a sum is off by no more than the size of what is summed up in it allows."""
    net, images, labels = random_net(seed)
    tape = recorded(engine, net, images, labels)
    if engine in PRECISION:
        expected, _ = added_up(net.n, tree(net, images, labels, "running"))
        assert_close(tape.gradient_by_length(), expected, tolerance(engine))
        return
    walked = walked_on_its_bits(tape)
    expected, squares = added_up(net.n, list(walked))
    for k, (measured, other) in enumerate(zip(tape.gradient_by_length(), expected, strict=True)):
        size = (squares[k] * comb(net.n, k)).sqrt()
        assert (measured - other).norm() <= FLOAT32_SAMPLE_NORM * size, k


def walked_on_its_bits(tape: pathnet.Tape) -> Tensor:
    """Return the gradients [2^n, B, ...] along all paths in float64, on the ReLU bits of a fused engine."""
    routing = pathnet.paths.routing(codes(tape.n))
    walk, start = reference_walk(tape)
    return scaling.value(*walk.routed_backward(start, routing))


@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_each_block_has_its_own_coefficients(engine: str, bn: str) -> None:
    """Signs among them, and skips and modules that are left out."""
    case = SMALL[3]
    tape = recorded(engine, case.net(), *case.images(), bn)
    routing = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    routing[1, 0] = routing[4, 1] = 0
    walk, start = tape._record.walk, tape._record.start
    here = routing.to(start.mantissa.dtype)
    sums, norms = walk.sums_by_length(start, here), walk.sums_by_length_norms(start, here)
    net, (images, labels) = case.net(), case.images()
    weights = torch.where(codes(6) > 0, routing[:, 1], routing[:, 0]).prod(1)
    paths = [detach_loop(net, images, labels, code, bn) for code in codes(6)]
    expected, _ = added_up(6, [weight * path for weight, path in zip(weights, paths, strict=True)])
    assert expected[6].abs().max() == 0 and scaling.value(*sums)[6].abs().max() == 0
    assert_close(scaling.value(*sums), expected, tolerance(engine))
    torch.testing.assert_close(norms, expected.flatten(2).norm(dim=2).double(), rtol=10 * tolerance(engine), atol=0)
