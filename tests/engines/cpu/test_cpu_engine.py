"""The cpu engine's walk against the reference's, in float64 on the same record; its forward pass apart."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import SMALL, Case, measured_net, post_activation_net, random_net, shaken
from helpers.judging import TOLERANCES, check, check_sums, random_routings, truth_sums
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import BFLOAT16_SAMPLE_NORM, FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM, FORWARD
from torch import Tensor, nn

import pathnet
from pathnet import native, scaling
from pathnet.engines.cpu import CpuWalk, ops
from pathnet.models import ResidualNet, resnet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

INSTRUCTION_SETS = native.build_facts()["instruction_sets"] if native.LOADED else []
MODES = ["running", "batch"]
SEEDS = 23
EMULATED_SEEDS = 4
"""AMX may run in software."""


def each_seed(count: int = SEEDS) -> list[Any]:
    """Instruction set and seed."""
    return [(isa, seed) for isa in INSTRUCTION_SETS for seed in range(EMULATED_SEEDS if isa == "amx" else count)]


def recorded(net: ResidualNet, images: Tensor, labels: Tensor, bn: str, precision: str) -> pathnet.Tape:
    return pathnet.record(net, images, labels, bn=bn, engine="cpu", precision=precision)  # type: ignore[arg-type]


def random_paths(n: int, seed: int) -> Tensor:
    """float64 [6, n, 2]: lengths 0 and n, one of them twice, and any others."""
    codes = np.random.default_rng(seed).integers(0, 2, (6, n))
    codes[0], codes[1], codes[2] = 0, 1, 0
    return torch.from_numpy(np.stack([1 - codes, codes], 2)).double()


def check_batches(norms: Tensor, expected: Tensor, precision: str) -> None:
    torch.testing.assert_close(
        scaling.combine(norms), scaling.combine(expected), rtol=TOLERANCES[precision][0], atol=0
    )


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
        for own, path in zip(recorder.routed_outputs(images, routing), routing.tolist(), strict=True):
            y = exact.stem(images.double())
            for block, (a, c) in zip(exact.blocks, path, strict=True):
                y = a * block.skip(y) + c * block.residual(y)
            assert relative_error(own, exact.head(y)) < FORWARD


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_every_path_against_the_detach_loop(case: Case, bn: str) -> None:
    """Judged on the float64 network's own bits: so few ReLUs that rounding flips none of them here."""
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
    """In bfloat16 with samples enough for roundings to average; the direction of a gradient that all 108 convolutions
    have rounded is not judged."""
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


def test_a_tape_keeps_bits_not_activations() -> None:
    """Of ResNet-110 and 128 images: their bits are 16 MB, their activations would be half a gigabyte."""
    case = Case("resnet-110", 110, width=16, side=32, batch=128)
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, "running", "float32")
    assert isinstance(tape._record.walk, CpuWalk)
    assert tape._record.walk.relu_bits.nbytes <= tape.nbytes < 40e6


def test_bits_are_a_channel_each() -> None:
    case = SMALL[3]
    net, (images, labels) = case.net(), case.images()
    record = recorded(net, images, labels, "running", "float32")._record
    assert isinstance(record.walk, CpuWalk)
    y = net.stem(images)
    for block, bits in zip(net.blocks, record.walk.bits(), strict=True):
        assert torch.equal(bits[0], block.bns[0](y) > 0)
        y = block(y)


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


def test_auto_takes_it_for_every_mode_and_precision_but_float64() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bn in MODES:
            for precision in TOLERANCES:
                tape = pathnet.record(net, images, labels, bn, precision=precision)  # type: ignore[arg-type]
                assert tape.engine == "cpu"


def test_what_the_engine_lacks_is_named() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    net.blocks[1].convs[0].dilation = (2, 2)
    with pytest.raises(ValueError, match="cpu: block 2 has a convolution that is grouped, dilated or not square"):
        pathnet.record(net, images, labels, engine="cpu")
    with pytest.raises(ValueError, match='cpu: no precision="float64"'):
        pathnet.record(net, images, labels, engine="cpu", precision="float64")
    for conv, message in (
        (torch.nn.Conv2d(4, 4, 3, padding=1), "has a convolution with a bias"),
        (
            torch.nn.Conv2d(4, 4, 1, padding=1, bias=False),
            "has a convolution whose padding reaches beyond its kernel",
        ),
    ):
        net = SMALL[0].net()
        net.blocks[0].convs[0] = conv
        with pytest.raises(ValueError, match=f"cpu: block 1 {message}"):
            pathnet.record(net, images, labels, engine="cpu")
    net = SMALL[0].net()
    net.blocks[2].bns[1] = torch.nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match="cpu: block 3 keeps no running statistics"):
        pathnet.record(net, images, labels, engine="cpu")
    assert pathnet.record(net, images, labels, "batch", engine="cpu").engine == "cpu"


