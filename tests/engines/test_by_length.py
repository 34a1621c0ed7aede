"""Exact sums by path length, of every engine: the paths themselves added up, the generating polynomial, coefficients
far apart; and signed draws, whose mean over all signs is the sum of squares."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import comb
from typing import Any

import pytest
import torch
from helpers.cases import SMALL, Case, random_net, shaken
from helpers.judging import reference_walk
from helpers.oracles import detach_loop, forward_gradient, in_float64, krawtchouk, relative_error
from helpers.tolerances import EXACT_WALK, FLOAT32_SAMPLE_NORM
from torch import Tensor, nn

import pathnet
from pathnet import gradients, scaling
from pathnet.engines import reference
from pathnet.models import Block, ResidualNet, preact_resnet

SERVES = {"reference": ["running", "batch"], "cpu": ["running", "batch"]}
"""The engines, and the modes of batch normalisation in which they have sums by length."""
ENGINES = list(SERVES)
JOBS = [(engine, bn) for engine, modes in SERVES.items() for bn in modes]
PRECISION = {"reference": "float64"}
"""Of the others, float32."""
PLACES = ["y0", "image", "stem_weight"]


def recorded(
    engine: str, net: ResidualNet, images: Tensor, labels: Tensor, bn: str = "running", at: str = "y0"
) -> pathnet.Tape:
    precision: Any = PRECISION.get(engine, "float32")
    return pathnet.record(net, images, labels, bn=bn, engine=engine, precision=precision, at=at)  # type: ignore[arg-type]


def tolerance(engine: str) -> float:
    """Of one sum, relative to its norm."""
    return EXACT_WALK if engine in PRECISION else FLOAT32_SAMPLE_NORM


@cache
def every_path(case: Case, bn: str, at: str) -> tuple[Tensor, Tensor]:
    """By the plain loop: the sums by length [n + 1, ...], and the sums of squared norms [n + 1]."""
    net, (images, labels) = case.net(), case.images()
    return added_up(net.n, [detach_loop(net, images, labels, code, bn, at) for code in codes(net.n)])


def codes(n: int) -> Tensor:
    return pathnet.paths.enumerate_all(n)


def added_up(n: int, walked: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    sums, squares = walked[0].new_zeros(n + 1, *walked[0].shape), walked[0].new_zeros(n + 1)
    for code, gradient in zip(codes(n), walked, strict=True):
        sums[int(code.sum())] += gradient
        squares[int(code.sum())] += gradient.square().sum()
    return sums, squares


def tree(net: ResidualNet, images: Tensor, labels: Tensor, bn: str) -> list[Tensor]:
    """The gradients at ``y_0`` along all paths in the order of `enumerate_all`, shared by paths that end alike."""
    exact = in_float64(net, bn)
    points = [exact.stem(images.double()).detach()]
    for block in exact:
        points.append(block(points[-1]).detach())
    y = points[-1].requires_grad_()
    grads = [torch.autograd.grad(nn.functional.cross_entropy(exact.head(y), labels), y)[0]]
    for block, point in reversed(list(zip(exact, points, strict=False))):
        x = point.requires_grad_()
        ends = block.skip(x), block.residual(x)
        grads = [
            torch.autograd.grad(end, x, own, retain_graph=True)[0] for own in grads for end in ends
        ]  # block 1, taken last, is the lowest bit
    return grads


def assert_close(actual: Tensor, expected: Tensor, most: float) -> None:
    for k, (own, other) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(own, other) < most, k


# Exact sums


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


def ten_blocks() -> tuple[ResidualNet, Tensor, Tensor]:
    """With projections, pads and strides among them; images; labels."""
    torch.manual_seed(3)
    kinds = [preact_resnet(8, 3, num_classes=5, in_channels=3, shortcut=kind) for kind in ("projection", "pad")]
    wide = preact_resnet(14, 6, num_classes=5)
    blocks = [kinds[0].blocks[0], kinds[1].blocks[0], kinds[0].blocks[1], *list(wide.blocks)[:2] * 3, wide.blocks[2]]
    net = shaken(ResidualNet(kinds[0].stem, blocks, wide.head))  # type: ignore[arg-type]
    net.head = shaken(preact_resnet(14, 3, num_classes=5)).head  # type: ignore[arg-type, assignment]
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    return net.eval(), images, labels


@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_ten_blocks(engine: str, bn: str) -> None:
    """1,024 paths."""
    net, images, labels = ten_blocks()
    assert net.n == 10
    tape = recorded(engine, net, images, labels, bn)
    assert_close(tape.gradient_by_length(), added_up(10, tree(net, images, labels, bn))[0], tolerance(engine))


def test_the_tree_of_paths_is_the_plain_loop() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    for code, own in zip(codes(3), tree(net, images, labels, "batch"), strict=True):
        assert relative_error(own, detach_loop(net, images, labels, code, "batch")) < EXACT_WALK


@pytest.mark.parametrize("together", [1, 2, 3])
def test_few_coefficients_at_a_time_are_the_same(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the edge of a chunk take their module's share from the coefficient before it."""
    case = SMALL[3]
    tape = recorded("reference", case.net(), *case.images())
    whole, norms = tape.gradient_by_length(), tape.squared_norms_by_length(1)
    taken = []
    walked = reference._through
    monkeypatch.setattr(reference, "_through", lambda *given: taken.append(len(given[3])) or walked(*given))
    # Of the largest gradient, that at the output of the last block; those before it are of other sizes.
    monkeypatch.setattr("pathnet.chunks.CHUNK_BYTES", together * 4 * tape._record.start.mantissa.nbytes)
    assert torch.equal(tape.gradient_by_length(), whole)
    assert max(taken) <= 2 * together and len(taken) > tape.n
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
    for k, (own, other) in enumerate(zip(tape.gradient_by_length(), expected, strict=True)):
        size = (squares[k] * comb(net.n, k)).sqrt()
        assert (own - other).norm() <= FLOAT32_SAMPLE_NORM * size, k


