"""The triton engine's kernels in Triton's interpreter, on the CPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import SMALL, Case, random_net
from helpers.interpreted import MODES, recorded, small_net, walk_of
from helpers.judging import TOLERANCES, check, check_sums, random_routings
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM, FORWARD
from torch import Tensor, nn

import pathnet
from pathnet import scaling
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.triton import limits

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"),
    pytest.mark.usefixtures("interpreted"),
]


AROUND = Case("basic-pad-around-3", 8, width=3, side=7, shortcut="pad_around")


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("seed", range(18))
def test_walks_of_random_networks(seed: int) -> None:
    """Kernels of 1, 3 and 5, one to three units, strides, odd sides, widths from 1 on, single samples."""
    net, images, labels = random_net(seed)
    check(recorded(net, images, labels, "running"), random_routings(net.n, seed), "float32", gradients=seed % 3 == 0)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_walks_of_networks_that_are_measured(seed: int, bn: str, precision: str) -> None:
    net, images, labels = small_net(seed)
    tape = recorded(net, images, labels, bn, precision)
    norms, expected = check(tape, random_routings(net.n, seed), precision, gradients=seed % 3 == 0)
    if precision == "float32":
        norms, expected = scaling.combine(norms), scaling.combine(expected)
        torch.testing.assert_close(norms, expected, rtol=FLOAT32_BATCH_NORM, atol=0)


@pytest.mark.parametrize(("bn", "precision"), [("running", "float32"), ("batch", "float32"), ("batch", "bfloat16")])
def test_walks_in_the_tiles_of_a_gpu(bn: str, precision: str) -> None:
    """Tiles that hold parts of samples, or several; more rows than a tile holds, and padded tiles."""
    case = Case("tiles", 8, width=8, side=13, batch=3)
    tape = recorded(case.net(), *case.images(), bn, precision)
    check(tape, random_routings(tape.n, 2), precision, gradients=False)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(("bn", "precision"), [("running", "float32"), ("batch", "float32"), ("running", "bfloat16")])
@pytest.mark.parametrize("seed", range(3))
def test_sums_by_length_are_those_of_every_path(seed: int, bn: str, precision: str) -> None:
    net, images, labels = small_net(seed)
    tape = recorded(net, images, labels, bn, precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, random_routings(net.n, seed)[3], precision)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_forward_passes(case: Case, bn: str) -> None:
    """Check output, ReLU bits and normalised activations of a record, and outputs of lesioned and other routings."""
    net, (images, labels) = case.net(), case.images()
    recorder = pathnet.Recorder(net, bn=bn, engine="interpreted")  # type: ignore[arg-type]
    exact = in_float64(net, bn)
    tape = recorder(images, labels)
    record = walk_of(tape)
    y, unit = exact.stem(images.double()).detach(), 0
    expected_output = exact(images.double()).detach()
    assert relative_error(tape.output, expected_output) < FORWARD
    for block, bits in zip(exact.blocks, record.bits(), strict=True):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        hooks = [unit_form.bn.register_forward_hook(keep(inputs, outputs)) for unit_form in block.form().units]
        y = block(y).detach()
        for hook in hooks:
            hook.remove()
        for unit_bits, x, z in zip(bits, inputs, outputs, strict=True):
            sure = z.abs() > 1e-4
            assert torch.equal(unit_bits[sure], (z > 0)[sure])
            if bn == "batch":
                deviation = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
                x_hat = (x - x.mean((0, 2, 3), keepdim=True)) / deviation
                begin = record.saved.normalized_begin[unit]
                stored = record.saved.normalized[begin : begin + x.numel()]
                stored = stored.reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
                torch.testing.assert_close(stored.double(), x_hat, rtol=1e-4, atol=1e-4)
            unit += 1
    routing = random_routings(net.n, 1)
    y0 = exact.stem(images.double())
    prepared = ReferenceEngine().prepare(Job(exact, "running", "float64", y0.shape[1:], y0.device))
    expected = prepared.routed_forward(y0, routing)
    for output, y_n in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(output, exact.head(y_n).detach()) < FORWARD


def keep(inputs: list[Tensor], outputs: list[Tensor]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        inputs.append(arguments[0].detach())
        outputs.append(output.detach())

    return hook


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize(
    "case",
    [SMALL[0], AROUND, SMALL[4]],
    ids=lambda case: case.id,
)
def test_every_path_equals_the_detach_loop(case: Case, bn: str) -> None:
    """Every path gradient of three blocks equals the detach loop's, and their sum the ordinary gradient."""
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, bn)
    every = pathnet.paths.enumerate_all(net.n)
    gradients = tape.path_gradients(every)
    for path, gradient in zip(every, gradients, strict=True):
        expected = detach_loop(net, images, labels, path, bn)
        assert relative_error(gradient, expected) < FLOAT32_SAMPLE_NORM
    assert relative_error(gradients.sum(0), tape.gradient()) < FLOAT32_SAMPLE_NORM


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_the_polynomial_of_path_lengths(bn: str) -> None:
    case = Case("polynomial", 8, width=3, side=6, batch=3)
    tape = recorded(case.net(), *case.images(), bn)
    every = pathnet.paths.enumerate_all(tape.n)
    gradients, lengths = tape.path_gradients(every), every.sum(1).double()
    points = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    routing = torch.stack([torch.ones(3, tape.n, dtype=torch.float64), points[:, None].expand(3, tape.n)], 2)
    for x, routed in zip(points, tape.routed_gradients(routing), strict=True):
        total = (gradients * (x**lengths)[:, None, None, None, None]).sum(0)
        assert relative_error(routed, total) < FLOAT32_SAMPLE_NORM


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_results_are_bit_equal_for_any_grouping(precision: Any, bn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.sum_in_order(monkeypatch)
    case = Case("grouping", 8, width=4, side=6, batch=3)
    tape = recorded(case.net(), *case.images(), bn, precision)
    some = pathnet.paths.enumerate_all(tape.n)[[0, 3, 5, 6, 7]]
    together = tape.path_gradient_norms(some, per_sample=True)
    parts = [tape.path_gradient_norms(part, per_sample=True) for part in some.flip(0).split(3)]
    assert torch.equal(together.flip(0), torch.cat(parts))
    monkeypatch.setattr(limits, "ROOM", 1)
    assert torch.equal(together[:3], tape.path_gradient_norms(some[:3], per_sample=True))


@pytest.mark.usefixtures("big_tiles")
def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images, labels = small_net(1)
    tape = recorded(net, images, labels, "batch")
    routing = random_routings(net.n, 1)
    saved = walk_of(tape).saved
    saved.normalized[::7] *= 1.01
    with pytest.raises(AssertionError):
        check(tape, routing, "float32", gradients=False)
    saved.normalized[::7] /= 1.01
    saved.scales[0, 0] *= 1.001
    with pytest.raises(AssertionError):
        check(tape, routing, "float32", gradients=False)


def test_a_tape_keeps_bits_alone_and_snapshots_them() -> None:
    case = Case("snapshot", 8, width=4, side=6, batch=3)
    net, (images, labels) = case.net(), case.images()
    recorder = pathnet.Recorder(net, engine="interpreted")
    tape = recorder(images, labels)
    b = pathnet.paths.sample(net.n, 2, 2)
    norms = tape.path_gradient_norms(b)
    recorder(images.flip(0), labels.flip(0))
    net.blocks[0].convs[0].weight.data.zero_()
    assert torch.equal(tape.path_gradient_norms(b), norms)
    record = walk_of(tape)
    assert record.saved.normalized.numel() == 0
    assert record.saved.bits.numel() < 1.1 * sum(bits.numel() / 8 for block in record.bits() for bits in block) + 400