def test_one_value_a_channel_has_no_statistics() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    with pytest.raises(ValueError, match="images: expected more than one value a channel for batch statistics"):
        recorded(net, images[:1, :, :1, :1], labels[:1], "batch", "float32")


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


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(("isa", "seed"), each_seed(SEEDS // 2))
def test_sums_by_length_are_those_of_every_path(
    isa: str, seed: int, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = measured_net(seed, small=True)
    tape = recorded(net, images, labels, bn, precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS[:2])
def test_sums_by_length_of_54_blocks(isa: str, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are of bfloat16 numbers, or of two terms of them, along 54 modules on small images, the batch's
    norm averages few roundings: it is held to a sample's tolerance. Of bfloat16 the lengths up to 45 are judged."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    case = Case("deep", 110, width=8, side=16, batch=4)
    tape = recorded(case.net(), *case.images(), bn, precision)
    norms = scaling.combine(tape._record.walk.sums_by_length_norms(tape._record.start, torch.ones(tape.n, 2)))
    expected = scaling.combine(scaling.norms(*deep_sums(bn)))
    rounds = precision == "bfloat16" or isa == "amx"
    judged = slice(46 if precision == "bfloat16" else 55)
    torch.testing.assert_close(norms[judged], expected[judged], rtol=TOLERANCES[precision][int(rounds)], atol=0)


@functools.cache
def deep_sums(bn: str) -> tuple[Tensor, Tensor]:
    """On the bits of the float32 forward pass, which is the same for all instruction sets but for rounding."""
    case = Case("deep", 110, width=8, side=16, batch=4)
    return truth_sums(recorded(case.net(), *case.images(), bn, "float32"), torch.ones(54, 2))


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(("isa", "seed"), each_seed(SEEDS // 2))
def test_post_activation_blocks(
    isa: str, seed: int, bn: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walks, sums by length, forward passes and records, in every instruction set."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = post_activation_net(seed, bn)
    exact = in_float64(net, bn)
    recorder = pathnet.Recorder(net, bn, "cpu", precision)  # type: ignore[arg-type]
    tape = recorder(images, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    check(tape, random_paths(net.n, seed), precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    for own, path in zip(recorder.routed_outputs(images, ROUTINGS[net.n]), ROUTINGS[net.n].tolist(), strict=True):
        y = exact.stem(images.double())
        for block, (a, c) in zip(exact.blocks, path, strict=True):
            y = block.join(a * block.skip(y) + c * block.residual(y))
        assert relative_error(own, exact.head(y).detach()) < FORWARD


ROUTINGS = {n: torch.rand(4, n, 2, generator=torch.Generator().manual_seed(n)) for n in range(2, 7)}
for own in ROUTINGS.values():
    own[0], own[1, :, 1], own[2, 0, 0] = 1, 0, 0


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_every_path_of_post_activation_networks_against_the_detach_loop(seed: int, bn: str) -> None:
    net, images, labels = post_activation_net(seed, bn)
    tape = recorded(net, images, labels, bn, "float32")
    codes = pathnet.paths.enumerate_all(net.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code, bn).detach()) < FLOAT32_SAMPLE_NORM
    # At these points the polynomial of path lengths is a routing.
    sums = tape.gradient_by_length().double()
    for x in (-1.0, 0.5, 2.0):
        routing = torch.tensor([1.0, x]).expand(1, net.n, 2)
        whole = sum(x**k * own for k, own in enumerate(sums))
        assert relative_error(tape.routed_gradients(routing)[0], torch.as_tensor(whole)) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_deep_post_activation_networks_underflow_nowhere(shortcut: str, bn: str, precision: str) -> None:
    """Modules and projections whose last BN shrinks a gradient by 1e-9."""
    torch.manual_seed(0)
    # A handful of channels averages no bfloat16 roundings, of which minimal filtering has more than AMX tiles.
    width = 5 if precision == "float32" else 12
    net = shaken(resnet(56, width=width, shortcut=shortcut)).eval()  # type: ignore[arg-type]
    for block in net.blocks:
        for norm in (block.bns[-1], block.projection_bn):
            if norm is not None:
                norm.weight.data *= 2.0**-30
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    codes = torch.cat([pathnet.paths.sample(27, length, 1) for length in (0, 13, 27)])
    tape = recorded(net, images, labels, bn, precision)
    # In bfloat16 the direction of a gradient that all convolutions have rounded is not judged.
    norms, _ = check(tape, pathnet.paths.routing(codes), precision, gradients=precision == "float32")
    assert (norms > 0).all() and norms[-1].max() < 1e-160


def test_what_post_activation_networks_are_refused() -> None:
    net, (images, labels) = resnet(8, width=4, shortcut="projection").eval(), SMALL[0].images()
    net.blocks[1].projection_bn = nn.Identity()
    form = net.blocks[1].form()
    net.blocks[1].form = lambda: replace(form, projection_bn=None)
    with pytest.raises(ValueError, match="cpu: block 2 has a projection without batch normalisation"):
        recorded(net, images, labels, "batch", "float32")
    assert recorded(net, images, labels, "running", "float32").engine == "cpu"
    mixed = ResidualNet(net.stem, [*Case("pre", 8).net().blocks[:1], *net.blocks], net.head).eval()
    with pytest.raises(ValueError, match="cpu: block 2 is a post-activation one, others are not"):
        recorded(mixed, images, labels, "running", "float32")


@pytest.mark.parametrize("bn", MODES)
def test_biases_before_batch_normalisation(bn: str) -> None:
    net, images, labels = post_activation_net(2, bn)
    for block in net.blocks:
        for conv in (*block.convs, block.projection):
            if conv is not None:
                conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    tape = recorded(net, images, labels, bn, "float32")
    assert relative_error(tape.output, in_float64(net, bn)(images.double()).detach()) < FORWARD
    check(tape, random_paths(net.n, 0), "float32")