def walked_on_its_bits(tape: pathnet.Tape) -> Tensor:
    """The gradients along all paths in float64, on the ReLU bits that a fused engine recorded: [2^n, B, ...]."""
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
    expected, _ = added_up(6, [weight * own for weight, own in zip(weights, paths, strict=True)])
    assert expected[6].abs().max() == 0 and scaling.value(*sums)[6].abs().max() == 0
    assert_close(scaling.value(*sums), expected, tolerance(engine))
    torch.testing.assert_close(norms, expected.flatten(2).norm(dim=2).double(), rtol=10 * tolerance(engine), atol=0)


@pytest.fixture(scope="module", params=ENGINES)
def deep(request: pytest.FixtureRequest) -> tuple[pathnet.Tape, Tensor, ResidualNet]:
    """A tape of 54 blocks in float32, and its sums."""
    case = Case("deep", 110, width=4, side=8, batch=2)
    net = case.net()
    tape = pathnet.record(net, *case.images(), engine=request.param, precision="float32")
    return tape, tape.gradient_by_length(), net


@pytest.mark.parametrize("x", [-1.0, 0.5, 1.0, 2.0])
def test_54_blocks_polynomial_is_the_routing_one_x(deep: tuple[pathnet.Tape, Tensor, ResidualNet], x: float) -> None:
    """In float32 to 1e-5 of the sum of the terms' norms, which at x = -1 cancel; where all have one sign that is
    within a small factor of the gradient's own norm."""
    tape, sums, _ = deep
    powers = torch.tensor(x, dtype=torch.float64) ** torch.arange(55)
    terms = powers[:, None, None, None, None] * sums
    routing = torch.tensor([1.0, x], dtype=torch.float64).expand(1, 54, 2)
    expected = tape.routed_gradients(routing)[0]
    size = terms.flatten(1).norm(dim=1).sum()
    assert (terms.sum(0) - expected).norm() < 1e-5 * size
    # A term left out, or the next one taken for it, is seen.
    largest = int(terms.flatten(1).norm(dim=1).argmax())
    assert (terms.sum(0) - terms[largest] - expected).norm() > 1e-3 * size
    assert x == 1.0 or (powers.roll(1)[:, None, None, None, None] * sums).sum(0).sub(expected).norm() > 1e-3 * size


def test_the_order_of_the_blocks_is_seen(deep: tuple[pathnet.Tape, Tensor, ResidualNet]) -> None:
    """The same blocks in another order, within a stage, are another polynomial."""
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


