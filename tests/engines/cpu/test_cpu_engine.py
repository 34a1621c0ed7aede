"""The cpu engine's backward pass against the reference's, in float64 on the same record; its forward pass apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import SMALL, Case, measured_net, random_net
from helpers.cpu_networks import SEEDS, check_batches, each_seed, random_paths, recorded
from helpers.judging import TOLERANCES, check, random_routings
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import BFLOAT16_SAMPLE_NORM, FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM, FORWARD
from helpers.walk_cases import INSTRUCTION_SETS, MODES
from torch import Tensor

import pathnet
from pathnet import native
from pathnet.engines.cpu import ops
from pathnet.models import resnet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(("isa", "seed"), each_seed())
def test_walks_of_networks_that_are_measured(
    isa: str, seed: int, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = measured_net(seed, small=isa == "amx")
    tape = recorded(net, images, labels, bn, precision)
    check_batches(*check(tape, random_paths(net.n, seed), precision), precision)


@pytest.mark.parametrize(("isa", "seed"), each_seed(2 * SEEDS))
def test_walks_of_random_networks(isa: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one channel, one pixel and one sample, with coefficients that cancel: all that float32 stands. The two
    bfloat16 terms of AMX have 17 bits, and stand a sample's tolerance."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = random_net(seed)
    tape = recorded(net, images, labels, "running", "float32")
    norms, expected = check(tape, random_routings(net.n, seed), "float32")
    if isa != "amx":
        check_batches(norms, expected, "float32")


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(("isa", "seed"), each_seed(SEEDS // 2))
def test_forward_passes_of_random_networks(isa: str, seed: int, bn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = measured_net(seed, small=isa == "amx")
    recorder = pathnet.Recorder(net, bn, "cpu", "bfloat16")  # type: ignore[arg-type]
    exact = in_float64(net, bn)
    with torch.no_grad():
        assert relative_error(recorder(images, labels).output, exact(images.double())) < FORWARD
        routing = torch.cat([random_paths(net.n, seed)[:4], torch.rand(2, net.n, 2, dtype=torch.float64)])
        for output, path in zip(recorder.routed_outputs(images, routing), routing.tolist(), strict=True):
            y = exact.stem(images.double())
            for block, (a, c) in zip(exact.blocks, path, strict=True):
                y = a * block.skip(y) + c * block.residual(y)
            assert relative_error(output, exact.head(y)) < FORWARD


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_every_path_against_the_detach_loop(case: Case, bn: str) -> None:
    """Judge by the float64 network's bits: rounding flips none of these few ReLUs."""
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, bn, "float32")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code, bn)) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize("bn", MODES)
def test_the_recording_forward_is_float32_accurate(bn: str) -> None:
    case = Case("deep", 110, width=4, side=16, batch=8)
    net, (images, labels) = case.net(), case.images()
    exact = in_float64(net, bn)(images.double()).detach()
    for precision in TOLERANCES:
        assert relative_error(recorded(net, images, labels, bn, precision).output, exact) < FORWARD


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
def test_the_110_layer_network(bn: str, precision: str) -> None:
    """Judge norms alone in bfloat16, with enough samples for roundings to average: all 108 convolutions round a
    gradient, whose direction is then not judged."""
    case = Case("resnet-110", 110, width=16, side=32, batch=2 if precision == "float32" else 16)
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, bn, precision)
    codes = torch.cat([pathnet.paths.sample(54, length, 1) for length in (0, 5, 17, 54)])
    # As few records in float64 as may be, of which the truth makes one a call.
    for part, gradients in [(codes, True)] if precision == "float32" else [(codes[:3], True), (codes[3:], False)]:
        check_batches(*check(tape, pathnet.paths.routing(part), precision, gradients), precision)


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_gradients_along_54_modules_underflow_nowhere(
    isa: str, bn: str, shortcut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules, and projections, that shrink a gradient by 1e-3 each and more; a batch's statistics make up for some.

    On AMX the half of them, which shrink it by as much: 108 convolutions of 17 bits would lose a sample's tolerance.
    """
    monkeypatch.setenv("PATHNET_ISA", isa)
    case = Case("deep", 110, width=16, side=8, batch=4, shortcut=shortcut)
    net, (images, labels) = case.net(), case.images()
    power, lengths = (-24, (0, 13, 27)) if isa == "amx" else (-13, (0, 27, 51, 54))
    for block in net.blocks:
        for conv in (block.convs[-1], block.projection):
            if conv is not None:
                conv.weight.data *= 2.0 ** (power if bn == "running" else power - 5)
    codes = torch.cat([pathnet.paths.sample(54, length, 1) for length in lengths])
    norms, _ = check(recorded(net, images, labels, bn, "float32"), pathnet.paths.routing(codes), "float32")
    assert (norms > 0).all() and norms[-1].max() < 1e-160


@pytest.mark.parametrize("bn", MODES)
def test_two_steep_modules_fit_float32_one_by_one(bn: str) -> None:
    """Each shrinks a gradient by 2^-70: the product of two would be gone."""
    case = Case("steep", 20, width=16, side=8, batch=4)
    net, (images, labels) = case.net(), case.images()
    for block in net.blocks:
        block.convs[-1].weight.data *= 2.0**-70
    path = pathnet.paths.routing(torch.ones(1, net.n, dtype=torch.uint8))
    norms, _ = check(recorded(net, images, labels, bn, "float32"), path, "float32")
    assert (norms > 0).all() and norms.max() < 1e-160


@pytest.mark.parametrize("bn", MODES)
def test_both_zeros_are_one_coefficient(bn: str) -> None:
    net, (images, labels) = SMALL[1].net(), SMALL[1].images()
    routing = random_paths(net.n, 0)[:2]
    routing[1] = routing[0]
    routing[1, 0, 1] = -0.0
    routing[:, 0, 0] = 1.0
    routing[0, 0, 1] = 0.0
    routing[:, 1] = torch.tensor([0.5, 0.7], dtype=torch.float64)
    check(recorded(net, images, labels, bn, "float32"), routing, "float32")


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_a_tapes_answers_do_not_depend_on_threads_and_grouping(post: bool, bn: str, precision: str) -> None:
    case, threads = Case("net", 20, width=7, side=9, batch=5), torch.get_num_threads()
    net, (images, labels) = resnet(20, width=7).eval() if post else case.net(), case.images()
    codes = pathnet.paths.sample(9, 4, 31)
    answers = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            # Stem and head are PyTorch's, whose sums may depend on the number of threads.
            tape = recorded(net, images, labels, bn, precision)
            answers.append([tape.path_gradients(codes), tape.path_gradient_norms(codes, per_sample=True)])
            parts = [tape.path_gradient_norms(part, per_sample=True) for part in codes.split(4)]
            assert torch.equal(torch.cat(parts), answers[-1][1])
            assert torch.equal(tape.path_gradients(codes.flip(0)).flip(0), answers[-1][0])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *answers))


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("at", ["image", "stem_weight"])
def test_other_places(at: str, bn: str) -> None:
    case = SMALL[1]
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, bn=bn, engine="cpu", at=at)  # type: ignore[arg-type]
    for code in pathnet.paths.enumerate_all(6)[::9]:
        expected = detach_loop(net, images, labels, code, bn, at=at)
        assert relative_error(tape.path_gradients(code[None])[0], expected) < FLOAT32_SAMPLE_NORM
        norms = tape.path_gradient_norms(code[None])
        torch.testing.assert_close(norms[0], expected.norm(), rtol=FLOAT32_SAMPLE_NORM, atol=0)


def test_the_judges_see_a_small_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice each tolerance, on one path of six."""
    net, images, labels = measured_net(0)
    tape = recorded(net, images, labels, "running", "float32")
    routing = random_paths(net.n, 0)
    check_batches(*check(tape, routing, "float32"), "float32")
    right = ops.cpu_backward_running

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        norms, grad, exponent = right(*arguments)
        grad[3:4] *= 1 + error
        norms[3:4] *= 1 + error
        return norms, grad, exponent

    monkeypatch.setattr(ops, "cpu_backward_running", wrong)
    error = 2 * FLOAT32_BATCH_NORM
    norms, expected = check(tape, routing, "float32")
    with pytest.raises(AssertionError):
        check_batches(norms, expected, "float32")
    check_batches(norms, expected, "bfloat16")
    error = 2 * FLOAT32_SAMPLE_NORM
    check(tape, routing, "bfloat16")
    with pytest.raises(AssertionError):
        check(tape, routing, "float32")
    error = 2 * BFLOAT16_SAMPLE_NORM
    with pytest.raises(AssertionError):
        check(tape, routing, "bfloat16")