# Coefficients far apart


class Scalar(Block):
    """``y = x + w x``"""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def residual(self, x: Tensor) -> Tensor:
        return self.weight * x


def scalars(weights: Sequence[float], batch: int = 3) -> tuple[ResidualNet, Tensor, Tensor]:
    """A network whose modules are numbers; the gradient of the loss at its output is one everywhere."""
    net = ResidualNet(nn.Identity(), [Scalar(weight) for weight in weights], nn.Flatten(0))
    return net, torch.ones(batch, 1, 1, 1), torch.zeros(batch)


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()


@pytest.mark.parametrize(("precision", "most"), [("float64", 1e-13), ("float32", 1e-5)])
def test_coefficients_of_1e_minus_60_beside_1e3_keep_their_digits(precision: Any, most: float) -> None:
    """The elementary symmetric polynomials of the modules' weights, which are powers of two, in exact fractions."""
    weights = [2.0**-8] * 40 + [4.0] * 6 + [2.0**-6] * 8
    exact = [Fraction(1)]
    for weight in weights:
        pairs = zip([*exact, Fraction(0)], [Fraction(0), *exact], strict=True)
        exact = [own + Fraction(weight) * before for own, before in pairs]
    assert exact[54] < 1e-60 and max(exact) > 1e3
    net, images, target = scalars(weights)
    tape = pathnet.record(net, images, target, engine="reference", precision=precision, loss=total)
    for own, other in zip(tape.gradient_by_length(), exact, strict=True):
        assert own.flatten().tolist() == [pytest.approx(float(other), rel=most, abs=0)] * 3


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

    found = [pathnet.record(net, images[i:], labels[i:], engine=engine, at=at, loss=of_the_last) for i in (0, 1)]
    both, alone = (tape.gradient_by_length().flatten(1).norm(dim=1) for tape in found)
    assert 0 < alone[54] < 1e-60
    torch.testing.assert_close(both, alone, rtol=FLOAT32_SAMPLE_NORM, atol=0)
    ends = torch.stack([torch.zeros(54), torch.ones(54)]).long()
    both, alone = (tape.path_gradient_norms(ends) for tape in found)
    torch.testing.assert_close(both, alone, rtol=FLOAT32_SAMPLE_NORM, atol=0)


# Signed draws


def all_signs(n: int) -> Tensor:
    return codes(n).to(torch.int8) * 2 - 1


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[4]], ids=lambda case: case.id)
@pytest.mark.parametrize(("engine", "bn"), JOBS)
def test_the_mean_over_all_signs_is_the_sum_of_squares(engine: str, case: Case, bn: str, at: str) -> None:
    tape = recorded(engine, case.net(), *case.images(), bn, at)
    draws = gradients.squared_norms_by_length(tape._record, all_signs(tape.n), at)  # type: ignore[arg-type]
    expected = every_path(case, bn, at)[1]
    torch.testing.assert_close(draws.mean(0), expected, rtol=tolerance(engine), atol=0)
    assert draws.shape == (2**tape.n, tape.n + 1) and (draws[:, 1:-1].std(0) > 1e-3 * expected[1:-1]).all()


def test_so_is_it_of_eight_numbers() -> None:
    """Scalar modules, whose paths' gradients are products of weights."""
    weights = torch.linspace(-1.5, 2, 8, dtype=torch.float64)
    net, images, target = scalars(weights.tolist(), batch=1)
    tape = pathnet.record(net, images, target, engine="reference", precision="float64", loss=total)
    draws = gradients.squared_norms_by_length(tape._record, all_signs(8), "y0")
    along = torch.where(codes(8) > 0, weights, 1.0).prod(1)
    expected = torch.zeros(9, dtype=torch.float64).index_add(0, codes(8).sum(1), along.square())
    torch.testing.assert_close(draws.mean(0), expected, rtol=EXACT_WALK, atol=0)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_and_of_ten_blocks_where_an_engine_is_quick(engine: str) -> None:
    net, images, labels = ten_blocks()
    tape = recorded(engine, net, images, labels)
    draws = gradients.squared_norms_by_length(tape._record, all_signs(10), "y0")
    expected = added_up(10, tree(net, images, labels, "running"))[1]
    torch.testing.assert_close(draws.mean(0), expected, rtol=tolerance(engine), atol=0)


def test_draws_on_scalars_follow_the_krawtchouk_polynomials() -> None:
    n, weight, batch = 54, 0.75, 2
    net, images, target = scalars([weight] * n, batch)
    tape = pathnet.record(net, images, target, engine="reference", precision="float64", loss=total)
    drawn = tape.squared_norms_by_length(6, seed=2)
    for own, signs in zip(drawn.tolist(), pathnet.paths.signs(n, 6, seed=2), strict=True):
        minus = int((signs < 0).sum())
        exact = [batch * float(krawtchouk(n, k, minus) ** 2 * Fraction(weight) ** (2 * k)) for k in range(n + 1)]
        # Of the size of what is summed up, since half of the polynomials are zero in the middle.
        sizes = [batch * comb(n, k) * weight ** (2 * k) for k in range(n + 1)]
        for value, expected, size in zip(own, exact, sizes, strict=True):
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-12 * size)


def test_draw_j_is_a_function_of_seed_and_j() -> None:
    tape = recorded("reference", SMALL[0].net(), *SMALL[0].images())
    drawn = tape.squared_norms_by_length(5, seed=1)
    assert torch.equal(tape.squared_norms_by_length(2, seed=1, first=3), drawn[3:])
    assert not torch.equal(tape.squared_norms_by_length(5, seed=2), drawn)
    with pytest.raises(ValueError, match="draws: expected an integer from 1 to 715827882, got 0"):
        tape.squared_norms_by_length(0)


# How the sums lie to each other


@pytest.mark.parametrize("engine", ENGINES)
def test_comparisons_are_those_of_the_sums(engine: str) -> None:
    tape = recorded(engine, SMALL[1].net(), *SMALL[1].images())
    sums, found = tape.gradient_by_length().flatten(1), tape.compare_lengths()
    full = sums.sum(0)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.norm, sums.norm(dim=1), **close)
    assert found.full_norm == pytest.approx(full.norm().item(), rel=1e-12)
    cosines = nn.functional.cosine_similarity
    torch.testing.assert_close(found.next_cosine, cosines(sums[:-1], sums[1:], eps=0.0), **close)
    torch.testing.assert_close(found.full_cosine, cosines(sums, full[None], eps=0.0), **close)
    torch.testing.assert_close(found.share, sums @ full / full.dot(full), **close)
    torch.testing.assert_close(found.left, (full - sums.cumsum(0)).norm(dim=1) / full.norm(), **close)
    assert found.share.sum() == pytest.approx(1) and found.explained[-1] == pytest.approx(1)


def test_a_length_that_vanishes_has_no_direction() -> None:
    net, images, target = scalars([0.0, 0.5, 0.25])
    found = pathnet.record(net, images, target, engine="reference", precision="float64", loss=total).compare_lengths()
    torch.testing.assert_close(found.norm, 3**0.5 * torch.tensor([1, 0.75, 0.125, 0], dtype=torch.float64))
    assert found.next_cosine.isnan().tolist() == found.full_cosine.isnan()[1:].tolist() == [False, False, True]
    assert found.share.tolist() == pytest.approx([1 / 1.875, 0.75 / 1.875, 0.125 / 1.875, 0])
    assert found.left.tolist() == pytest.approx([0.875 / 1.875, 0.125 / 1.875, 0, 0])


def test_of_no_gradient_no_length_explains_a_share() -> None:
    net, images, _ = scalars([0.5, 0.25])
    nothing = pathnet.record(net, images, torch.zeros(3), engine="reference", loss=lambda output, _: 0 * output.sum())
    found = nothing.compare_lengths()
    assert found.full_norm == 0 and found.norm.tolist() == [0] * 3
    assert found.share.isnan().all() and found.full_cosine.isnan().all() and not found.left.isfinite().any()


def test_the_plain_loop_is_what_is_added_up() -> None:
    """The truth of this file against autograd through the network."""
    case = SMALL[4]
    net, (images, labels) = case.net(), case.images()
    ordinary = forward_gradient(net, images, labels, "batch", "y0", lambda i, skip, residual: skip + residual)
    assert relative_error(every_path(case, "batch", "y0")[0].sum(0), ordinary) < EXACT_WALK
